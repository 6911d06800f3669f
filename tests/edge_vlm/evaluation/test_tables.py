from __future__ import annotations

import pytest

from edge_vlm.console.tables import columns, markdown

ROWS = [("name", "right", "of"), ("colour", "7", "12"), ("", "100", "")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert columns(ROWS, "<>") == ["name    right  of", "colour      7  12", "          100"]
    assert columns([("a", "b")]) == ["a  b"]
    assert columns([]) == []


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        columns([("a", "b"), ("a",)])


def test_markdown_says_on_which_side_figures_stand() -> None:
    assert markdown(ROWS[:2], "<>") == [
        "| name | right | of |",
        "| --- | ---: | ---: |",
        "| colour | 7 | 12 |",
    ]
