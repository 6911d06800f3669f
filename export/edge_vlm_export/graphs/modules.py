"""The model's parts as flat functions of tensors: what each exported graph computes.

Nothing is computed here that the model does not compute; only arguments are laid out as a graph
needs them (no lists, no batch axis) and the language model's head is applied to the wanted rows
alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from edge_vlm.formats.bundle import IMAGE_ENCODER, VIT_STEM_REUSE
from edge_vlm.formats.precision import Variant
from edge_vlm.model.images import encode_images
from edge_vlm.model.llm import PastAttention
from edge_vlm.model.ragged import Method
from edge_vlm.model.reuse import StemState, reuse_step
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_export.graphs.attention import (
    chunked_attention,
    concat_attention,
    in_place_attention,
    split_attention,
)
from edge_vlm_export.graphs.graphs import KVForm, is_chunked


class VitStemGraph(nn.Module):
    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixels: Tensor, prev_cells: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.vit_stem(pixels, prev_cells, is_first)


class EmbedGraph(nn.Module):
    """The stem of a model without scorer: nothing is dropped, so every block is the trunk's."""

    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.vit = model.vit

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit.embed(pixels)


class ChangeStemGraph(nn.Module):
    """That of a model that is scored by change, on the host: the graph gives what is scored."""

    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.change_stem(pixels)


class ReuseGraph(nn.Module):
    """The stem of one frame for its changed cells."""

    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels: Tensor,
        cell_idx: Tensor,
        is_first: Tensor,
        prev_hidden: Tensor,
        prev_cells: Tensor,
        prev_resting: Tensor,
        *kept: Tensor,
    ) -> tuple[Tensor, ...]:
        before = StemState(prev_hidden, kept[::2], kept[1::2], prev_cells, prev_resting)
        scores, now = reuse_step(self.model, pixels, cell_idx.long(), is_first, before)
        assert scores is not None
        assert now.cells_1CD is not None
        assert now.resting_1C is not None
        return (now.hidden_1ND, now.cells_1CD, scores, now.resting_1C, *_in_turn(now))


class ChangeReuseGraph(nn.Module):
    """That of a model that is scored by change."""

    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixels: Tensor,
        cell_idx: Tensor,
        prev_hidden: Tensor,
        prev_scored: Tensor,
        *kept: Tensor,
    ) -> tuple[Tensor, ...]:
        before = StemState(prev_hidden, kept[::2], kept[1::2], scored_1ND=prev_scored)
        never = cell_idx[:1] < 0  # only a learned scorer asks whether a clip begins
        _, now = reuse_step(self.model, pixels, cell_idx.long(), never, before)
        assert now.scored_1ND is not None
        return (now.hidden_1ND, now.scored_1ND, *_in_turn(now))


def _in_turn(state: StemState) -> tuple[Tensor, ...]:
    """Keys and values of each block."""
    pairs = zip(state.keys, state.values, strict=True)
    return tuple(tensor for pair in pairs for tensor in pair)


class VitTrunkGraph(nn.Module):
    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, cell_idx: Tensor, frame_id: Tensor) -> Tensor:
        return self.model.vit_trunk(hidden, cell_idx.long(), frame_id, method=Method.MASK)


class ImageEncoderGraph(nn.Module):
    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, windows: Tensor) -> Tensor:
        return encode_images(self.model, pixels, windows.long())


class LlmGraph(nn.Module):
    """`mask` is a bias [s, p + s], or a rule [2, s] for `chunked_attention`.

    Past of each layer as the cache keeps it, keys and values in turn.

    Token-major [p, h, d]: the new rows [s, h, d] come back. Head-major [1, h, C, d]: the whole
    buffer does.
    """

    def __init__(self, model: VideoLM, attention: PastAttention) -> None:
        super().__init__()
        self.llm, self.attention = model.llm, attention

    def forward(
        self,
        inputs_embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        last_idx: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        whole = self.attention is in_place_attention
        tensors = past if whole else tuple(tensor[None] for tensor in past)
        hidden, new = self.llm(
            inputs_embeds[None],
            cos[None],
            sin[None],
            mask if self.attention is chunked_attention else mask[None],
            list(zip(tensors[::2], tensors[1::2], strict=True)),
            self.attention,
        )
        logits = self.llm.head(hidden[0].index_select(0, last_idx)).float()
        return (logits, *(tensor if whole else tensor[0] for pair in new for tensor in pair))


def graph_module(
    name: str,
    model: VideoLM,
    *,
    variant: Variant = Variant.PORTABLE,
    kv_form: KVForm = KVForm.CONCAT,
) -> nn.Module:
    """The function that the graph of this name computes, for export and for comparison."""
    if name == "vit_stem":
        if model.cfg.change is not None:
            return ChangeStemGraph(model).eval()
        return (EmbedGraph(model) if model.scorer is None else VitStemGraph(model)).eval()
    if name == VIT_STEM_REUSE:
        return (ReuseGraph(model) if model.cfg.change is None else ChangeReuseGraph(model)).eval()
    if name == "vit_trunk":
        return VitTrunkGraph(model).eval()
    if name == IMAGE_ENCODER:
        return ImageEncoderGraph(model).eval()
    if is_chunked(model.cfg) and name == "llm":
        return LlmGraph(model, chunked_attention).eval()
    if variant is Variant.ORT and not is_chunked(model.cfg):
        return LlmGraph(model, in_place_attention).eval()
    joined = name == "llm" and kv_form is not KVForm.SPLIT
    return LlmGraph(model, concat_attention if joined else split_attention).eval()
