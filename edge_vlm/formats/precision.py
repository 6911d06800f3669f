"""In which number formats a bundle computes, and for which runtime its graphs are written.

Six choices make a `Precision`: the format of everything that is not quantised, what the weights of
the vision blocks, of the language blocks and of the language head become, and how the embedding
table and the cache of keys and values are stored. Those with a name of their own are in `PRESETS`;
`base=float16,llm=int4` spells any other, and `int4,cache=float16` changes a preset.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

BASES = ("float32", "float16")
VIT = ("base", "int8")
LLM = ("base", "int8", "int4")
HEAD = ("base", "int8", "int4")
EMBED = ("float32", "float16")
CACHE = ("base", "float16")
VIT_PRODUCTS = frozenset(["q", "k", "v", "o", "fc1", "fc2"])
LLM_PRODUCTS = frozenset(["q", "k", "v", "o", "gate", "up", "down"])
"""Modules of a block whose weights are quantised."""
WEIGHT_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
"""Of one weight in a bundle, scales of int4 included."""
BLOCK_SIZES = (128, 64, 32, 16)
"""Inputs of a product that share a scale where weights are int4."""


class Variant(str, enum.Enum):
    """For whom the graphs are written."""

    PORTABLE = "portable"
    """Standard operators only: opset 20, or 21 where weights are int4. Any runtime."""
    ORT = "ort"
    """ONNX Runtime's own fast operators: GroupQueryAttention, MatMulNBits, MatMulIntegerToFloat."""


class KVLayout(str, enum.Enum):
    """How the language graph is given its past keys and values, per layer and kind."""

    TOKEN_MAJOR = "token_major"
    """`past_*` [p, heads, head_dim] is read, `new_*` [s, heads, head_dim] is written."""
    HEAD_MAJOR = "head_major"
    """`past_*` and `present_*` [1, heads, C, head_dim] are one buffer with room for C tokens, to
    which the graph adds in place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    base: str = "float32"
    """`float16`: mixed, the nodes that calibration found too large for it stay float32."""
    vit: str = "base"
    """`int8`: activations and weights of the vision blocks' matrix products, by Q/DQ."""
    llm: str = "base"
    """`int4`, `int8`: weights of the language blocks' matrix products, in blocks."""
    head: str = "base"
    """`int8`: weights of the language head, by output row; `int4`: in blocks."""
    embed: str = "float32"
    """`float16`: the table of token embeddings, half as large; it is no part of any graph."""
    cache: str = "base"
    """`float16`: keys and values of the past are kept half as large. Attention that adds to the
    cache in place (`Variant.ORT`) then computes in float16 too."""

    def __post_init__(self) -> None:
        for field, allowed in (
            *(("base", BASES), ("vit", VIT), ("llm", LLM)),
            *(("head", HEAD), ("embed", EMBED), ("cache", CACHE)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"precision {field}={getattr(self, field)}: must be one of {', '.join(allowed)}"
                )

    @property
    def label(self) -> str:
        """The preset's name, and its cache if that is another, or what differs from float32."""
        for name, preset in PRESETS.items():
            if preset == self:
                return name
            if dataclasses.replace(preset, cache=self.cache) == self:
                return f"{name},cache={self.cache}"
        return ",".join(
            f"{field}={value}"
            for field, value in self.to_dict().items()
            if value != getattr(FP32, field)
        )

    @property
    def cache_format(self) -> str:
        return self.base if self.cache == "base" else self.cache

    @property
    def needs_ranges(self) -> bool:
        """It cannot be chosen without having seen how large the activations become."""
        return self.base == "float16" or self.vit == "int8"

    @property
    def uses_ranges(self) -> bool:
        """Footage that is named is looked at."""
        return self.needs_ranges or self.cache_format == "float16"

    def to_dict(self) -> dict[str, str]:
        """Without `cache` where it is as the rest, so that earlier versions read what they know."""
        fields = dataclasses.asdict(self)
        if self.cache == FP32.cache:
            del fields["cache"]
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Precision:
        """Raises ValueError or TypeError for anything `to_dict` does not write."""
        return cls(**data)

    @classmethod
    def parse(cls, text: str) -> Precision:
        """A preset's name, some of `base=...,vit=...,llm=...,head=...,embed=...,cache=...`, or a
        name and some of these.

        Raises ValueError.
        """
        name, comma, changes = text.partition(",")
        if name in PRESETS:
            start, items = PRESETS[name], changes.split(",") if comma else []
        else:
            start, items = FP32, text.split(",")
        choices = [item.strip().partition("=") for item in items]
        fields = {field.name for field in dataclasses.fields(cls)}
        names = [name for name, equals, _ in choices if equals]
        if not fields.issuperset(names) or len(set(names)) != len(choices):
            raise ValueError(
                f"unknown precision {text!r}: one of {', '.join(PRESETS)}, "
                f"or some of {', '.join(f'{field}=...' for field in sorted(fields))}, or "
                "one of the former and, behind a comma, some of the latter, each once"
            )
        return dataclasses.replace(start, **{name: value for name, _, value in choices})


FP32 = Precision()
PRESETS = {
    "fp32": FP32,
    "fp16": Precision(base="float16", embed="float16"),
    "int8": Precision(vit="int8", llm="int8", head="int8"),
    "int4": Precision(llm="int4", head="int8", embed="float16"),
    "int4-small": Precision(vit="int8", llm="int4", head="int8", embed="float16"),
    "edge": Precision(base="float16", vit="int8", llm="int4", head="int8", embed="float16"),
}


def block_size(num_inputs: int) -> int | None:
    """The largest block that divides K; None if K is not a multiple of the smallest."""
    return next((size for size in BLOCK_SIZES if num_inputs % size == 0), None)


def weight_format(name: str, precision: Precision) -> str:
    """What becomes of a checkpoint's weight, by our name for it."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    chosen = "base"
    if name == "llm.embed.weight":
        return precision.embed
    if kind == "weight" and parent.startswith("vit.blocks.") and leaf in VIT_PRODUCTS:
        chosen = precision.vit
    elif kind == "weight" and parent.startswith("llm.blocks.") and leaf in LLM_PRODUCTS:
        chosen = precision.llm
    elif name == "llm.head.weight":
        chosen = precision.head
    return precision.base if chosen == "base" else chosen


def weights_bytes(shapes: Mapping[str, tuple[int, ...]], precision: Precision) -> int:
    """Of all weights in a bundle of this precision, that of still pictures aside."""
    return round(
        sum(math.prod(s) * WEIGHT_BYTES[weight_format(n, precision)] for n, s in shapes.items())
    )
