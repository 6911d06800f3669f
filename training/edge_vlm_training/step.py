"""Forward passes of training: frames to pixels, pixels to pruned features, packed clips to loss.

Shape letters: B clips, T frames per clip, F = B T frames, N patches, C cells, G kept cells.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edge_vlm.config import VisionConfig
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.losses import answer_loss, exact_answers, similarity_loss
from edge_vlm_training.packing import Packed
from edge_vlm_training.selection import clip_budget


def to_pixel_values(frames: Tensor, cfg: VisionConfig, dtype: torch.dtype) -> Tensor:
    """u8 [..., S, S, 3] at the model's size to normalised patches [F, N, 3 patch^2].

    The batched torch twin of `edge_vlm.patches.to_pixel_values` without the resize.
    """
    grid, side = cfg.patch_grid, cfg.patch_size
    x = frames.reshape(-1, grid, side, grid, side, 3).permute(0, 1, 3, 2, 4, 5)
    return (x.reshape(-1, grid * grid, cfg.patch_dim).to(dtype) / 127.5) - 1.0


@dataclasses.dataclass(frozen=True)
class Seen:
    """A batch of clips behind the vision side."""

    features_GE: Tensor
    cell_idx_G: Tensor
    """Frame * C + cell of each feature."""
    counts_BT: Tensor
    aux_loss: Tensor


def see(model: VideoLM, pixels_FNP: Tensor, num_frames: int, removed: float, floor: int) -> Seen:
    """Scores, prunes by clip budget and encodes; gradients flow wherever parameters want them."""
    num_cells = model.cfg.vision.num_cells
    is_first = torch.arange(len(pixels_FNP)) % num_frames == 0
    x = model.embed_frames(pixels_FNP)
    nobody = x.new_zeros(1, num_cells, x.shape[-1])
    _, scores = model.score_frames(x, nobody, is_first)
    aux = similarity_loss(scores, model.vit.cells(x), is_first)
    hidden = model.biased_block(x, scores, is_first)
    keep = clip_budget(scores.view(-1, num_frames, num_cells), removed, floor)
    cell_idx = keep.flatten().nonzero().squeeze(1)
    features = model.vit_trunk(hidden, cell_idx, cell_idx // num_cells, grouped=True)
    return Seen(features, cell_idx, keep.sum(-1), aux)


def answer(model: VideoLM, seen: Seen, packed: Packed, patch_id: int) -> tuple[Tensor, Tensor]:
    """Language loss, and for every question whether its answer is exactly right."""
    llm = model.llm
    embeds = llm.embed(packed.ids_BP)
    places = (packed.ids_BP == patch_id).flatten().nonzero().squeeze(1)
    flat = embeds.flatten(0, 1).index_add(0, places, seen.features_GE)
    positions = torch.arange(packed.ids_BP.shape[1])[None]
    _, video = llm(flat.view_as(embeds), *rope_tables(llm.cfg, positions), packed.bias_BPP)
    logits = []
    for bucket in packed.buckets:
        past = [
            (k.index_select(0, bucket.clip_N), v.index_select(0, bucket.clip_N)) for k, v in video
        ]
        tables = rope_tables(llm.cfg, bucket.positions_NL)
        hidden, _ = llm(llm.embed(bucket.ids_NL), *tables, bucket.bias_NLK, past)
        logits.append(llm.head(hidden.flatten(0, 1)[bucket.answer_index_A]))
    logits_AV = torch.cat(logits)
    target, weight, question = (
        torch.cat([getattr(bucket, name) for bucket in packed.buckets])
        for name in ("target_A", "weight_A", "question_A")
    )
    loss = answer_loss(logits_AV, target, weight)
    return loss, exact_answers(logits_AV, target, question, packed.num_questions)
