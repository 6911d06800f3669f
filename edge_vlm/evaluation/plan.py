"""What the words of an `edge-vlm eval` command line name: models by path, questions, rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import ATTENTIONS, KEEP_RATIOS, PATHS, TABLE_POLICIES, Run, grid
from edge_vlm.formats.bundle import MANIFEST
from edge_vlm.formats.qa_set import INDEX

CHECKPOINT_CONFIGS = ("config.json", "config.yaml", "adapter_config.json")
"""Of our folders and of the hub's; of those of Molmo2's training repository; of adapters."""
RUN_STEPS = "step[0-9]*"
"""Folders of weights in a whole run of the training repository."""
SCHEMES = ("ws://", "wss://", "http://", "https://")
HOST_AND_PORT = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):\d+")
OFFERS = {"server": ["served"], "checkpoint": ["torch"], "bundle": ["served", "bundle"]}
"""Paths of each kind of model, the usual one first."""


@dataclass(frozen=True)
class Plan:
    """What the arguments name."""

    targets: Mapping[str, str | None]
    """By path; None: the model that comes with it."""
    questions: Path | None


def plan(targets: Sequence[str], through: str | None = None) -> Plan:
    """Tells by its files what each argument is. Raises ConfigError, VideoNotFound."""
    paths = [] if through is None else through.split(",")
    if unknown := [path for path in paths if path not in PATHS]:
        raise ConfigError(f"--through must name some of {', '.join(PATHS)}, got {unknown[0]!r}")
    by_kind: dict[str, str] = {}
    for target in targets:
        kind = _kind_of(target)
        if kind in by_kind:
            raise ConfigError(
                f"two {kind}s: {by_kind[kind]} and {target}", remedy="measure one after the other"
            )
        by_kind[kind] = target
    questions = by_kind.pop("question set", None)
    found: dict[str, str | None] = {}
    for kind, offered in OFFERS.items():  # a server first: the bundle then is for its own path
        free = [path for path in offered if path not in found]
        if kind in by_kind:
            chosen = [path for path in paths if path in free] or free[:1]
            found |= dict.fromkeys(chosen, by_kind[kind])
    if not found:
        found = dict.fromkeys([path for path in paths if path != "torch"] or ["served"])
    if missing := [path for path in paths if path not in found]:
        raise ConfigError(f"nothing that was named can be measured through {missing[0]}")
    return Plan(found, None if questions is None else Path(questions))


def is_server(target: str) -> bool:
    """An address, HOST:PORT or with a scheme, and no file or folder."""
    if target.startswith(SCHEMES):
        return True
    return HOST_AND_PORT.fullmatch(target) is not None and not Path(target).exists()


def _kind_of(target: str) -> str:
    if is_server(target):
        return "server"
    path = Path(target)
    if not path.exists():
        raise ConfigError("no such file or folder", where=target)
    if path.is_file() or (path / INDEX).is_file():
        return "question set"
    if (path / MANIFEST).is_file():
        return "bundle"
    if any((path / name).is_file() for name in CHECKPOINT_CONFIGS) or any(path.glob(RUN_STEPS)):
        return "checkpoint"
    raise ConfigError(
        "neither a checkpoint nor a bundle nor a question set",
        where=target,
        remedy=f"expected is {' or '.join(CHECKPOINT_CONFIGS)}, {MANIFEST} or {INDEX} in it",
    )


def rows(
    runs: Sequence[str] | None, policies: str | None, ratios: str | None, attentions: str | None
) -> list[Run]:
    """The named runs, or the table of all combinations of three comma-separated lists.

    Raises ConfigError.
    """
    if runs:
        return list(dict.fromkeys(Run.parse(text) for text in runs))
    try:
        wanted = [float(text) for text in _list(ratios)] or KEEP_RATIOS
        modes = [VisionAttention(text) for text in _list(attentions)] or ATTENTIONS
    except ValueError as error:
        raise ConfigError(f"cannot read the table's rows: {error}") from None
    return grid(_list(policies) or TABLE_POLICIES, wanted, modes)


def _list(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]
