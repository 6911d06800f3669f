"""What each stage of a model computes and moves, from its shapes alone.

Three kinds of work, each with a rate of its own on a machine: matrix products (a multiplication and
addition as two operations), what is read and written between them, and the nodes of the graph,
which cost something however small they are. `edge_vlm.flops` counts the same products; here they
stand one by one, because a product's rate depends on its sizes.

Letters: m rows, k and n the sides of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edge_vlm.config import CELL, LanguageConfig, ModelConfig
from edge_vlm.formats.precision import WEIGHT_BYTES, Precision

FLOAT = 4
"""Bytes of what is between products where nothing else is said."""
VISION_NODES, LANGUAGE_NODES = 27, 80
"""Nodes of a block in a portable graph behind ONNX Runtime's optimiser, counted on the demo bundle;
KERNELS is what a compiler such as TensorRT makes of one."""
STEM_NODES, TRUNK_NODES, HEAD_NODES = 56, 20, 7
KERNELS = 10
POOL_PATCHES = CELL * CELL


@dataclass(frozen=True)
class Product:
    """`count` products of [m, k] and [k, n]."""

    m: int
    k: int
    n: int
    count: int = 1
    weight_bytes: float = 0.0
    """Of one value of [k, n] in the bundle; 0: it is no weight."""

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.count

    @property
    def stored_bytes(self) -> float:
        return self.weight_bytes * self.k * self.n * self.count


Kind = Literal["moved", "copied", "joined", "softmax", "gelu"]
"""Read and written between products; places changed within a block (transposed heads, gathered
patches); caches copied; softmax taken; GELU taken."""


@dataclass(frozen=True)
class Pass:
    """`values` that go through operators between products, in tensors of `at_once` values: small
    ones stay in a cache, large ones do not."""

    kind: Kind
    values: float
    at_once: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """One run of a stage."""

    name: str
    parts: Sequence[Product | Pass] = ()
    nodes: int = 0
    blocks: int = 0
    cache_bytes: float = 0.0
    """Keys and values of the past that are read."""
    bytes_in_out: float = 0.0
    """Inputs and outputs of the graph, the cache aside."""

    @property
    def products(self) -> list[Product]:
        return [part for part in self.parts if isinstance(part, Product)]

    @property
    def passes(self) -> list[Pass]:
        return [part for part in self.parts if isinstance(part, Pass)]

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)

    @property
    def moved(self) -> float:
        """Values read and written between products, but for softmax."""
        return sum(each.values for each in self.passes if each.kind == "moved")

    @property
    def weight_bytes(self) -> float:
        return sum(product.stored_bytes for product in self.products)

    @property
    def bytes(self) -> float:
        """What a run has to move at the least: weights, cache, inputs and outputs, each once."""
        return self.weight_bytes + self.cache_bytes + self.bytes_in_out


def _bytes_of(choice: str, precision: Precision) -> float:
    return WEIGHT_BYTES[precision.base if choice == "base" else choice]


def stem_work(cfg: ModelConfig, precision: Precision) -> Work:
    """The first blocks on a whole frame, and the scorer."""
    vision, base = cfg.vision, WEIGHT_BYTES[precision.base]
    patches, width = vision.num_patches, vision.width
    parts: list[Product | Pass] = [
        Product(patches, vision.patch_dim, width, 1, base),
        Pass("moved", 4 * patches * width, patches * width),
    ]
    for _ in range(cfg.whole_blocks):
        parts += _vision_block(cfg, patches, _bytes_of(precision.vit, precision))
    if cfg.scorer is not None:
        scorer, cells = cfg.scorer, vision.num_cells
        parts += _pool(cells, width, scorer.num_heads, scorer.head_dim, width, base)
        parts += [
            Product(cells, 2 * width, scorer.mlp_width, 1, base),
            Product(cells, scorer.mlp_width, scorer.mlp_width, 1, base),
            Product(cells, scorer.mlp_width, 1, 1, base),
            Pass("moved", 6 * cells * (width + scorer.mlp_width), cells * scorer.mlp_width),
        ]
    return Work(
        name="vit_stem",
        parts=parts,
        nodes=STEM_NODES + VISION_NODES * cfg.whole_blocks,
        blocks=cfg.whole_blocks,
        bytes_in_out=FLOAT * patches * (vision.patch_dim + width),
    )


def trunk_work(cfg: ModelConfig, precision: Precision, cells: int) -> Work:
    """The other blocks and the connector on the kept cells of a frame."""
    vision, base = cfg.vision, WEIGHT_BYTES[precision.base]
    patches, blocks = cells * POOL_PATCHES, vision.num_layers - cfg.whole_blocks
    parts: list[Product | Pass] = [
        Pass("copied", 2 * patches * vision.width, patches * vision.width)
    ]
    for _ in range(blocks):
        parts += _vision_block(cfg, patches, _bytes_of(precision.vit, precision), is_masked=True)
    connector = cfg.connector
    in_width = vision.width * len(vision.feature_layers)
    pool = (connector.num_heads, connector.head_dim, connector.width)
    parts += _pool(cells, in_width, *pool, base)
    parts += [
        Product(cells, connector.width, connector.mlp_width, 2, base),
        Product(cells, connector.mlp_width, cfg.language.width, 1, base),
        Pass("moved", 7 * cells * connector.mlp_width, cells * connector.mlp_width),
    ]
    return Work(
        name="vit_trunk",
        parts=parts,
        nodes=TRUNK_NODES + VISION_NODES * blocks,
        blocks=blocks,
        bytes_in_out=FLOAT * (vision.num_patches * vision.width + cells * cfg.language.width),
    )


def _vision_block(
    cfg: ModelConfig, rows: int, weight: float, *, is_masked: bool = False
) -> list[Product | Pass]:
    vision = cfg.vision
    heads, width, inner = vision.num_heads, vision.width, vision.num_heads * vision.head_dim
    pairs, mlp = heads * rows * rows, rows * vision.mlp_width
    parts: list[Product | Pass] = [
        Product(rows, width, inner, 3, weight),
        Product(rows, inner, width, 1, weight),
        Product(rows, width, vision.mlp_width, 1, weight),
        Product(rows, vision.mlp_width, width, 1, weight),
        Product(rows, vision.head_dim, rows, heads),
        Product(rows, rows, vision.head_dim, heads),
        # Two norms, six biases, two residual sums.
        Pass("moved", rows * (14 * width + 6 * inner), rows * width),
        Pass("moved", 2 * mlp, mlp),
        Pass("softmax", pairs, pairs),
        Pass("gelu", mlp, mlp),
        Pass("copied", 8 * rows * inner, rows * inner),
    ]
    return [*parts, Pass("moved", 3 * pairs, pairs)] if is_masked else parts


def _pool(
    cells: int, in_width: int, heads: int, head_dim: int, out: int, weight: float
) -> list[Product | Pass]:
    """One query, the mean, over the nine patches of each cell."""
    inner = heads * head_dim
    patches = cells * POOL_PATCHES
    return [
        Product(cells, in_width, inner, 1, weight),
        Product(patches, in_width, inner, 2, weight),
        Product(cells, inner, out, 1, weight),
        Product(1, head_dim, POOL_PATCHES, cells * heads),
        Product(1, POOL_PATCHES, head_dim, cells * heads),
        Pass("moved", 2 * patches * (in_width + 2 * inner), patches * in_width),
        Pass("copied", 4 * patches * inner, patches * inner),
    ]


def language_work(
    cfg: LanguageConfig,
    precision: Precision,
    new: int,
    past: int,
    *,
    name: str = "prefill",
    is_joined: bool = True,
) -> Work:
    """All blocks on `new` tokens behind `past` ones, and the head on the last. `is_joined`: the
    graph joins past and new rows anew in every run, as portable ones do."""
    weight = _bytes_of(precision.llm, precision)
    cache_value_bytes = WEIGHT_BYTES[precision.cache_format]
    width, mlp, keys = cfg.width, cfg.mlp_width, cfg.num_kv_heads * cfg.head_dim
    inner, seen = cfg.num_heads * cfg.head_dim, past + new
    parts: list[Product | Pass] = []
    pairs = cfg.num_heads * new * seen
    for _ in range(cfg.num_layers):
        parts += [
            Product(new, width, inner, 1, weight),
            Product(new, width, keys, 2, weight),
            Product(new, inner, width, 1, weight),
            Product(new, width, mlp, 2, weight),
            Product(new, mlp, width, 1, weight),
            Product(new, cfg.head_dim, seen, cfg.num_heads),
            Product(new, seen, cfg.head_dim, cfg.num_heads),
            # Two norms of five nodes, those of heads, rotations, residual sums, the gate.
            Pass("moved", new * (26 * width + 22 * (inner + keys)), new * width),
            Pass("moved", 5 * new * mlp, new * mlp),
            Pass("moved", 3 * pairs, pairs),
            Pass("softmax", pairs, pairs),
            Pass("copied", 4 * new * inner, new * inner),
        ]
        if is_joined:  # past and new rows, taken out of their stack, and spread over the heads
            parts.append(Pass("joined", 2 * seen * (4 * keys + 2 * inner), seen * inner))
            if precision.cache_format == "float16" and precision.base == "float32":
                parts.append(Pass("moved", 2 * seen * keys, seen * keys))  # cast to be multiplied
    parts.append(Product(1, width, cfg.base_vocab, 1, _bytes_of(precision.head, precision)))
    return Work(
        name=name,
        parts=parts,
        nodes=HEAD_NODES + LANGUAGE_NODES * cfg.num_layers,
        blocks=cfg.num_layers,
        cache_bytes=2.0 * cache_value_bytes * keys * past * cfg.num_layers,
        bytes_in_out=FLOAT * (new * width + cfg.base_vocab)
        + 2 * cache_value_bytes * keys * new * cfg.num_layers,
    )
