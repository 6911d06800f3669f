"""The page and the plot: everything the file says, and nothing of it as markup."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edge_vlm.formats.calibrated.budget import AccuracyPoint, ClipShare, CurvePoint, RatioPoint
from edge_vlm.formats.calibration import Calibration
from edge_vlm.pixels.frames import decode_picture
from edge_vlm_calibration.telling.plot import HEIGHT, WIDTH, png
from edge_vlm_calibration.telling.report import write_report
from edge_vlm_calibration.telling.text import summary
from tests.edge_vlm.formats.test_calibration_file import BUDGET, CHANGE, MODEL, PROVENANCE

FULL = dataclasses.replace(
    BUDGET,
    clips=(
        ClipShare(
            name="<b>door</b>.mp4",
            frames=20,
            duplicates=3,
            seconds=10.0,
            predicted_share=0.41,
            predicted_per_s=13.0,
            measured_share=0.42,
            measured_frames=20,
            expected_share=0.41,
        ),
    ),
    curve=tuple(CurvePoint(threshold=0.01 * i, share=1 / i) for i in range(1, 20)),
    ratios=(RatioPoint(keep_ratio=0.5, share=0.5, per_s=16.0, score_share=0.83),),
    accuracy=(
        AccuracyPoint(keep_ratio=0.5, share=0.5, accuracy=0.9, low=0.8, high=0.95, asked=33),
    ),
    kept_map=tuple(i / 16 for i in range(16)),
    score_map=(0.1,) * 16,
)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def made() -> Calibration:
    whole = Calibration(model=MODEL).with_section(FULL, PROVENANCE, ["1 < 2 & a note"])
    return whole.with_section(CHANGE, PROVENANCE)


def test_the_page_says_it_all_and_needs_nothing_else(made: Calibration, tmp_path: Path) -> None:
    write_report(made, {}, tmp_path / "report.html", 2.0)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    for words in ("<b>door</b>.mp4", "41.0%", "42.0%", "83%", "90% (80%..95%)", "1 < 2 & a note"):
        assert words in page.words, words
    assert "b" not in page.tags
    assert "script" not in page.tags
    assert page.tags.count("rect") == 2 * 16
    assert page.tags.count("polyline") == 2
    assert all(source.startswith("data:") for source in page.sources)


def test_the_plot_is_a_picture(made: Calibration) -> None:
    data = png(FULL)
    assert data is not None
    assert decode_picture_size(data) == (2 * HEIGHT, WIDTH)
    assert png(BUDGET) is None


def decode_picture_size(data: bytes) -> tuple[int, int]:
    height, width, _ = decode_picture(data).shape
    return height, width


def test_what_is_printed_names_clips_shares_and_notes(made: Calibration) -> None:
    text = summary(made, ("change", "budget"))
    for words in ("<b>door</b>.mp4", "42.0% (20 frames)", "note: 1 < 2", "payback_frames 32"):
        assert words in text
    assert "[change]" not in summary(made, ("budget",))
