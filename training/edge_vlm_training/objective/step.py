"""Forward passes of training: frames to pixels, pixels to pruned features, packed clips to loss.

Shape letters: B clips, T frames per clip, F = B T frames, N patches, C cells, G kept cells.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.config import VisionConfig
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.selection import clip_budget
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pruning.policies import make_policy
from edge_vlm_training.data.prefix_packing import Packed
from edge_vlm_training.objective.losses import answer_loss, exact_answers, similarity_loss

CLIP = "clip"
"""The published choice of cells, over the whole clip."""
STORY_BLOCKS = 2
"""How many blocks before the last have their vision tokens read out."""


def to_pixel_values(frames: Tensor, cfg: VisionConfig, dtype: torch.dtype) -> Tensor:
    """u8 [..., S, S, 3] at the model's size to normalised patches [F, N, 3 patch^2].

    The batched torch twin of `edge_vlm.pixels.patches.to_pixel_values` without the resize.
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


def keep_mask(scores_BTC: Tensor, selection: str, removed: float, floor: int, seed: int) -> Tensor:
    """Bool [B, T, C]: `clip` (one pool a clip, as published) or a policy of `edge_vlm.pruning`.

    `floor` cells of every later frame are kept whatever their rank; `seed` is for random ones.
    """
    if removed == 0:
        return torch.ones_like(scores_BTC, dtype=torch.bool)
    if selection == CLIP:
        return clip_budget(scores_BTC, 1 - removed, floor, variant="first_whole")
    mask = torch.zeros_like(scores_BTC, dtype=torch.bool)
    for b, clip_TC in enumerate(scores_BTC.detach().float().numpy()):
        policy = make_policy(selection, 1 - removed, min_cells=floor, seed=seed + b)
        for t, row_C in enumerate(clip_TC):
            mask[b, t, policy.select(row_C, None, t == 0)] = True
    return mask


def see(
    model: VideoLM, pixels_FNP: Tensor, num_frames: int, choose: Callable[[Tensor], Tensor]
) -> Seen:
    """Scores, prunes and encodes; gradients flow wherever parameters want them.

    `choose` turns the scores [B, T, C] of the clips into the mask of kept cells.
    """
    num_cells = model.cfg.vision.num_cells
    is_first = torch.arange(len(pixels_FNP)) % num_frames == 0
    x = model.embed_frames(pixels_FNP)
    nobody = x.new_zeros(1, num_cells, x.shape[-1])
    _, scores = model.score_frames(x, nobody, is_first)
    aux = similarity_loss(scores, model.vit.cells(x), is_first)
    hidden = model.biased_block(x, scores, is_first)
    keep = choose(scores.view(-1, num_frames, num_cells))
    cell_idx = keep.flatten().nonzero().squeeze(1)
    features = model.vit_trunk(hidden, cell_idx, cell_idx // num_cells)
    return Seen(features, cell_idx, keep.sum(-1), aux)


@dataclasses.dataclass(frozen=True)
class Answered:
    """What the language model made of a packed batch."""

    loss: Tensor
    right: Tensor
    """Bool per question: its answer is exactly right."""
    hidden: list[Tensor]
    """[G, D] vision tokens behind each of `STORY_BLOCKS` blocks from the end."""
    ends: list[Tensor]
    """[F, D] end markers of the frames behind the same blocks."""


def answer(model: VideoLM, seen: Seen, packed: Packed, patch_id: int) -> Answered:
    """One pass over the videos, then all questions over their keys and values."""
    llm = model.llm
    embeds = llm.embed(packed.ids_BP)
    places = (packed.ids_BP == patch_id).flatten().nonzero().squeeze(1)
    flat = embeds.flatten(0, 1).index_add(0, places, seen.features_GE)
    ends = (packed.end_BT + torch.arange(len(embeds))[:, None] * embeds.shape[1]).flatten()
    positions = torch.arange(packed.ids_BP.shape[1])[None]
    tables = rope_tables(llm.cfg, positions)
    with _outputs(llm.blocks[-1 - STORY_BLOCKS : -1]) as outputs:
        _, video = llm(flat.view_as(embeds), *tables, packed.bias_BPP)
    logits = []
    for bucket in packed.buckets:
        past = [(_rows(k, bucket.clip_N), _rows(v, bucket.clip_N)) for k, v in video]
        tables = rope_tables(llm.cfg, bucket.positions_NL)
        hidden, _ = llm(llm.embed(bucket.ids_NL), *tables, bucket.bias_NLK, past)
        logits.append(llm.head(hidden.flatten(0, 1)[bucket.answer_index_A]))
    logits_AV = torch.cat(logits)
    target, weight, question = (
        torch.cat([getattr(bucket, name) for bucket in packed.buckets])
        for name in ("target_A", "weight_A", "question_A")
    )
    return Answered(
        answer_loss(logits_AV, target, weight),
        exact_answers(logits_AV, target, question, packed.num_questions),
        [x.flatten(0, 1)[places] for x in outputs],
        [x.flatten(0, 1)[ends] for x in outputs],
    )


def _rows(x_BPhd: Tensor, index_N: Tensor) -> Tensor:
    """Rows by number, as a product: the gradient of an indexed read is slow on a CPU."""
    choice = F.one_hot(index_N, len(x_BPhd)).to(x_BPhd.dtype)
    return (choice @ x_BPhd.flatten(1)).view(len(index_N), *x_BPhd.shape[1:])


@contextlib.contextmanager
def _outputs(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the hidden states behind `blocks` while it is open."""
    found: list[Tensor] = []
    handles = [b.register_forward_hook(lambda _m, _a, out: found.append(out[0])) for b in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
