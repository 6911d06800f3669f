"""The benchmark scripts, at tiny size: what they time is the model, what they state follows from
what they measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import in_turn, speed_up
from benchmarks.model import full_size, vit_pruning
from edge_vlm.config import VisionAttention
from edge_vlm.flops import language_flops, vision_flops
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.model import prompts

CFG = vit_pruning.vision_only(tiny())
CELLS = CFG.vision.num_cells


def read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    assert isinstance(result, dict)
    return result


def test_cases_are_timed_in_turn_and_warm_ups_do_not_count() -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = in_turn(cases, rounds=3, warmups=2, device=torch.device("cpu"), say=lambda line: None)
    assert calls == ["a", "b"] * 5
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert speed_up([2.0, 8.0, 3.0], [1.0, 2.0, 1.0]) == 3.0


def test_vit_pruning_states_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    argv = ["--tiny", "--device", "cpu", "--frames", "4", "--rounds", "2", "--keep", "0.7", "0.3"]
    argv += ["--warmups", "0"]
    assert vit_pruning.main([*argv, "--out", str(path)]) == 0
    result = read(path)
    assert result["command"] == " ".join(["python -m benchmarks.model.vit_pruning", *argv])
    assert {"device", "threads", "torch", "dtype", "edge_vlm"} <= result.keys()
    whole = vision_flops(dataclasses.replace(CFG, scorer=None), [CELLS] * 4)
    base = result["cases"]["unpruned"]["rounds_s"]
    for ratio in (0.7, 0.3):
        case = result["cases"][f"keep {ratio:g}"]
        cells = case["cells_per_frame"]
        assert cells[0] == CELLS
        assert sum(cells) == max(round(ratio * 4 * CELLS), CELLS)
        bound = whole / vision_flops(CFG, cells)
        measured = statistics.median(a / b for a, b in zip(base, case["rounds_s"], strict=True))
        assert case["bound"] == pytest.approx(bound, abs=1e-3)
        assert bound > 1
        assert case["speed_up"] == pytest.approx(measured, rel=0.05, abs=1e-3)
        assert case["share_of_bound"] == pytest.approx(case["speed_up"] / bound, abs=2e-3)
    assert "keep 0.7" in capsys.readouterr().out


def test_processor_time_is_for_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--tiny", "--frames", "2", "--rounds", "1", "--clock", "processor", "--out", str(path)]
    assert vit_pruning.main([*argv, "--device", "cpu"]) == 0
    assert read(path)["clock"] == "processor"
    with pytest.raises(SystemExit):
        vit_pruning.main([*argv, "--device", "cuda"])


def test_unpruned_is_the_model_without_a_scorer() -> None:
    model = VideoLM(CFG).init_weights(torch.Generator().manual_seed(0))
    plain = VideoLM(dataclasses.replace(CFG, scorer=None))
    plain.load_state_dict(model.state_dict(), strict=False)
    pixels = torch.randn(3, CFG.vision.num_patches, CFG.vision.patch_dim)
    with torch.no_grad():
        expected = encode_clips(plain, pixels, [3], keep_ratio=1.0).features_GE
        found = vit_pruning.encode_unpruned(model, pixels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_published_packing_saves_nothing_on_even_frames() -> None:
    """At 70 % kept no two frames share a row; at half of them two do."""
    frames = 6
    whole = vision_flops(dataclasses.replace(CFG, scorer=None), [CELLS] * frames)
    even, rows = vit_pruning.published_flops(CFG, [round(0.7 * CELLS)] * frames)
    assert rows == frames
    assert even > whole
    half, rows = vit_pruning.published_flops(CFG, [CELLS // 2] * frames)
    assert rows == frames // 2
    assert half < even


def test_full_size_states_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    argv = ["--tiny", "--clips", "2x3", "--removed", "0", "0.5", "--answer", "3"]
    argv += ["--rounds", "2", "--warmups", "1", "--out", str(path)]
    assert full_size.main(argv) == 0
    (workload,) = read(path)["workloads"]
    unpruned, pruned = workload["cases"]["removed 0"], workload["cases"]["removed 0.5"]
    overhead = 1 + full_size.QUESTION_TOKENS + 3 * (full_size.STAMP_TOKENS + 2)
    half = round(0.5 * 3 * CELLS)
    assert (unpruned["cells_kept"], pruned["cells_kept"]) == (2 * 3 * CELLS, 2 * half)
    assert pruned["prompt_tokens"] == overhead + half
    cfg = dataclasses.replace(tiny(), scorer=None)
    flops = vision_flops(cfg, [CELLS] * 6) + 2 * language_flops(
        cfg.language, unpruned["prompt_tokens"]
    )
    assert unpruned["tflop_to_first_logits"] == pytest.approx(flops / 1e12, abs=1e-4)
    assert unpruned["first_logits_s"]["speed_up"] == 1.0
    for case in (unpruned, pruned):
        assert len(case["vision_s"]["rounds_s"]) == 2
        for vision, first, answered in zip(
            *(case[name]["rounds_s"] for name in ("vision_s", "first_logits_s", "answered_s")),
            strict=True,
        ):
            assert 0 < vision < first < answered
    assert "2 x 3 frames" in capsys.readouterr().out


@pytest.mark.parametrize("attention", VisionAttention)
def test_the_mask_is_the_model_s(attention: VisionAttention) -> None:
    rows = [full_size.prompt_blocks(cells, attention) for cells in ([2, 1, 3], [3, 0, 3])]
    bias = full_size.attention_bias(torch.tensor(rows), torch.float32)
    for row, mine in zip(rows, bias, strict=True):
        assert torch.equal(mine[None], prompts.attention_bias(row, 0, len(row)))
    assert sum(full_size.prompt_patches([2, 1, 3])) == 6


def test_full_size_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        full_size.main([])
