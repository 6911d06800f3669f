"""Rotary tables: the plain ones by their definition, two side by side where blocks differ."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_vlm.config import LanguageConfig, RopeScaling
from edge_vlm.presets import molmo2_o_7b, tiny
from edge_vlm.text.rope import rope_frequencies, rope_table

SCALING = molmo2_o_7b().language.rope_scaling


def with_layers(*layers: int) -> LanguageConfig:
    """Two blocks, of which these are scaled."""
    assert SCALING is not None
    scaling = dataclasses.replace(SCALING, layers=layers) if layers else None
    return dataclasses.replace(tiny().language, rope_scaling=scaling)


def test_a_pair_of_dimensions_turns_by_its_own_frequency() -> None:
    cfg = with_layers()
    cos, sin = rope_table(cfg, 5)
    assert cos.shape == sin.shape == (5, 8) == (5, cfg.rope_width)
    assert cos.dtype == np.float32
    for position in range(5):
        for pair in range(8):
            angle = position / cfg.rope_theta ** (2 * pair / cfg.head_dim)
            assert abs(cos[position, pair] - np.cos(angle)) < 1e-6
            assert abs(sin[position, pair] - np.sin(angle)) < 1e-6


def test_two_kinds_of_blocks_have_two_tables_side_by_side() -> None:
    both, plain, scaled = with_layers(1), with_layers(), with_layers(0, 1)
    assert (both.num_rope_tables, plain.num_rope_tables, scaled.num_rope_tables) == (2, 1, 1)
    assert both.rope_width == 2 * plain.rope_width == 2 * scaled.rope_width
    for side in range(2):
        parts = [rope_table(cfg, 9)[side] for cfg in (plain, scaled)]
        np.testing.assert_array_equal(rope_table(both, 9)[side], np.concatenate(parts, -1))
    assert [both.rope_table_of(i) for i in range(2)] == [0, 1]
    assert [scaled.rope_table_of(i) for i in range(2)] == [0, 0]


def test_scaling_slows_what_turns_slowly_and_nothing_else() -> None:
    language = molmo2_o_7b().language
    angles, factors = rope_frequencies(language)
    plain, scaled = np.split(angles, 2)
    turns = 8192 * plain / (2 * np.pi)
    # The ramp begins and ends at whole dimensions, up to one beyond these bounds.
    ratio = plain / scaled
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 8, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-5).all()
    np.testing.assert_allclose(np.split(factors, 2)[0], 1)
    np.testing.assert_allclose(np.split(factors, 2)[1], 1.2079441541679836, rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"factor": 0.5}, {"layers": ()}, {"layers": (1, 1)}, {"beta_fast": 0.5}, {"layers": (2,)}],
)
def test_impossible_scaling_is_refused(wrong: dict[str, object]) -> None:
    good: dict[str, object] = {
        "factor": 8.0,
        "original_max_positions": 64,
        "attention_factor": 1.2,
        "layers": (1,),
    }
    dataclasses.replace(tiny().language, rope_scaling=RopeScaling(**good))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scaling = RopeScaling(**(good | wrong))  # type: ignore[arg-type]
        dataclasses.replace(tiny().language, rope_scaling=scaling)
