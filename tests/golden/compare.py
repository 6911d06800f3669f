"""Compares our vision side with recorded outputs of the published STTS code.

    python tests/golden/compare.py FILE.safetensors...

prints the largest absolute difference of every recorded output and exits with 1 if one of them is
above 1e-4 (or, for boolean outputs, if any element differs).

A file holds `weight.*` (names of the training repository), `input.images` [1, F, N, P],
`input.num_images` and `input.multimodal_type` [1, clips], `output.*`, and for a training step
`grad.*`; its metadata holds `topk`, the share of cells removed, and `counts`, the frames of each
clip, where several share the pack.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    ROOT = Path(__file__).parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "training")]

import torch
from safetensors import safe_open
from torch import Tensor

from edge_vlm.config import (
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    Rescale,
    ScorerConfig,
    VisionConfig,
)
from edge_vlm.model.published.mapping import to_ours, to_published
from edge_vlm.model.published.names import STTS
from edge_vlm.model.reference import ReferenceEncoding, encode_reference
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.objective.losses import similarity_errors

TOLERANCE = 1e-4
AUX_COEFFICIENT = 0.5  # sim_reg_loss_coefficient of the published code
HEAD_DIM = 16  # of every attention in these files; it cannot be read from the shapes
PRUNE_AT = 3
VIDEO = 2  # multimodal_type


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def config_of(weights: dict[str, Tensor], num_patches: int) -> ModelConfig:
    """The recorded model's shape; its language side is the smallest that fits the projector."""
    blocks = [name for name in weights if name.endswith("attention.wq.weight")]
    width, patch_dim = weights["image_vit.patch_embedding.weight"].shape
    patch_size = round((patch_dim / 3) ** 0.5)
    projector, pooled = weights["image_projector.w1.weight"].shape
    return ModelConfig(
        vision=VisionConfig(
            image_size=patch_size * round(num_patches**0.5),
            patch_size=patch_size,
            width=width,
            num_heads=width // HEAD_DIM,
            head_dim=HEAD_DIM,
            mlp_width=weights["image_vit.transformer.resblocks.0.feed_forward.w1.bias"].numel(),
            num_layers=len(blocks),
            feature_layers=(len(blocks) - 1, len(blocks) - 4),
        ),
        scorer=ScorerConfig(
            prune_at=PRUNE_AT,
            num_heads=width // HEAD_DIM,
            head_dim=HEAD_DIM,
            mlp_width=weights["image_vit.transformer.temporal_token_scorer.mlp.w1.bias"].numel(),
            rescale=Rescale.ROW,
        ),
        connector=ConnectorConfig(
            width=pooled, num_heads=pooled // HEAD_DIM, head_dim=HEAD_DIM, mlp_width=projector
        ),
        language=LanguageConfig(
            width=weights["image_projector.w2.weight"].shape[0],
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            mlp_width=8,
            base_vocab=8,
            extra_vocab=0,
            rope_theta=1e4,
            max_positions=8,
        ),
    )


def build(weights: dict[str, Tensor], num_patches: int) -> VideoLM:
    cfg = config_of(weights, num_patches)
    model = VideoLM(cfg)
    vision = to_ours(STTS, cfg, weights)
    left = model.load_state_dict(vision, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("llm.") for name in left.missing_keys)
    return model


def recorded_outputs(run: ReferenceEncoding, model: VideoLM) -> dict[str, Tensor]:
    alive_FN = model.vit.spread(run.kept_FC.float()).bool()
    outputs = {
        "scores": run.scores_FC,
        "valid_patches": alive_FN,
        "kept_groups": run.kept_FC.flatten(),
        "features": run.features_GE,
    }
    return outputs | {f"hidden.{i}": hidden for i, hidden in run.hidden_FND.items()}


def differences(path: Path) -> dict[str, float]:
    """Largest absolute difference per recorded output; infinity where the shape is another."""
    tensors, metadata = read(path)
    if bool((tensors["input.multimodal_type"] != VIDEO).any()):
        raise SystemExit(f"{path}: only packs of videos are compared")
    pixels = tensors["input.images"].flatten(0, 1)
    frames_per_clip = [int(count) for count in re.findall(r"\d+", metadata.get("counts", ""))]
    if sum(frames_per_clip) != len(pixels):
        frames_per_clip = [int(count) for count in tensors["input.num_images"].flatten() if count]
    model = build(below(tensors, "weight."), pixels.shape[1])
    training = metadata.get("train") == "True"
    with torch.set_grad_enabled(training):
        run = encode_reference(
            model,
            pixels,
            frames_per_clip,
            keep_ratio=1 - float(metadata["topk"]),
            previous_across_clips=True,
        )
        ours = recorded_outputs(run, model)
        ours["aux_loss"] = torch.zeros(1)
        if training:
            first = torch.arange(len(pixels)) == 0
            cells = model.vit.cells(run.hidden_FND[PRUNE_AT])
            errors = similarity_errors(run.scores_FC, cells, first, detach_target=False)
            aux = errors.mean()
            ours["aux_loss"] = AUX_COEFFICIENT * aux[None]
            ours["loss"] = ours["aux_loss"] + run.features_GE.square().mean()
    found = {
        name: distance(ours[name], recorded) for name, recorded in below(tensors, "output.").items()
    }
    gradients = below(tensors, "grad.")
    if gradients:
        model.zero_grad()
        ours["loss"].sum().backward()
        vision = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
            if not name.startswith("llm.")
        }
        mine = to_published(STTS, model.cfg, vision)
        found |= {f"grad {name}": distance(mine[name], t) for name, t in gradients.items()}
    return found


def distance(ours: Tensor, recorded: Tensor) -> float:
    if ours.shape != recorded.shape:
        return math.inf
    if recorded.numel() == 0:
        return 0.0
    largest = (ours.detach().double() - recorded.double()).abs().max().item()
    return largest if math.isfinite(largest) else math.inf


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    worst = 0.0
    for path in paths:
        print(path)
        for name, difference in differences(Path(path)).items():
            worst = max(worst, difference)
            mark = "" if difference <= TOLERANCE else f"   above {TOLERANCE:g}"
            print(f"  {name:<80} {difference:.2e}{mark}")
    print(f"largest difference {worst:.2e}, tolerance {TOLERANCE:g}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
