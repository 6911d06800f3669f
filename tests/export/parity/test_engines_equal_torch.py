"""The whole path at once: a clip streamed through the engines equals torch on the whole clip."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edge_vlm.errors import MissingExtraError
from edge_vlm.pixels.frames import Frame
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.policies import FrameTopK
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.tiny import tiny_bundle, tiny_checkpoint


def test_a_streamed_clip_equals_torch_on_the_whole_clip() -> None:
    torch = pytest.importorskip("torch")
    from edge_vlm.model.checkpoint import load_checkpoint
    from edge_vlm.model.llm import rope_tables

    rng = np.random.default_rng(11)
    frames = [
        Frame(rgb=rng.integers(0, 256, (48, 40, 3), dtype=np.uint8), pts_ns=i * 5 * 10**8, seq=i)
        for i in range(5)
    ]
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        vision, lm, prompt = engines.vision, engines.language, engines.prompt
        arena, state, policy = lm.new_arena(200), vision.new_state(), FrameTopK(0.5)
        lm.prefill(arena, lm.embed(prompt.bos_ids))
        kept, ids, blocks = [], [prompt.bos_ids], [np.array([-1])]
        for i, frame in enumerate(frames):
            tokens = vision.encode(frame, state, policy)
            frame_ids = prompt.frame_ids(frame.pts_ns / 1e9, len(tokens.cells), first=i == 0)
            is_vision = prompt.vision_mask(frame_ids)
            lm.prefill(arena, lm.embed(frame_ids, tokens.embeds), np.where(is_vision, i, -1))
            kept.append(tokens)
            ids.append(frame_ids)
            blocks.append(np.where(is_vision, i, -1))
        question = prompt.question_ids("how many cars are there now ?")
        logits = lm.prefill(arena, lm.embed(question))
        ids.append(question)
        blocks.append(np.full(len(question), -1))

    model = load_checkpoint(tiny_checkpoint())
    cfg = model.cfg
    pixels = torch.from_numpy(np.stack([to_pixel_values(f.rgb, cfg.vision) for f in frames]))
    prev = torch.zeros(1, cfg.vision.num_cells, cfg.vision.width)
    is_first = torch.arange(len(frames)) == 0
    cell_idx = np.concatenate([t.cells + i * cfg.vision.num_cells for i, t in enumerate(kept)])
    frame_id = np.repeat(np.arange(len(frames)), [len(t.cells) for t in kept])
    all_ids = torch.from_numpy(np.concatenate(ids)).long()
    block = torch.from_numpy(np.concatenate(blocks))
    s = len(all_ids)
    visible = torch.ones(s, s).tril().bool()
    visible |= (block[:, None] == block[None, :]) & (block[:, None] >= 0)
    with torch.no_grad():
        hidden, _, scores = model.vit_stem(pixels, prev, is_first)
        features = model.vit_trunk(
            hidden, torch.from_numpy(cell_idx).long(), torch.from_numpy(frame_id).long()
        )
        embeds = model.llm.embed(all_ids)
        embeds[all_ids == prompt.patch_id] += features
        cos, sin = rope_tables(cfg.language, torch.arange(s))
        bias = torch.where(visible, 0.0, -30_000.0)
        states, _ = model.llm(embeds[None], cos[None], sin[None], bias[None])
        expected = model.llm.head(states[0, -1]).numpy()

    for tokens, row in zip(kept, scores.numpy(), strict=True):
        np.testing.assert_allclose(tokens.scores, row, atol=1e-5)
    np.testing.assert_allclose(
        np.concatenate([t.embeds for t in kept]), features.numpy(), atol=1e-5, rtol=1e-4
    )
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-4)
    assert 0 < len(cell_idx) < len(frames) * cfg.vision.num_cells


def test_without_onnxruntime_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"edge-vlm\[ort\]"):
        LoadedBundle.open(tiny_bundle())
