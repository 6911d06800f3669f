"""What the data side hands to the training loop: clips with their branches, here as packed rows.

A row holds several clips; a clip is a prefix (begin token, stamped frames) and the branches after
it, one for each annotation. Nothing sees another clip, branches see their own prefix and nothing of
each other (`masks`), and each begins at the position where the last frame it may see ends. `prefix`
lays the same tokens out in the other form.

A batch is built with every cell, for which cells a model keeps is known only after its scorer;
`PackedBatch.pruned` leaves the others' tokens out. A step therefore runs::

    pixels = to_pixel_values(batch.frames_FSS3, cfg.vision, dtype)
    seen = see_clips(model, pixels, batch.frames_per_clip, batch.keep_ratio, batch.min_cells, dtype)
    tokens = batch.pruned(seen.kept_FC)
    embeds = llm.embed(tokens.ids_RS)
    flat = embeds.flatten(0, 1).index_add(0, tokens.patch_places(), seen.features_GE)
    hidden, _ = llm(flat.view_as(embeds), *rope_tables(llm.cfg, tokens.positions_RS),
                    additive_mask(tokens, cfg.attention, dtype))
    # the loss: cross-entropy with target_RS where it is not IGNORED, times weight_RS

(With `Rescale.ROW` clips must be encoded one by one, or by `encode_reference(refill_by_clip=True)`,
for a pack to equal its samples: the published rule lets the clips of a call share out which frames
keep all patches as context.)

Shape letters: R rows, S tokens of a row (padded), F frames of all clips end to end, C cells of a
frame, G kept cells over all frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from edge_vlm_training.recipes.base import Form, Selection
from edge_vlm_training.world.truth import Truth

B = TypeVar("B", bound="Batch")

IGNORED = -100
"""Target of a token whose successor is not trained on (torch's default `ignore_index`)."""
NOWHERE = -1
"""Clip of padding, branch of a prefix token, cell of anything but a patch token."""


@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Rows of tokens, all [R, S]. Padding stands at a row's end: `clip` -1, `target` IGNORED."""

    ids_RS: Tensor
    """int64, 0 where padded."""
    positions_RS: Tensor
    """int64. From 0 in every clip; a branch's go on after the last frame that it sees."""
    target_RS: Tensor
    """int64: the next token where it is trained on, IGNORED elsewhere."""
    weight_RS: Tensor
    """f32 loss weight of the target, 0 where there is none."""
    clip_RS: Tensor
    """int64: number of the clip in the batch."""
    branch_RS: Tensor
    """int64: number of the branch in the batch; NOWHERE in a clip's prefix."""
    frame_RS: Tensor
    """int64: frame of the batch that a prefix token belongs to, stamp and markers included (the
    begin token: the clip's first); for a branch token the last frame that it sees."""
    vision_RS: Tensor
    """bool: patch tokens and the markers around them, which see each other both ways."""
    cell_RS: Tensor
    """int64: frame * C + cell of a patch token, NOWHERE elsewhere."""
    offset_RS: Tensor
    """int64: place of a branch token in its branch, 0 in a prefix."""

    def patch_places(self) -> Tensor:
        """Where in the flattened [R * S] the features of the kept cells belong, in their order."""
        return (self.cell_RS != NOWHERE).flatten().nonzero().squeeze(1)

    def frame_ends(self, num_frames: int) -> Tensor:
        """Where in the flattened [R * S] each frame's end marker stands: its last prefix token."""
        prefix = ((self.branch_RS == NOWHERE) & (self.clip_RS != NOWHERE)).flatten()
        places = prefix.nonzero().squeeze(1)
        last = torch.zeros(num_frames, dtype=torch.int64, device=places.device)
        return last.scatter_reduce_(0, self.frame_RS.flatten()[places], places, "amax")

    @property
    def lengths_R(self) -> Tensor:
        """int64: tokens in each row, padding not counted."""
        return (self.clip_RS != NOWHERE).sum(1)


PADDING: dict[str, int] = {
    "target_RS": IGNORED,
    "clip_RS": NOWHERE,
    "branch_RS": NOWHERE,
    "cell_RS": NOWHERE,
}
"""What padding holds where it is not 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of a training step; alone, without questions, for stages that only look."""

    frames_FSS3: Tensor
    """u8 at the model's input size, clips end to end in the order of the rows."""
    times_s_F: Tensor
    """f32: seconds from the start of its clip."""
    frames_per_clip: tuple[int, ...]
    keep_ratio: float
    """Share of the cells to keep; rows were packed to their length for this share."""
    min_cells: int
    """Cells that every later frame keeps in any case."""
    selection: Selection = "published"
    seed: int = 0
    """Of a selection that draws."""
    reuse: tuple[float, ...] = ()
    """For each clip, the threshold of change (0..255) of what is computed anew; none: all is."""
    evicted: tuple[int, ...] = ()
    """For each clip, how many frames behind its first the language model does not see: a session
    has forgotten them, though the scorer compared the next frame with the last of them."""
    gaps: tuple[int, ...] = ()
    """For each clip, how many positions what it forgot has taken: those behind it go on there."""
    clip_names: tuple[str, ...] = ()
    """Where each clip comes from, for messages."""
    branch_kinds: tuple[str, ...] = ()
    """Kind of each branch: its numbers are those of `branch_RS`."""
    truth: Truth | None = None
    """Of rendered clips, if a probe may want it."""

    def evicted_F(self) -> Tensor:
        """Bool [F]: frames that the language model does not see."""
        sizes = torch.tensor(self.frames_per_clip)
        evicted = torch.tensor(self.evicted or (0,) * len(sizes)).repeat_interleave(sizes)
        place = torch.arange(len(evicted)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return (place > 0) & (place <= evicted)

    def to(self: B, device: torch.device | str, *, non_blocking: bool = False) -> B:
        """The same batch with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("frames_FSS3", "times_s_F")
        }
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch(Batch):
    """Pictures and tokens in rows; see the module's docstring."""

    tokens: PackedTokens
    """With every cell."""

    form: Form = "rows"
    """How the language model shall read them."""

    def pruned(self, kept_FC: Tensor, pad_to: int | None = None) -> PackedTokens:
        """The tokens without those of dropped cells and evicted frames; positions close up as in a
        live session, but for `gaps`.

        `kept` is bool. Rows are padded to the longest or to `pad_to`; ValueError if that is too
        short.
        """
        everything = self.tokens
        kept = kept_FC.flatten()[everything.cell_RS.clamp(min=0)]
        stays = (everything.clip_RS != NOWHERE) & ((everything.cell_RS == NOWHERE) | kept)
        if any(self.evicted):
            asked = everything.branch_RS != NOWHERE
            evicted_F = self.evicted_F().to(kept_FC.device)
            stays &= asked | ~evicted_F[everything.frame_RS]
        lengths = stays.sum(1)
        longest = int(lengths.max())
        size = longest if pad_to is None else pad_to
        if size < longest:
            raise ValueError(f"pad_to = {pad_to}: a row has {longest} tokens")
        # Stable: what stays moves to the front in its order.
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
        real = torch.arange(order.shape[1], device=order.device) < lengths[:, None]
        columns = {}
        for field in dataclasses.fields(PackedTokens):
            fill = PADDING.get(field.name, 0)
            column = getattr(everything, field.name).gather(1, order).masked_fill(~real, fill)
            short = size - column.shape[1]
            columns[field.name] = torch.nn.functional.pad(column, (0, max(0, short)), value=fill)
        tokens = PackedTokens(**columns)
        positions = positions_of(tokens, self.frames_per_clip, self.gaps)
        return dataclasses.replace(tokens, positions_RS=positions)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        tokens = {
            f.name: getattr(self.tokens, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self.tokens)
        }
        moved = super().to(device, non_blocking=non_blocking)
        return dataclasses.replace(moved, tokens=PackedTokens(**tokens))


def positions_of(
    tokens: PackedTokens, frames_per_clip: tuple[int, ...], gaps: tuple[int, ...] = ()
) -> Tensor:
    """Positions [R, S] from what each token is: counted anew whatever was left out, with a gap
    behind the first frame of each clip where there are `gaps`.

    Relies on clips lying in the rows in the order of their frames, each with its prefix first.
    """
    device = tokens.clip_RS.device
    sizes = torch.tensor(frames_per_clip, device=device)
    first_F = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    prefix = (tokens.clip_RS != NOWHERE) & (tokens.branch_RS == NOWHERE)
    per_frame = torch.zeros(len(first_F), dtype=torch.int64, device=device)
    per_frame.index_add_(0, tokens.frame_RS[prefix], torch.ones_like(tokens.frame_RS[prefix]))
    until_F = per_frame.cumsum(0)
    before_clip_F = (until_F - per_frame)[first_F]
    inside = prefix.flatten().cumsum(0).view_as(prefix) - 1 - before_clip_F[tokens.frame_RS]
    after = (until_F - before_clip_F)[tokens.frame_RS] + tokens.offset_RS
    positions = torch.where(prefix, inside, after)
    if any(gaps):
        behind = tokens.frame_RS > first_F[tokens.frame_RS]
        positions = positions + behind * torch.tensor(gaps, device=device)[tokens.clip_RS]
    return positions.masked_fill(tokens.clip_RS == NOWHERE, 0)


class BatchStream(Protocol):
    """An endless, repeatable stream of batches.

    The state taken after batch n goes on with batch n + 1, in this or in another process; it holds
    plain numbers, strings, lists and dicts only.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for the state of another stream."""
        ...
