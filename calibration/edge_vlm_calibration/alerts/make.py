"""Makes the section `alerts`, and the lines of a server's file that say the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import edge_vlm
from edge_vlm.console.progress import Progress
from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibrated import session_settings
from edge_vlm.formats.calibrated.alerts import AlertsSection, CalibratedAlert
from edge_vlm.formats.calibrated.change import CHANGE_SETTINGS
from edge_vlm.formats.calibration import Calibration, ClipRecord, Provenance
from edge_vlm.watching import Watcher
from edge_vlm_calibration.alerts.checking import Series, check_clip, rows_for, series_of
from edge_vlm_calibration.alerts.marks import (
    Mark,
    Watch,
    is_event_set,
    read_marks,
    watches_of,
    watches_of_set,
)
from edge_vlm_calibration.alerts.thresholds import choose, described, notes_on, shown_by, together
from edge_vlm_calibration.footage import expected_frames, pictures
from edge_vlm_calibration.provenance import hash_of_clip
from edge_vlm_calibration.rows import WorkFolder
from edge_vlm_calibration.simulate import DEFAULTS


@dataclass(frozen=True, kw_only=True)
class AlertRequest:
    """What was asked for."""

    marks: Path | None
    """None: the clips are event sets."""
    false_per_h: float
    slack_s: float
    one_rule: bool
    """All questions get the same rule, chosen on all of them together."""
    fps: float


def watched(request: AlertRequest, clips: Mapping[str, Path]) -> dict[str, list[Watch]]:
    """What is asked of each clip; looked at before any model runs. Raises as `read_marks`,
    `watches_of` and `pictures`."""
    sets = {name: path for name, path in clips.items() if is_event_set(path)}
    found: dict[str, list[Watch]] = {
        name: watches_of_set(name, path) for name, path in sets.items()
    }
    if request.marks is None:
        if not sets:
            raise ConfigError(
                "alerts are calibrated on events that are known: there are no marks",
                remedy="write them down and name the file with --marks",
            )
        return found
    others = [name for name in clips if name not in sets]
    marks: list[Mark] = read_marks(request.marks, others)
    lengths_s = {mark.clip: _length_s(clips[mark.clip], request.fps) for mark in marks}
    for watch in watches_of(marks, lengths_s):
        found.setdefault(watch.clip, []).append(watch)
    return found


def _length_s(path: Path, fps: float) -> float:
    """Raises VideoError and its leaves, ConfigError for a folder of several streams."""
    frames = None if path.is_dir() else expected_frames(path, fps)
    if frames:
        return frames / fps
    last_s = 0.0
    for i, picture in enumerate(pictures(path, fps, 1280)):
        if picture.is_first and i:
            raise ConfigError("a folder of several clips has no times to mark", where=path)
        last_s = picture.time_s
    return last_s + 1 / fps


def make_alerts(
    request: AlertRequest,
    watcher: Watcher,
    work: WorkFolder,
    clips: Mapping[str, Path],
    made: Calibration,
) -> Calibration:
    """Raises ConfigError, AlertsUnsupported, and what sessions raise."""
    watches = watched(request, clips)
    known = [clip for clip in clips if clip in watches]
    questions = list(dict.fromkeys(each.question for clip in known for each in watches[clip]))
    capped = session_settings(made).get("fps_cap", request.fps)
    if capped != request.fps:
        raise ConfigError(
            f"the file's budget is for {capped:g} frames a second, not for {request.fps:g}: alerts "
            "would be chosen on other pictures than sessions see",
            remedy=f"give --fps {capped:g}, or make the section budget anew",
        )
    usual = {**DEFAULTS, **watcher.defaults}
    before = {name: usual[name] for name in sorted(CHANGE_SETTINGS)}
    calibrated = session_settings(made, can_reuse=watcher.can_reuse)
    settings = {"fps_cap": request.fps, **before, **calibrated}
    total = sum(expected_frames(clips[name], request.fps) or 0.0 for name in known)
    series: list[Series] = []
    records = []
    with Progress("alerts: frames", total) as progress:
        for name in known:
            made_with = repr((name, questions, watches[name], settings))
            digest = hashlib.sha256(made_with.encode()).hexdigest()[:16]
            file = work.rows(f"alerts-{digest}.rows", rows_for(questions))
            check_clip(
                *(watcher, clips[name], request.fps, settings, questions, watches[name], file),
                progress.advance,
            )
            rows = file.read()
            series += series_of(rows, watches[name], questions, 1 / request.fps)
            of_clip = hash_of_clip(clips[name])
            records.append(ClipRecord(name=name, sha256=of_clip, frames=len(rows)))
    alerts = _with_own_names(_chosen(request, series))
    section = AlertsSection(
        wanted_false_per_h=request.false_per_h, slack_s=request.slack_s, alerts=tuple(alerts)
    )
    provenance = Provenance(
        clips=tuple(records),
        settings={
            "false_alarms_per_hour": request.false_per_h,
            "slack_s": request.slack_s,
            "one_rule": request.one_rule,
            **{name: value for name, value in settings.items() if value is not None},
        },
        opened=watcher.opened,
        tool_version=edge_vlm.__version__,
    )
    notes = [together(alerts, request.false_per_h)] if request.one_rule else []
    for alert in alerts:
        notes += notes_on(alert, request.false_per_h, is_shared=request.one_rule)
    notes += shown_by(alerts, request.false_per_h)
    return made.with_section(section, provenance, notes)


def _chosen(request: AlertRequest, series: Sequence[Series]) -> list[CalibratedAlert]:
    groups: dict[tuple[str, str], list[Series]] = {}
    for each in series:
        groups.setdefault((each.watch.alert, each.watch.question), []).append(each)
    wanted, slack_s = request.false_per_h, request.slack_s
    shared = choose(series, wanted, slack_s) if request.one_rule else None
    return [
        described(shared or choose(group, wanted, slack_s), *key, group, wanted, slack_s)
        for key, group in groups.items()
    ]


def _with_own_names(alerts: Sequence[CalibratedAlert]) -> list[CalibratedAlert]:
    """Names of other letters may be the same without them, which a server would refuse."""
    taken: set[str] = set()
    found = []
    for alert in alerts:
        name, number = alert.name, 1
        while name in taken:
            number += 1
            name = f"{alert.name[:60]}-{number}"
        taken.add(name)
        found.append(dataclasses.replace(alert, name=name))
    return found


def alert_lines(section: AlertsSection, camera: str) -> str:
    """`[[alert]]` tables as `edge-vlm serve` reads them."""
    parts = []
    for alert in section.alerts:
        low, high = alert.false_interval
        parts.append(
            "\n".join(
                [
                    f"# {alert.noticed} of {alert.events} events noticed, "
                    f"{alert.false_alarms} false alarms in {alert.watched_h:.2f} h "
                    f"({low:.2f}..{high:.2f} an hour)",
                    "[[alert]]",
                    f"name = {json.dumps(alert.name)}",
                    f"camera = {json.dumps(camera, ensure_ascii=False)}",
                    f"question = {json.dumps(alert.question, ensure_ascii=False)}",
                    *(f"{name} = {float(value)!r}" for name, value in alert.rule.items()),
                ]
            )
        )
    return "\n\n".join(parts) + "\n"
