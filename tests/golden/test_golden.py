"""Our vision side against recorded outputs of the published STTS code (see compare.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edge_vlm.config import ConnectorConfig, Rescale, ScorerConfig
from edge_vlm.model.published.mapping import to_published
from edge_vlm.model.published.names import STTS
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.golden.compare import PRUNE_AT, TOLERANCE, VIDEO, differences, main, read
from tests.model import literal_reference

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_outputs_are_met(path: Path) -> None:
    found = differences(path)
    assert {"scores", "features", "hidden.3", "hidden.4", "hidden.5", "hidden.7"} <= found.keys()
    assert all(difference <= TOLERANCE for difference in found.values()), found


def test_scorer_gradients_are_among_them() -> None:
    tensors, metadata = read(next(path for path in FILES if path.stem == "train"))
    assert metadata["train"] == "True"
    assert sum(name.startswith("grad.") for name in tensors) == 14


def test_a_difference_fails_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = read(next(path for path in FILES if path.stem == "k50"))
    tensors["output.features"][3, 5] += 1e-3
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged, metadata)
    assert main([str(damaged)]) == 1
    assert "above 0.0001" in capsys.readouterr().out


COUNTS, REMOVED = (5, 1, 6), 0.4


@pytest.fixture(scope="module")
def several_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published code would record it for three clips in one pack.

    No recorded file of that kind lies here, so it is made with the published computation written
    out, previous frames across clips included.
    """
    small = tiny()
    cfg = dataclasses.replace(
        small,
        vision=dataclasses.replace(small.vision, num_layers=8, feature_layers=(7, 4)),
        scorer=ScorerConfig(
            prune_at=PRUNE_AT, num_heads=2, head_dim=16, mlp_width=40, rescale=Rescale.ROW
        ),
        connector=ConnectorConfig(width=32, num_heads=2, head_dim=16, mlp_width=56),
    )
    generator = torch.Generator().manual_seed(0)
    model = VideoLM(cfg).init_weights(generator)
    shape = (sum(COUNTS), cfg.vision.num_patches, cfg.vision.patch_dim)
    pixels = torch.randn(shape, generator=generator)
    with torch.no_grad():
        run = literal_reference.encode(model, pixels, COUNTS, REMOVED, previous_across_clips=True)
    vision = {k: v for k, v in model.state_dict().items() if not k.startswith("llm.")}
    tensors = {f"weight.{k}": v for k, v in to_published(STTS, cfg, vision).items()}
    tensors |= {
        "input.images": pixels[None],
        "input.num_images": torch.tensor([COUNTS]),
        "input.multimodal_type": torch.full((1, len(COUNTS)), VIDEO),
        "output.scores": run.scores_FC,
        "output.kept_groups": run.kept_FC.flatten(),
        "output.features": run.features,
        "output.valid_patches": literal_reference.to_patches(run.kept_FC.float()).flatten(1).bool(),
        **{f"output.hidden.{i}": run.hidden[i] for i in (3, 4, 5, 7)},
    }
    path = tmp_path_factory.mktemp("recorded") / "several.safetensors"
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"topk": str(REMOVED), "T": str(len(pixels)), "seed": "0"})
    return path


@pytest.mark.parametrize("counts", [None, str(list(COUNTS))])
def test_several_clips_in_a_pack_are_met(
    several_clips: Path, tmp_path: Path, counts: str | None
) -> None:
    """Their lengths are read from the metadata or from the number of pictures."""
    tensors, metadata = read(several_clips)
    path = tmp_path / "named.safetensors"
    save_file(tensors, path, metadata if counts is None else {**metadata, "counts": counts})
    assert len(tensors["output.features"]) > 0
    assert main([str(path)]) == 0


def test_other_clip_boundaries_fail_the_comparison(several_clips: Path, tmp_path: Path) -> None:
    tensors, metadata = read(several_clips)
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, {**metadata, "counts": str([6, 6])})
    found = differences(path)
    assert found["scores"] <= TOLERANCE  # the published code does not look at boundaries there
    assert found["features"] > TOLERANCE
    assert found["kept_groups"] > 0
