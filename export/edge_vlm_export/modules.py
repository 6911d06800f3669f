"""The model's parts as flat functions of tensors: what each exported graph computes.

Nothing is computed here that the model does not compute; only arguments are laid out as a graph
needs them (no lists, no batch axis) and the language model's head is applied to the wanted rows
alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from edge_vlm.model.ragged import Method
from edge_vlm.model.video_lm import VideoLM


class VitStemGraph(nn.Module):
    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixels: Tensor, prev_cells: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.vit_stem(pixels, prev_cells, is_first)


class VitTrunkGraph(nn.Module):
    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, cell_idx: Tensor, frame_id: Tensor) -> Tensor:
        return self.model.vit_trunk(hidden, cell_idx.long(), frame_id, method=Method.MASK)


class LlmGraph(nn.Module):
    """Token-major past [p, h, d] per layer, as the arena keeps it: keys and values in turn."""

    def __init__(self, model: VideoLM) -> None:
        super().__init__()
        self.llm = model.llm

    def forward(
        self,
        inputs_embeds: Tensor,
        cos: Tensor,
        sin: Tensor,
        attn_bias: Tensor,
        last_idx: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        pairs = [(past[i][None], past[i + 1][None]) for i in range(0, len(past), 2)]
        hidden, new = self.llm(inputs_embeds[None], cos[None], sin[None], attn_bias[None], pairs)
        logits = self.llm.head(hidden[0].index_select(0, last_idx)).float()
        return (logits, *(tensor[0] for pair in new for tensor in pair))


GRAPH_MODULES: dict[str, type[nn.Module]] = {
    "vit_stem": VitStemGraph,
    "vit_trunk": VitTrunkGraph,
    "llm": LlmGraph,
}
