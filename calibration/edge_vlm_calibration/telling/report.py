"""The page that a person looks at: what the footage costs, what is kept and where, what was chosen.

One HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_vlm.formats.calibrated import (
    AlertsSection,
    BudgetSection,
    ChangeSection,
    ReuseSection,
)
from edge_vlm.formats.calibration import Calibration
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_calibration.agreeing import disagreements
from edge_vlm_calibration.budget import UNIT
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.telling.plot import Axes, diagrams

SCENE_SIDE = 480
SCENES = 4
EXPECTED = (1.0, 0.5, 0.2, 0.1)
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }
 th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption, .note { color: #555; font-size: .9rem; } code, pre { background: #f4f4f4; }
pre { padding: .75rem; overflow-x: auto; } svg, img { max-width: 100%; }
"""


def write_report(made: Calibration, clips: Mapping[str, Path], path: Path, fps: float) -> None:
    """Raises as `pictures` for a clip that cannot be read any more."""
    budget, change = made.find(BudgetSection), made.find(ChangeSection)
    alerts = made.find(AlertsSection)
    parts = [f"<h1>Calibration of {_text(made.model.name)}</h1>"]
    if budget is not None:
        parts += [*_costs(budget), *_where(budget, made, clips, fps), *_expected(budget)]
    if change is not None:
        parts += _noise(change)
    if (reuse := made.find(ReuseSection)) is not None:
        parts += _reuse(reuse)
    parts += _precisions(made)
    if alerts is not None:
        parts += _alerts(alerts)
    parts += [*_notes(made), *_origin(made)]
    body = "\n".join(parts)
    title = _text(made.model.name)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Calibration of {title}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _costs(budget: BudgetSection) -> list[str]:
    name, value = next(iter(budget.wanted.items()))
    rows = [
        (
            clip.name,
            f"{clip.seconds:.0f} s",
            str(clip.frames),
            str(clip.duplicates),
            f"{clip.predicted_share:.1%}",
            "-" if clip.measured_share is None else f"{clip.measured_share:.1%}",
            f"{clip.predicted_per_s:.1f}",
        )
        for clip in budget.clips
    ]
    head = ("clip", "length", "frames", "duplicates", "kept, predicted", "measured", "cells/s")
    settings = ", ".join(
        f"<code>{_text(k)} = {_text(v)}</code>" for k, v in budget.settings.items()
    )
    return [
        "<h2>What the footage costs</h2>",
        f"<p>Asked for: {value:g} {UNIT[name]}. With the chosen settings {budget.share:.1%} of the "
        f"cells of encoded frames are kept, {budget.per_s:.1f} a second of video; each is a token "
        f"of the language model.</p><p>Settings: {settings}</p>",
        _table(head, rows),
        "".join(_svg(axes) for axes in diagrams(budget)),
    ]


def _where(
    budget: BudgetSection, made: Calibration, clips: Mapping[str, Path], fps: float
) -> list[str]:
    heat = [(budget.kept_map, "share of frames in which a cell is kept")]
    heat.append((budget.score_map, "mean score, against the largest"))
    heat = [(values, said) for values, said in heat if values and max(values) > 0]
    if not heat:
        return []
    known = {clip.name for clip in made.sections["budget"].provenance.clips}
    scenes = {name: path for name, path in clips.items() if name in known}
    figures = []
    for name, path in list(scenes.items())[:SCENES]:
        picture = next(iter(pictures(path, fps, SCENE_SIDE))).rgb()
        for values, said in heat:
            figures.append(
                f"<figure>{_heat(values, encode_jpeg(picture, 80), *picture.shape[:2])}"
                f"<figcaption>{_text(name)}: {said}</figcaption></figure>"
            )
    if not figures:
        figures = [f"<figure>{_heat(values, b'', 360, 480)}" for values, _ in heat]
    return ["<h2>What is kept, and where</h2>", "".join(figures)]


def _heat(values: Sequence[float], jpeg: bytes, height: int, width: int) -> str:
    """Cells over the picture: the more is kept, the redder."""
    grid, most = math.isqrt(len(values)), max(values)
    across, down = width / grid, height / grid
    data = base64.b64encode(jpeg).decode()
    picture = f'<image href="data:image/jpeg;base64,{data}" width="{width}" height="{height}"/>'
    cells = []
    for number, value in enumerate(values):
        x, y = across * (number % grid), down * (number // grid)
        cells.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{across:.1f}" height="{down:.1f}" '
            f'fill="#d7191c" fill-opacity="{0.65 * value / most:.2f}"><title>{value:.3g}</title>'
            "</rect>"
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">'
        f"{picture if jpeg else ''}{''.join(cells)}</svg>"
    )


def _expected(budget: BudgetSection) -> list[str]:
    if not budget.ratios:
        return []
    rows = []
    for point in budget.ratios:
        near = [a for a in budget.accuracy if math.isclose(a.keep_ratio, point.keep_ratio)]
        answers = f"{near[0].accuracy:.0%} ({near[0].low:.0%}..{near[0].high:.0%})" if near else "-"
        rows.append(
            (
                f"{point.keep_ratio:.0%}",
                f"{point.share:.1%}",
                f"{point.per_s:.1f}",
                f"{point.score_share:.0%}",
                answers,
            )
        )
    head = ("asked for", "kept", "cells/s", "of all scores", "right answers")
    return [
        "<h2>What to expect at other shares</h2>",
        _table(head, rows),
        '<p class="note">Of all scores: how much of what the scorer finds worth a look is kept. '
        "Right answers where questions were given (--questions).</p>",
    ]


def _noise(change: ChangeSection) -> list[str]:
    found = "There is no still stretch in the footage."
    if change.still is not None:
        still = change.still
        found = (
            f"From {still.begin_s:.1f} to {still.end_s:.1f} s {_text(still.clip)} stands still: a "
            f"point of the thumbnail changes there by up to {change.noise:.2f} of 255."
        )
    return [
        "<h2>The camera's noise</h2>",
        f"<p>{found} {change.duplicate_share:.1%} of the frames are dropped as duplicates "
        f"({change.duplicate_share_before:.1%} with the usual threshold).</p>",
    ]


def _reuse(reuse: ReuseSection) -> list[str]:
    found = "Noise could not be told from motion, so no level is chosen."
    if reuse.patch_floor is not None:
        found = (
            f"Where nothing happens, a patch of what the model sees changes by up to "
            f"{reuse.patch_floor:.2f} of 255."
        )
    chosen = reuse.settings.get("reuse")
    rows = [
        (f"{each.level:g}{' (chosen)' if each.level == chosen else ''}", f"{each.share:.1%}")
        for each in reuse.shares
    ]
    return [
        "<h2>What has to be computed</h2>",
        f"<p>{found}</p>",
        _table(("reuse, in levels of 255", "cells computed in front of the scorer"), rows),
    ]


def _precisions(made: Calibration) -> list[str]:
    parts = []
    for name in ("precision", "ranges"):
        if name not in made.sections:
            continue
        notes = made.sections[name].notes
        unsafe = made.sections[name].data.get("fp16_unsafe")
        lines = [f"<li>{_text(note)}</li>" for note in notes]
        if unsafe is not None:
            verdict = ", ".join(map(str, unsafe)) or "none"
            lines.append(f"<li>Vision modules that float16 is too small for: {_text(verdict)}</li>")
        parts.append(f"<ul>{''.join(lines)}</ul>")
    return ["<h2>Precisions</h2>", *parts] if parts else []


def _alerts(section: AlertsSection) -> list[str]:
    rows = []
    for alert in section.alerts:
        low, high = alert.false_interval
        rule = ", ".join(f"{k} {v:g}" for k, v in alert.rule.items())
        rows.append(
            (
                alert.question,
                rule,
                f"{alert.noticed} of {alert.events}",
                f"{alert.false_per_h:.2f} ({low:.2f}..{high:.2f})",
                "-" if alert.delay_s is None else f"{alert.delay_s:.1f} s",
            )
        )
    head = ("alert", "rule", "noticed", "false alarms an hour, 95 %", "delay")
    wanted = f"{section.wanted_false_per_h:g}"
    return ["<h2>Alerts</h2>", f"<p>Wanted: {wanted} an hour.</p>", _table(head, rows)]


def _notes(made: Calibration) -> list[str]:
    shown = [
        f"<li>{_text(note)}</li>"
        for name, section in made.sections.items()
        if name != "precision"
        for note in section.notes
    ]
    shown += [f"<li>{_text(line)}</li>" for line in disagreements(made)]
    return ["<h2>To know</h2>", f"<ul>{''.join(shown)}</ul>"] if shown else []


def _origin(made: Calibration) -> list[str]:
    rows = []
    for name, section in made.sections.items():
        origin = section.provenance
        clips = ", ".join(f"{clip.name} ({clip.sha256[:12]})" for clip in origin.clips)
        settings = ", ".join(f"{k} {v}" for k, v in origin.settings.items())
        rows.append((name, origin.opened, settings, clips, origin.tool_version))
    head = ("section", "made with", "settings", "clips", "edge-vlm")
    return ["<h2>Where this comes from</h2>", _table(head, rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _svg(axes: Axes) -> str:
    width, height, edge = 480, 300, 44
    xs = [math.log10(p.x) if axes.is_log else p.x for p in axes.points]
    low, high = (min(xs), max(xs)) if axes.is_log else (0.0, 1.0)
    span = max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return edge + (width - 2 * edge) * (x - low) / span, edge + (height - 2 * edge) * (1 - y)

    marks = []
    for step in range(6):
        x, y = place(low + span * step / 5, step / 5)
        at = low + span * step / 5
        shown = f"{10**at:.2g}" if axes.is_log else f"{at:.0%}"
        marks.append(
            f'<line x1="{edge}" x2="{width - edge}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>'
            f'<text x="4" y="{y + 4:.0f}" font-size="11">{step / 5:.0%}</text>'
            f'<text x="{x:.0f}" y="{height - 24}" font-size="11" text-anchor="middle">'
            f"{shown}</text>"
        )
    places = [place(x, p.y) for x, p in zip(xs, axes.points, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    for x, point in zip(xs, axes.points, strict=True):
        if point.low is not None and point.high is not None:
            (px, top), (_, bottom) = place(x, point.high), place(x, point.low)
            marks.append(
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" '
                'stroke="#1f6fb2"/>'
            )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(marks)}'
        f'<polyline points="{line}" fill="none" stroke="#1f6fb2" stroke-width="2"/></svg>'
        f"<figcaption>{_text(axes.title)}; {_text(axes.x_name)}</figcaption></figure>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
