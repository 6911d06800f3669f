"""Frozen linear layers with a trained low-rank product beside them (LoRA, arXiv 2106.09685).

Shape letters: r rank, I width of what goes in, O of what comes out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.video_lm import VideoLM

Target = Literal["q", "k", "v", "o", "gate", "up", "down", "fc1", "fc2"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""The matrices of a block: of attention, of the language model's MLP and of the vision side's."""
DOWN, UP = "lora_A", "lora_B"
"""The two factors, as peft calls them."""
_MATRIX = re.compile(r"((?:llm|vit)\.blocks\.\d+\.(?:\w+\.)?(\w+))\.weight")


class LoraLinear(nn.Module):
    """`base(x) + alpha / rank * up(down(x))`; `up` starts at zero, so nothing changes at first."""

    def __init__(
        self, base: nn.Module, sizes: tuple[int, int], rank: int, alpha: float, rng: torch.Generator
    ) -> None:
        """`sizes` are those of the base's matrix, [O, I]; the two factors are float32."""
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, sizes[1]))
        self.lora_B = nn.Parameter(torch.zeros(sizes[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, math.sqrt(5), generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(x, self.lora_A), self.lora_B)
        out: Tensor = self.base(x) + self.scale * added
        return out


def block_matrices(names: Iterable[str]) -> list[str]:
    """Of all weights the matrices of blocks, without their `.weight`."""
    found = map(_MATRIX.fullmatch, names)
    return [match[1] for match in found if match is not None and match[2] in TARGETS]


def adapted(names: Iterable[str], parts: Collection[str], targets: Collection[str]) -> list[str]:
    """Those that get an adapter: in `parts` (llm, vit), called as one of `targets`."""
    return [
        name
        for name in block_matrices(names)
        if name.partition(".")[0] in parts and name.rpartition(".")[2] in targets
    ]


def add_lora(
    model: VideoLM, names: Iterable[str], rank: int, alpha: float, rng: torch.Generator
) -> None:
    """Puts an adapter around each of the layers; its first factor is drawn from `rng`."""
    for name in names:
        layer = model.get_submodule(name)
        out, into = layer.out_features, layer.in_features
        assert isinstance(out, int) and isinstance(into, int)
        model.set_submodule(name, LoraLinear(layer, (out, into), rank, alpha, rng))


def factors(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down [r, I] and up [O, r] of each adapted layer among weights by name."""
    layers = [name.removesuffix(f".{DOWN}") for name in weights if name.endswith(f".{DOWN}")]
    return {name: (weights[f"{name}.{DOWN}"], weights[f"{name}.{UP}"]) for name in layers}


def merged(weight_OI: Tensor, down_rI: Tensor, up_Or: Tensor, scale: float) -> Tensor:
    """The one matrix that computes the same, float32."""
    return weight_OI.float() + scale * (up_Or.float() @ down_rI.float())
