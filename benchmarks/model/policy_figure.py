"""Draws a table of `edge-vlm eval`, or its summary: right answers over the cells kept, as SVG.

    python -m benchmarks.model.policy_figure policies.json policies.svg

One panel for each attention, one line for each policy, bars over the 95 % intervals. Of the paths
in the table the one with the most clips is drawn, or `--path`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.summarise import Row, rows_of
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import ATTENTIONS, KEEP_ALL, POLICIES

WIDTH, HEIGHT, LEFT, TOP, GAP = 420, 330, 44, 34, 60
LEGEND = 130
COLOURS = {
    "stream": "#d62728",
    "clip": "#ff7f0e",
    "frame_topk": "#e377c2",
    "random": "#7f7f7f",
    "difference": "#2ca02c",
    "fewer_frames": "#1f77b4",
    "last_n": "#9467bd",
}


def draw(rows: Sequence[Row]) -> str:
    """An SVG picture of rows of one path. Raises ConfigError without any row."""
    if not rows:
        raise ConfigError("there is no row to draw")
    lowest = min(row["mean_interval_95"][0] for row in rows)
    floor = 10 * int(lowest // 10)
    attentions = [mode.value for mode in ATTENTIONS]
    panels = [mode for mode in attentions if any(row["attention"] == mode for row in rows)]
    width = len(panels) * (WIDTH + GAP) + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + TOP + 46}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{HEIGHT + TOP + 46}" fill="white"/>',
    ]
    for number, mode in enumerate(panels):
        own = [row for row in rows if row["attention"] == mode]
        offset = f"translate({LEFT + number * (WIDTH + GAP)} {TOP})"
        text = f'<text x="0" y="-12">attention {mode}: mean, % right</text>'
        parts.append(f'<g transform="{offset}">{text}{_panel(own, floor)}</g>')
    drawn = [
        name for name in POLICIES if name in COLOURS and any(r["policy"] == name for r in rows)
    ]
    for number, name in enumerate(drawn):
        x, y = width - LEGEND, TOP + 20 * number + 8
        parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{y}" y2="{y}" {_stroke(name)}/>')
        parts.append(f'<text x="{x + 26}" y="{y + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _stroke(policy: str) -> str:
    return f'stroke="{COLOURS[policy]}" stroke-width="2"'


def _panel(rows: Sequence[Row], floor: int) -> str:
    """Share kept 0..100 % to the right, mean `floor`..100 % upwards."""

    def x(percent: float) -> float:
        return round(percent / 100 * WIDTH, 1)

    def y(percent: float) -> float:
        return round((100 - percent) / (100 - floor) * HEIGHT, 1)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for percent in range(floor, 101, 10):
        at = y(percent)
        parts.append(f'<line x2="{WIDTH}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="-6" y="{at + 4}" text-anchor="end">{percent}</text>')
    for percent in range(0, 101, 20):
        anchored = f'x="{x(percent)}" y="{HEIGHT + 16}" text-anchor="middle"'
        parts.append(f"<text {anchored}>{percent}</text>")
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 36}" text-anchor="middle">cells kept, %</text>'
    )
    whole = [row for row in rows if row["policy"] == KEEP_ALL]
    for policy in reversed(COLOURS):  # the first one on top
        own = [row for row in rows if row["policy"] == policy]
        if not own:
            continue
        points = sorted((row["kept_percent"], row["mean_percent"]) for row in [*own, *whole])
        path = " ".join(f"{x(kept)},{y(mean)}" for kept, mean in points)
        parts.append(f'<polyline points="{path}" fill="none" {_stroke(policy)}/>')
        for row in own:
            low, high = (y(end) for end in row["mean_interval_95"])
            at = x(row["kept_percent"])
            parts.append(f'<line x1="{at}" x2="{at}" y1="{low}" y2="{high}" {_stroke(policy)}/>')
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--path", help="torch, bundle or served")
    args = parser.parse_args(argv)
    rows = rows_of(json.loads(args.table.read_text()))
    most = max(rows, key=lambda row: row["clips"])["path"] if rows else None
    chosen = [row for row in rows if row["path"] == (args.path or most)]
    args.figure.write_text(draw(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
