"""The language model's products as int4: block by block, each on the states that the rounded blocks
before it give. No more than one block's states and moments are held.

Shape letters: S tokens, E language width, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from edge_vlm.config import LanguageConfig
from edge_vlm.console.progress import Progress
from edge_vlm.formats.calibrated.precision import ArraysWriter, ProductPlan
from edge_vlm.formats.precision import block_size
from edge_vlm.model.layers import additive_bias
from edge_vlm.model.llm import LanguageModel, rope_tables
from edge_vlm_calibration.precision.gptq import (
    inverse_factor,
    restored,
    round_nearest,
    round_weight,
)
from edge_vlm_calibration.precision.plans import product_plan
from edge_vlm_calibration.precision.states import States, lost_share, watched
from edge_vlm_calibration.precision.watching import Reading

LIMIT_INT4 = 0.05
"""Largest share of a product's variance that int4 may lose; past it, int8 is taken."""
GROUPS = (
    ("attn.q", "attn.k", "attn.v"),
    ("attn.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)
"""Products of a block that share an input."""
JUDGED = 512
"""States of each product to judge by."""
JUDGED_EVERY = 8
"""One token of so many is for judging: it is not in the moments."""


class Moments:
    """What rounding has to know of a product's inputs: mean of x x^T, f32 [K, K], and a sample of
    others."""

    def __init__(self) -> None:
        self.sum_KK: Tensor | None = None
        self.judged = States(JUDGED // 2)
        self.range = States(1)
        self._seen = 0

    def add(self, states_SK: Tensor) -> None:
        self.range.add(states_SK)
        is_judged = (self._seen + torch.arange(len(states_SK))) % JUDGED_EVERY == JUDGED_EVERY - 1
        self._seen += len(states_SK)
        self.judged.add(states_SK[is_judged])
        others = states_SK[~is_judged]
        if self.sum_KK is None:
            self.sum_KK = torch.zeros(states_SK.shape[1], states_SK.shape[1])
        self.sum_KK.addmm_(others.T, others)

    def judging_states(self) -> Tensor:
        if self.judged.channels is None:  # fewer tokens than one in JUDGED_EVERY
            return self.range.chosen_by
        return torch.cat([self.judged.chosen_by, self.judged.judged_by])


@torch.inference_mode()
def plan_language(
    model: LanguageModel, readings: Sequence[Reading], arrays: ArraysWriter
) -> Iterator[ProductPlan]:
    """Rounds all products of blocks and head, and writes them. The model is used up: its blocks'
    weights are gone afterwards. Raises NonFinite."""
    hidden = [reading.embeds_SE[None] for reading in readings]
    tables = [_tables(model.cfg, reading) for reading in readings]
    biases = [additive_bias(reading.visible_SS)[None] for reading in readings]
    with Progress("calibrate: language blocks", len(model.blocks) + 1) as progress:
        for number, block in enumerate(model.blocks):
            prefix, table = f"llm.blocks.{number}", model.cfg.rope_table_of(number)
            turns = [both[table] for both in tables]
            moments = {f"{prefix}.{group[0]}": Moments() for group in GROUPS}
            with watched({name: _linear(block, prefix, name) for name in moments}, moments):
                for x, turn, bias in zip(hidden, turns, biases, strict=True):
                    block(x, *turn, bias, None)
            for group in GROUPS:
                names = [f"{prefix}.{leaf}" for leaf in group]
                linears = {name: _linear(block, prefix, name) for name in names}
                yield from _round_group(linears, moments.pop(names[0]), arrays)
            hidden = [
                block(x, *turn, bias, None)[0]
                for x, turn, bias in zip(hidden, turns, biases, strict=True)
            ]
            for parameter in block.parameters():
                parameter.data = torch.empty(0)
            progress.advance()
        states = Moments()
        for x, reading in zip(hidden, readings, strict=True):
            # Where nothing is asked, the last state is as good as any: a question may follow.
            first = min(reading.answered_from, x.shape[1] - 1)
            states.add(model.norm(x)[0, first:])
        yield from _round_group({"llm.head": model.head}, states, arrays)
        progress.advance()


def _linear(block: nn.Module, prefix: str, name: str) -> nn.Linear:
    module = block.get_submodule(name.removeprefix(f"{prefix}."))
    assert isinstance(module, nn.Linear)
    return module


def _tables(cfg: LanguageConfig, reading: Reading) -> list[tuple[Tensor, Tensor]]:
    cos, sin = rope_tables(cfg, reading.positions_S[None])
    if cfg.num_rope_tables > 1:
        return list(zip(cos.chunk(2, -1), sin.chunk(2, -1), strict=True))
    return [(cos, sin)]


def _round_group(
    linears: Mapping[str, nn.Linear], moments: Moments, arrays: ArraysWriter
) -> Iterator[ProductPlan]:
    """Products of one input; their modules compute with the rounded weights afterwards."""
    assert moments.sum_KK is not None
    states, k = moments.judging_states(), moments.sum_KK.shape[0]
    block = block_size(k)
    if block is None:
        for name in linears:
            yield product_plan(name, moments.range, f"{k} inputs do not divide into blocks")
        return
    factor = inverse_factor(moments.sum_KK)
    for name, linear in linears.items():
        weight_KN = linear.weight.detach().float().T
        numbers, scale = round_weight(weight_KN, factor, block)
        rounded = restored(numbers, scale)
        exact = states @ weight_KN
        error = lost_share(states @ rounded, exact)
        plain = lost_share(states @ restored(*round_nearest(weight_KN, block)), exact)
        lost = f"int4 loses {error:.2%} of what it computes, plainly rounded {plain:.2%}"
        if error > LIMIT_INT4:
            why = f"stays int8: {lost}, more than {LIMIT_INT4:.0%}"
            yield product_plan(
                name, moments.range, why, weights="int8", method="nearest", error_nearest=plain
            )
            continue
        arrays.weight(name, numbers.numpy(), scale.numpy())
        linear.weight.data = rounded.T.contiguous().to(linear.weight.dtype)
        yield product_plan(
            name,
            moments.range,
            lost,
            weights="int4",
            method="gptq",
            error_nearest=plain,
            error=error,
        )
