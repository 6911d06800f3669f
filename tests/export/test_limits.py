"""How many frames a bundle has room for."""

from __future__ import annotations

import dataclasses

import pytest

from edge_vlm.config import VisionAttention
from edge_vlm.formats.precision import KVLayout, Variant
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.text.prompt import RELEASED, longest_frame, longest_image
from edge_vlm_export.graphs.graphs import (
    DEFAULT_FRAMES,
    GraphLimits,
    default_limits,
    graph_specs,
    kv_layout,
)

PUBLISHED = dataclasses.replace(molmo2_4b(), scorer=None, attention=VisionAttention.ALL)


def test_frames_that_see_each_other_go_through_one_run() -> None:
    images = ImageConfig()
    limits = default_limits(PUBLISHED, frames=64, images=images, style=RELEASED)
    video = 1 + 64 * longest_frame(81)
    picture = longest_image(images, PUBLISHED.vision, RELEASED)
    assert limits.max_tokens == video + picture
    assert limits.max_past > limits.max_tokens
    spec = graph_specs(PUBLISHED, limits)["llm"]
    assert spec.dims["s"].max == limits.max_tokens
    assert not any("p+s" in tensor.shape for tensor in spec.tensors)  # nothing has all pairs


def test_without_a_word_it_has_room_for_what_the_model_was_trained_on() -> None:
    whole = graph_specs(PUBLISHED, default_limits(PUBLISHED, trained=384))["llm"].dims
    assert whole["s"].max > 384 * 88
    assert whole["p"].max == PUBLISHED.language.max_positions
    unknown = default_limits(PUBLISHED)
    assert unknown.max_tokens == 1 + DEFAULT_FRAMES * longest_frame(81)


def test_frames_that_stay_cached_need_no_longer_run() -> None:
    assert default_limits(tiny(), trained=384) == GraphLimits()
    cached = dataclasses.replace(PUBLISHED, attention=VisionAttention.FRAME)
    limits = default_limits(cached, frames=300)
    assert limits.max_tokens == GraphLimits().max_tokens
    assert limits.max_past > 300 * longest_frame(81)


def test_more_frames_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="36864 positions"):
        default_limits(PUBLISHED, frames=1000)


def test_both_variants_have_one_layout_where_attention_is_in_chunks() -> None:
    assert kv_layout(Variant.ORT, PUBLISHED) is KVLayout.TOKEN_MAJOR
    assert kv_layout(Variant.ORT, tiny()) is KVLayout.HEAD_MAJOR
