"""The plot: share of cells against threshold, and right answers against share. Pillow draws it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import MissingExtraError
from edge_vlm.formats.calibrated.budget import BudgetSection

WIDTH, HEIGHT, MARGIN = 520, 360, 56
INK, PALE, LINE, MARK = "#222222", "#dddddd", "#1f6fb2", "#c2410c"


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One diagram. `y` is a share; of `x` the logarithm is shown where `is_log`."""

    title: str
    x_name: str
    points: Sequence[Point]
    is_log: bool = False
    marked_y: float | None = None


def diagrams(section: BudgetSection) -> list[Axes]:
    found = []
    points = [Point(p.threshold, p.share) for p in section.curve if p.threshold > 0]
    if points:
        name = "change" if "change_threshold" in section.settings else "score"
        found.append(
            Axes(
                title="share of cells at or above a threshold",
                x_name=f"threshold of {name}",
                points=points,
                is_log=True,
                marked_y=section.share,
            )
        )
    if section.accuracy:
        points = [Point(p.share, p.accuracy, p.low, p.high) for p in section.accuracy]
        found.append(
            Axes(title="right answers, 95 % interval", x_name="share of cells kept", points=points)
        )
    return found


def png(section: BudgetSection) -> bytes | None:
    """A PNG of all diagrams, one below the other; None where there is nothing to draw. Raises
    MissingExtraError."""
    axes = diagrams(section)
    if not axes:
        return None
    image_module, draw_module = _pillow()
    image = image_module.new("RGB", (WIDTH, HEIGHT * len(axes)), "white")
    draw = draw_module.Draw(image)
    for number, each in enumerate(axes):
        _draw(draw, each, HEIGHT * number)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_png(section: BudgetSection, path: Path) -> bool:
    """False where there is nothing to draw."""
    data = png(section)
    if data is not None:
        path.write_bytes(data)
    return data is not None


def _draw(draw: Any, axes: Axes, top: int) -> None:
    xs = [math.log10(p.x) if axes.is_log else p.x for p in axes.points]
    low_x, high_x = (min(xs), max(xs)) if axes.is_log else (0.0, 1.0)
    span = max(high_x - low_x, 1e-9)
    inner_w, inner_h = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + inner_w * (x - low_x) / span, top + MARGIN + inner_h * (1 - y)

    draw.text((MARGIN, top + 16), axes.title, fill=INK)
    for step in range(6):
        y = place(low_x, step / 5)[1]
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], fill=PALE)
        draw.text((12, y - 6), f"{step / 5:.0%}", fill=INK)
        x_value = low_x + span * step / 5
        x = place(x_value, 0)[0]
        shown = f"{10**x_value:.2g}" if axes.is_log else f"{x_value:.0%}"
        draw.text((x - 12, top + HEIGHT - MARGIN + 6), shown, fill=INK)
    draw.text((MARGIN, top + HEIGHT - 24), axes.x_name, fill=INK)
    places = [place(x, p.y) for x, p in zip(xs, axes.points, strict=True)]
    if axes.marked_y is not None:
        y = place(low_x, axes.marked_y)[1]
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], fill=MARK)
    draw.line(places, fill=LINE, width=2)
    for x, point, (px, py) in zip(xs, axes.points, places, strict=True):
        if point.low is not None and point.high is not None:
            draw.line([place(x, point.low), place(x, point.high)], fill=LINE)
            draw.ellipse([px - 3, py - 3, px + 3, py + 3], fill=LINE)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("PIL", "ort") from error
    return Image, ImageDraw
