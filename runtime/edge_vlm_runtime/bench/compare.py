"""Two measurements side by side, if they are of like things."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_vlm.console.tables import markdown
from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, fault_of
from edge_vlm_runtime.bench.record import read_record
from edge_vlm_runtime.bench.report import figure

Record = Mapping[str, Any]
SAME_WORKLOAD = ("keep_ratios", "contexts", "rates", "source", "picture", "answer_tokens", "reuse")
"""What both have to have alike; how often each was repeated does not matter."""


def read_comparable(path: Path) -> dict[str, Any]:
    """As `read_record`; raises ConfigError also where a part is missing that is compared."""
    record = read_record(path)
    try:
        if not record["model"]["shape"].items():
            raise ValueError("the model has no shape")
        comparison(record, record)
        if not figures(record):
            raise ValueError("no figure in it")
        for name, value in figures(record).items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r:.60}")
    except MALFORMED as error:
        raise ConfigError(
            f"not a whole result of this bench: {fault_of(error)}",
            where=path,
            remedy="write it again with `edge-vlm bench --json FILE`",
        ) from error
    return record


def require_alike(before: Record, now: Record) -> None:
    """Raises ConfigError naming every difference in the model's shape or the workload."""
    differences = [
        f"{name} {before['workload'].get(name)} and {now['workload'].get(name)}"
        for name in SAME_WORKLOAD
        if before["workload"].get(name) != now["workload"].get(name)
    ]
    old, new = before["model"]["shape"], now["model"]["shape"]
    differences += [
        f"{name} {old.get(name)} and {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ConfigError(
            f"unlike measurements cannot be compared: {'; '.join(differences)}",
            remedy="measure the same shapes with the same options",
        )


def comparison(before: Record, now: Record) -> list[str]:
    """Lines of Markdown: each figure that both have, and how many times faster it is now.

    What differs is told first. Raises ConfigError as `require_alike`.
    """
    require_alike(before, now)
    rows: list[Sequence[str]] = [("p50 ms", "before", "now", "times faster")]
    for name, old in figures(before).items():
        new = figures(now).get(name)
        if new:
            rows.append((name, figure(old), figure(new), f"{old / new:.2f}"))
    told = [
        f"- {name}: {before['model'].get(name)} before, {now['model'].get(name)} now"
        for name in ("name", "precision", "variant", "backend", "threads", "sha256")
        if before["model"].get(name) != now["model"].get(name)
    ]
    if before["device"]["name"] != now["device"]["name"]:
        told.append(f"- device: {before['device']['name']} before, {now['device']['name']} now")
    told += [
        f"- {when} was ended early: what it lacks is not compared"
        for when, record in (("before", before), ("now", now))
        if not record.get("complete", True)
    ]
    told += [f"- before: {warning}" for warning in (before["run"] or {}).get("warnings", ())]
    told.append(
        "- two runs, not one in turns: what the machine did meanwhile is in these ratios, too"
    )
    return ["## Compared with before", "", *told, "", *markdown(rows, "<>")]


def figures(record: Record) -> dict[str, float]:
    """Medians in milliseconds, by name."""
    found: dict[str, float] = {}
    for point in record.get("frames") or ():
        for stage, summary in point["stages_ms"].items():
            if summary:
                found[f"keep {point['keep_ratio']:g}: {stage}"] = summary["p50"]
    for point in record.get("answers") or ():
        for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms")):
            if point[key]:
                found[f"context {point['context']}: {name}"] = point[key]["p50"]
    for point in (record.get("stream") or {}).get("rates", ()):
        if point["lag_ms"]:
            found[f"{point['rate']} frames/s: lag"] = point["lag_ms"]["p50"]
    return found
