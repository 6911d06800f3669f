"""What `eval` says of a table before its figures are believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.notes import notes_on
from edge_vlm.evaluation.runs import SCORED_POLICIES, THRESHOLD, Run

FRAME, ALL = VisionAttention.FRAME, VisionAttention.ALL


def model(attention: VisionAttention, has_scores: bool = True) -> Any:
    refused = () if has_scores else SCORED_POLICIES
    return SimpleNamespace(
        attention=attention,
        has_scores=has_scores,
        can=lambda run: run.policy not in (*refused, THRESHOLD),
    )


def test_rows_that_a_model_cannot_have_are_named_with_the_way_out() -> None:
    runs = [Run("keep_all"), Run("stream", 0.5), Run("clip", 0.5), Run("difference", 0.5)]
    (note,) = notes_on({"torch": model(FRAME, has_scores=False)}, runs)
    assert "no rows stream, clip" in note
    assert "difference" in note
    assert "--scorer change" in note
    assert not notes_on({"torch": model(FRAME)}, runs)


def test_nothing_left_to_measure_is_an_error() -> None:
    with pytest.raises(ConfigError, match="none of these rows"):
        notes_on({"torch": model(FRAME, has_scores=False)}, [Run("stream", 0.5)])


def test_rows_with_an_attention_that_was_not_trained_are_named() -> None:
    both = [Run("keep_all", 1, FRAME), Run("keep_all", 1, ALL)]
    (note,) = notes_on({"bundle": model(ALL)}, both)
    assert "trained with attention all, rows with the other one" in note
    (note,) = notes_on({"bundle": model(ALL)}, both[:1])
    assert "every row has attention frame" in note
    assert "--attention all" in note
    assert not notes_on({"bundle": model(ALL)}, both[1:])


def test_thresholds_are_for_change_alone() -> None:
    (note,) = notes_on({"torch": model(FRAME)}, [Run("keep_all"), Run(THRESHOLD, 0.02)])
    assert "threshold" in note
