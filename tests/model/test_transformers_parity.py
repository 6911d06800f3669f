"""Same weights, same tokens, same logits as transformers' own Molmo2, in all three variants."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from edge_vlm.config import LanguageConfig, ModelConfig, RopeScaling
from edge_vlm.model.published.mapping import to_ours, to_published
from edge_vlm.model.published.names import TRANSFORMERS
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.rope import rope_table
from tests.model.peers import (
    TOLERANCE,
    largest,
    load_ours,
    our_greedy,
    our_logits,
    peer_config,
    peer_logits,
    random_peer,
    text_prompt,
    variant,
    video_prompt,
)
from tests.model.published.image_prompts import one_image_prompt, several_images_prompt

STEPS = 32
VARIANTS = ("4b", "8b", "o-7b")
PROMPTS = {
    "text": text_prompt,
    "video": video_prompt,
    "one image": one_image_prompt,
    "several images": several_images_prompt,
}


@dataclasses.dataclass(frozen=True)
class Pair:
    cfg: ModelConfig
    peer: Any
    ours: VideoLM


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    cfg = variant(request.param)
    peer = random_peer(cfg)
    return Pair(cfg, peer, load_ours(cfg, to_ours(TRANSFORMERS, cfg, peer.state_dict())))


@pytest.mark.parametrize("kind", PROMPTS)
def test_prefill_equals_transformers(pair: Pair, kind: str) -> None:
    prompt = PROMPTS[kind](pair.cfg)
    theirs, mine = peer_logits(pair.peer, prompt), our_logits(pair.ours, prompt)
    assert theirs.std() > 0.1
    assert largest(theirs - mine) <= TOLERANCE


@pytest.mark.parametrize("kind", PROMPTS)
def test_greedy_decoding_equals_transformers(pair: Pair, kind: str) -> None:
    """Token by token from a cache, against `generate`."""
    prompt = PROMPTS[kind](pair.cfg)
    theirs = pair.peer.generate(
        **prompt.peer_inputs(),
        do_sample=False,
        max_new_tokens=STEPS,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = theirs.sequences[0, len(prompt.ids) :].tolist()
    tokens, rows = our_greedy(pair.ours, prompt, STEPS)
    assert tokens == expected
    assert len(expected) == STEPS
    assert len(set(expected)) > 2, "a constant answer would compare nothing"
    assert largest(rows - torch.cat(theirs.logits)) <= TOLERANCE


def test_the_comparison_sees_a_wrong_mask(pair: Pair) -> None:
    """Markers taken for text, or frames kept apart: each must show."""
    prompt = video_prompt(pair.cfg)
    theirs = peer_logits(pair.peer, prompt)
    markers_as_text = torch.where(prompt.is_patch, 0, -1).tolist()
    frames_apart = torch.where(prompt.is_vision, prompt.is_start.cumsum(0), -1).tolist()
    for blocks in (markers_as_text, frames_apart):
        assert largest(theirs - our_logits(pair.ours, prompt, blocks)) > 10 * TOLERANCE


def test_the_comparison_sees_wrong_windows(pair: Pair) -> None:
    """Padding taken for a patch, or the views in the other order: each must show."""
    prompt = one_image_prompt(pair.cfg)
    theirs = peer_logits(pair.peer, prompt)
    for windows in (prompt.windows.clamp(min=0), prompt.windows.roll(1, 0)):
        wrong = dataclasses.replace(prompt, windows=windows)
        assert largest(theirs - our_logits(pair.ours, wrong)) > 10 * TOLERANCE


SCALING = variant("o-7b").language.rope_scaling
assert SCALING is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"post_norm": False},
        {"rope_scaling": None},
        {"rope_scaling": dataclasses.replace(SCALING, layers=(0, 2))},
        {"rope_scaling": dataclasses.replace(SCALING, layers=(0, 1, 2, 3))},
        {"rope_scaling": dataclasses.replace(SCALING, attention_factor=1.0)},
        {"rope_scaling": dataclasses.replace(SCALING, original_max_positions=512)},
    ],
    ids=["pre-norm", "plain", "other-layers", "all-layers", "factor-1", "other-length"],
)
def test_the_comparison_sees_a_wrong_olmo(wrong: dict[str, Any]) -> None:
    """Settings that fit the same weights: only the answers can tell them apart."""
    cfg = variant("o-7b")
    peer, prompt = random_peer(cfg), text_prompt(cfg)
    other = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, **wrong))
    model = load_ours(other, to_ours(TRANSFORMERS, cfg, peer.state_dict()))
    assert largest(peer_logits(peer, prompt) - our_logits(model, prompt)) > 10 * TOLERANCE


def test_our_weights_load_back(pair: Pair) -> None:
    theirs = pair.peer.state_dict()
    back = to_published(TRANSFORMERS, pair.cfg, to_ours(TRANSFORMERS, pair.cfg, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("original", [8192, 32])
def test_scaled_rotations_equal_transformers(original: int, truncate: bool) -> None:
    """At the published head width, also where the ramp between the two kinds is empty."""
    language = LanguageConfig(
        width=256,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=128,
        mlp_width=8,
        base_vocab=8,
        extra_vocab=0,
        rope_theta=5e5,
        max_positions=65_536,
        rope_scaling=RopeScaling(
            factor=8.0,
            original_max_positions=original,
            attention_factor=1.2079441541679836,
            layers=(3,),
            truncate=truncate,
        ),
    )
    cfg = dataclasses.replace(variant("o-7b"), language=language)
    tables = _their_tables(peer_config(cfg), 2048)
    assert language.rope_width == 128
    for mine, theirs in zip(rope_table(language, 2048), tables, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=3e-4)


def _their_tables(config: Any, num_positions: int) -> list[np.ndarray]:
    from transformers.models.molmo2.modeling_molmo2 import Molmo2RotaryEmbedding

    positions, like = torch.arange(num_positions)[None], torch.zeros(1)
    kinds = [Molmo2RotaryEmbedding(config.text_config, scaled=s) for s in (False, True)]
    pairs = [kind(like, positions) for kind in kinds]
    # They repeat each angle for the second half of a head.
    return [np.concatenate([pair[i][0].numpy()[:, :64] for pair in pairs], -1) for i in range(2)]
