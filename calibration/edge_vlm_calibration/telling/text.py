"""What `edge-vlm calibrate` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_vlm.console.tables import columns
from edge_vlm.formats.calibrated import (
    AlertsSection,
    BudgetSection,
    ChangeSection,
    ReuseSection,
)
from edge_vlm.formats.calibrated.precision import PrecisionSection
from edge_vlm.formats.calibration import FP16_LIMIT, Calibration, CalibrationTable
from edge_vlm_calibration.budget import UNIT, threshold_at

RANGES_SHOWN = 5
BAR = 40
CURVES_SHOWN = 4
LINES = 10


def summary(made: Calibration, sections: Sequence[str]) -> str:
    """What the sections that were made now say, with their notes."""
    parts: list[str] = []
    for name, kind, text in (
        ("change", ChangeSection, change_text),
        ("reuse", ReuseSection, reuse_text),
        ("budget", BudgetSection, budget_text),
        ("ranges", CalibrationTable, ranges_text),
        ("precision", PrecisionSection, precision_text),
        ("alerts", AlertsSection, alerts_text),
    ):
        section: Any = made.find(kind)
        if name in sections and section is not None:
            notes = [f"note: {note}" for note in made.sections[name].notes]
            parts.append("\n".join([f"[{name}]", text(section), *notes]))
    if "precision" in sections and "precision" in made.sections:
        parts.append("\n".join(["[precision]", *made.sections["precision"].notes]))
    return "\n\n".join(parts)


def budget_text(section: BudgetSection) -> str:
    name, value = next(iter(section.wanted.items()))
    lines = [
        f"wanted     {value:g} {UNIT[name]}",
        f"predicted  {section.share:.1%} of the cells of encoded frames, "
        f"{section.per_s:.1f} cells a second of video",
        f"settings   {', '.join(f'{k} {_plain(v)}' for k, v in section.settings.items())}",
    ]
    if section.curve:
        lines.append(f"score      mean {section.score_mean:.4f}, std {section.score_std:.4f}")
    at = threshold_at(section.curve, section.share)
    if at is not None and "change_threshold" not in section.settings:
        lines.append(f"threshold  that share of cells scores {at:.4g} or more")
    rows = [("clip", "frames", "duplicates", "predicted", "cells/s", "session predicted, measured")]
    for clip in section.clips:
        measured = "-"
        if clip.measured_share is not None:
            expected = "-" if clip.expected_share is None else f"{clip.expected_share:.1%}"
            measured = f"{expected}, {clip.measured_share:.1%} ({clip.measured_frames} frames)"
        rows.append(
            (
                clip.name,
                str(clip.frames),
                str(clip.duplicates),
                f"{clip.predicted_share:.1%}",
                f"{clip.predicted_per_s:.1f}",
                measured,
            )
        )
    lines += ["", *columns(rows, "<>")]
    if section.ratios:
        found = [("keep ratio", "kept", "cells/s", "of all scores")]
        found += [
            (f"{p.keep_ratio:g}", f"{p.share:.1%}", f"{p.per_s:.1f}", f"{p.score_share:.1%}")
            for p in section.ratios
        ]
        lines += ["", *columns(found, ">>")]
    if section.curve:
        lines += ["", "share of cells against threshold"]
        lines += bars([(f"{p.threshold:.4g}", p.share) for p in _thinned(section.curve)])
    if section.accuracy:
        lines += ["", "right answers against share kept"]
        lines += bars(
            [
                (f"{p.share:.0%} ({p.low:.0%}..{p.high:.0%} of {p.asked})", p.accuracy)
                for p in section.accuracy
            ]
        )
    return "\n".join(lines)


def _thinned(points: Sequence[Any]) -> list[Any]:
    step = max(1, len(points) // LINES)
    return list(points[::step])


def bars(points: Sequence[tuple[str, float]]) -> list[str]:
    """One line a point: its name, a bar of its share, the share."""
    width = max((len(name) for name, _ in points), default=0)
    return [
        f"{name:>{width}}  {'#' * round(BAR * share):<{BAR}}  {share:.1%}" for name, share in points
    ]


def change_text(section: ChangeSection) -> str:
    lines = []
    if section.still is not None:
        still = section.still
        lines.append(
            f"still      {still.clip}, {still.begin_s:.1f}..{still.end_s:.1f} s "
            f"({still.frames} frames): noise {section.noise:.2f} of 255"
        )
    shown = ", ".join(f"{k} {_plain(v)}" for k, v in section.settings.items())
    lines.append(f"settings   {shown or 'none: the usual ones stay'}")
    lines.append(
        f"duplicates {section.duplicate_share:.1%} of the frames are dropped as such "
        f"({section.duplicate_share_before:.1%} with the usual threshold)"
    )
    if section.pixel_floor is not None:
        floor = (
            f"floor      a cell's pixels change by {section.pixel_floor:.2f} of 255 by noise alone"
        )
        if section.score_floor is not None:
            floor += f", its {section.scorer} score reaches {section.score_floor:.4g}"
        lines.append(floor)
        lines.append(f"moving     {section.moving_share:.1%} of the cells change by clearly more")
    return "\n".join(lines)


def reuse_text(section: ReuseSection) -> str:
    lines = []
    if section.still is not None:
        still = section.still
        lines.append(
            f"still      {still.clip}, {still.begin_s:.1f}..{still.end_s:.1f} s ({still.frames} "
            f"frames): noise changes a patch by up to {section.patch_floor:.2f} levels of 255"
        )
    shown = ", ".join(f"{k} {_plain(v)}" for k, v in section.settings.items())
    lines.append(f"settings   {shown or 'none: everything is computed'}")
    lines += ["", f"reuse against the share of cells that is computed ({section.frames} frames)"]
    lines += bars([(f"{each.level:g}", each.share) for each in section.shares])
    return "\n".join(lines)


def alerts_text(section: AlertsSection) -> str:
    rows = [("alert", "on/off, hold, clear, cool", "recall", "false/h", "95 %", "delay", "repeats")]
    for alert in section.alerts:
        rule = alert.rule
        low, high = alert.recall_interval
        f_low, f_high = alert.false_interval
        times = "/".join(f"{rule[k]:g}" for k in ("hold_s", "clear_hold_s", "cooldown_s"))
        rows.append(
            (
                alert.name,
                f"{rule['on_threshold']:.3g}/{rule['off_threshold']:.3g}, {times} s",
                f"{alert.noticed}/{alert.events} [{low:.0%}, {high:.0%}]",
                f"{alert.false_per_h:.2f}{'' if alert.meets else ' !'}",
                f"[{f_low:.2f}, {f_high:.2f}]",
                "-" if alert.delay_s is None else f"{alert.delay_s:.1f} s",
                str(alert.repeats),
            )
        )
    lines = list(columns(rows, "<>"))
    if len(section.alerts) > CURVES_SHOWN:
        return "\n".join(lines)
    for alert in section.alerts:
        lines += ["", f"{alert.name}: threshold, false alarms, noticed of {alert.events} events"]
        lines += [
            f"{point.on_threshold:.3f}  {point.false_alarms:>4}  "
            + "#" * round(BAR * point.noticed / max(alert.events, 1))
            + f"  {point.noticed}"
            for point in _thinned(alert.curve)
        ]
    return "\n".join(lines)


def precision_text(section: PrecisionSection) -> str:
    """What is planned is in the notes."""
    return (
        f"{len(section.products)} products, by {section.frames} frames and {section.tokens} "
        f"tokens; rounded weights: {section.arrays}"
    )


def ranges_text(table: CalibrationTable) -> str:
    """What a person wants to know first: scores, thresholds, the largest ranges, the verdict."""
    lines = [f"{table.num_frames} frames of {', '.join(table.footage)}"]
    if table.num_scores:
        lines.append(
            f"score      mean {table.score_mean:.4f}, std {table.score_std:.4f}, "
            f"5..95 % {table.score_quantiles[5]:.4f}..{table.score_quantiles[95]:.4f}"
        )
    else:
        lines.append("score      none: the model has no token scorer")
    lines += [
        f"keep {t.keep_ratio:4.0%}  score >= {t.score:.4f} (keeps {t.kept_share:.1%})"
        for t in table.thresholds
    ]
    found = [(x, f"{name} (in)") for name, x in table.input_ranges.items()]
    found += [(x, f"{name} (out)") for name, x in table.output_ranges.items()]
    lines.append("largest |x|")
    lines += [f"{x:10.4g}  {name}" for x, name in sorted(found, reverse=True)[:RANGES_SHOWN]]
    unsafe = table.fp16_unsafe
    verdict = f"UNSAFE in {len(unsafe)} modules: {', '.join(unsafe)}" if unsafe else "safe"
    lines.append(f"fp16 (vision side, limit {FP16_LIMIT:.0f}): {verdict}")
    return "\n".join(lines)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
