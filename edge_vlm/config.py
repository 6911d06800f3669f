"""Model shapes: frozen, checked, and stored with every checkpoint and bundle.

Block indices count from 0. A *patch* is the ViT's unit, a *cell* is 3x3 patches: the unit that is
scored, kept or dropped, and that becomes one token of the language model.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Mapping
from typing import Any

STTS_BLOCK = 3
"""Behind this block the published STTS models are scored (arXiv 2603.18004)."""
CELL = 3
"""Patches along one side of a cell (Molmo2 pools video 3x3)."""
MOST = {"num_layers": 1000, "image_size": 1 << 13}
MOST_OF_ANYTHING = 1 << 20
"""Tables of angles, caches and buffers are made by these numbers before anything else could show
that a file holds no such model."""
MOST_FPS = 1000.0
"""Frames per second that are taken from files and from the other end of a wire."""


class VisionAttention(str, enum.Enum):
    """Which vision tokens of the prompt see which others."""

    ALL = "all"
    """Every vision token sees every other one, later frames included (published Molmo2)."""
    FRAME = "frame"
    """Two-way inside a frame, causal between frames: past frames stay cacheable."""


class Rescale(str, enum.Enum):
    """How scores become the key bias of the block behind the scorer."""

    ROW = "row"
    """Min-max along each patch row of a frame, as the reference code does."""
    FRAME = "frame"
    """Min-max over a whole frame."""
    ABSOLUTE = "absolute"
    """No stretching: a static frame stays uniformly low instead of having its noise amplified."""


def _require(condition: bool, owner: object, field: str, rule: str) -> None:
    if not condition:
        value = getattr(owner, field)
        raise ValueError(f"{type(owner).__name__}.{field} = {value!r}: {rule}")


def _require_positive(owner: object, *fields: str) -> None:
    for field in fields:
        _require(getattr(owner, field) > 0, owner, field, "must be positive")


def require_numbers(owner: Any, most_of_anything: int = MOST_OF_ANYTHING) -> None:
    """Of a dataclass: whole numbers are whole and no larger than any model's, others finite,
    switches bool. Raises ValueError."""
    for field in dataclasses.fields(owner):
        value, name = getattr(owner, field.name), field.name
        kind = str(field.type).removeprefix("Annotated[").partition(", About")[0]
        if value is None and kind.endswith(" | None"):
            continue
        kind = kind.removesuffix(" | None")
        if kind == "bool":
            _require(isinstance(value, bool), owner, name, "must be true or false")
        elif kind == "int":
            is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            _require(is_whole, owner, name, "must be a whole number")
            most = MOST.get(name, most_of_anything)
            _require(value <= most, owner, name, f"must not be above {most}")
        elif kind == "float":
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            _require(is_number and math.isfinite(value), owner, name, "must be a number")
        elif kind == "tuple[int, ...]":
            rule = f"must name at most {MOST['num_layers']} blocks by whole numbers"
            _require(len(value) <= MOST["num_layers"], owner, name, rule)
            _require(all(type(each) is int for each in value), owner, name, rule)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """SigLIP-style vision transformer; only the blocks that are read are built."""

    image_size: int
    patch_size: int
    width: int
    num_heads: int
    head_dim: int
    mlp_width: int
    num_layers: int
    feature_layers: tuple[int, ...]
    """Blocks whose outputs are concatenated for the connector, in this order."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_layers", tuple(self.feature_layers))
        require_numbers(self)
        _require_positive(
            self,
            "image_size",
            "patch_size",
            "width",
            "num_heads",
            "head_dim",
            "mlp_width",
            "num_layers",
        )
        _require(
            self.image_size % (self.patch_size * CELL) == 0,
            self,
            "image_size",
            f"must be a multiple of {CELL} patches of {self.patch_size} pixels",
        )
        _require(
            len(self.feature_layers) > 0
            and all(0 <= i < self.num_layers for i in self.feature_layers),
            self,
            "feature_layers",
            f"must name blocks 0..{self.num_layers - 1}",
        )

    @property
    def patch_grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patch_grid**2

    @property
    def cell_grid(self) -> int:
        return self.patch_grid // CELL

    @property
    def num_cells(self) -> int:
        return self.cell_grid**2

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """The token scorer behind block `prune_at`; cells are dropped behind block `prune_at + 1`."""

    prune_at: int
    num_heads: int
    head_dim: int
    mlp_width: int
    rescale: Rescale = Rescale.ROW
    rescale_min: float = math.exp(-2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rescale", Rescale(self.rescale))
        require_numbers(self)
        _require_positive(self, "num_heads", "head_dim", "mlp_width")
        _require(self.prune_at >= 0, self, "prune_at", "must not be negative")
        _require(0 < self.rescale_min < 1, self, "rescale_min", "must lie between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeConfig:
    """A scorer without weights (`edge_vlm.pruning.change`): how far a cell's patches behind block
    `after_block` are from the last ones of that place that were kept. Cells are dropped one block
    later, as with a learned scorer: measured, that is better than at once."""

    after_block: int

    def __post_init__(self) -> None:
        require_numbers(self)
        _require(self.after_block >= 0, self, "after_block", "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Mean-query attention pooling of a cell's patches, then a SwiGLU projector."""

    width: int
    num_heads: int
    head_dim: int
    mlp_width: int

    def __post_init__(self) -> None:
        require_numbers(self)
        _require_positive(self, "width", "num_heads", "head_dim", "mlp_width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071): slow rotations are slowed down further, to reach past the positions
    a model was first trained on."""

    factor: float
    """How many times as far as `original_max_positions`."""
    original_max_positions: int
    attention_factor: float
    """Multiplies cosine and sine."""
    layers: tuple[int, ...]
    """Blocks that rotate by the scaled angles; the others keep the plain ones."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original length stay as they are..."""
    beta_slow: float = 1.0
    """...those that turn less often than this are slowed by `factor`, between them a ramp."""
    truncate: bool = True
    """The ramp begins and ends at whole dimensions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        require_numbers(self)
        _require_positive(self, "original_max_positions", "attention_factor", "beta_slow")
        _require(self.factor >= 1, self, "factor", "must not be below 1")
        _require(self.beta_fast >= self.beta_slow, self, "beta_fast", "must not be below beta_slow")
        _require(len(set(self.layers)) == len(self.layers) > 0, self, "layers", "one or more, once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """RMSNorm decoder with q/k norm, grouped queries, SwiGLU and RoPE.

    The defaults are those of Qwen3; OLMo differs in `post_norm`, `full_qk_norm` and `rope_scaling`.
    """

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    base_vocab: int
    """Ids below this can be generated; the head covers only these."""
    extra_vocab: int
    """Ids that can only be read (image and frame markers)."""
    rope_theta: float
    norm_eps: float = 1e-6
    max_positions: int
    post_norm: bool = False
    """Normalise what attention and MLP give, before it is added, instead of what they are given."""
    full_qk_norm: bool = False
    """Normalise queries and keys over all heads at once instead of each head."""
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        scaling: object = self.rope_scaling
        if isinstance(scaling, Mapping):  # as JSON has it
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        require_numbers(self)
        _require_positive(
            self,
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_width",
            "base_vocab",
            "rope_theta",
            "max_positions",
        )
        _require(self.extra_vocab >= 0, self, "extra_vocab", "must not be negative")
        _require(self.head_dim % 2 == 0, self, "head_dim", "must be even for rotary positions")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            self,
            "num_kv_heads",
            f"must divide num_heads = {self.num_heads}",
        )
        _require(
            self.rope_scaling is None
            or all(0 <= i < self.num_layers for i in self.rope_scaling.layers),
            self,
            "rope_scaling",
            f"its layers must be blocks 0..{self.num_layers - 1}",
        )

    @property
    def vocab(self) -> int:
        return self.base_vocab + self.extra_vocab

    @property
    def num_rope_tables(self) -> int:
        """Two if some blocks rotate by scaled angles and others by plain ones."""
        scaled = 0 if self.rope_scaling is None else len(self.rope_scaling.layers)
        return 2 if 0 < scaled < self.num_layers else 1

    @property
    def rope_width(self) -> int:
        """Angles per position: half a head, once per table (`edge_vlm.text.rope`)."""
        return self.num_rope_tables * self.head_dim // 2

    def rope_table_of(self, layer: int) -> int:
        """Which table a block reads: 0 holds the plain angles where there are two."""
        if self.rope_scaling is None or self.num_rope_tables == 1:
            return 0
        return int(layer in self.rope_scaling.layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's shapes and its answers."""

    vision: VisionConfig
    scorer: ScorerConfig | None
    connector: ConnectorConfig
    language: LanguageConfig
    attention: VisionAttention = VisionAttention.ALL
    change: ChangeConfig | None = None
    """In the place of a token scorer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", VisionAttention(self.attention))
        if self.change is not None:
            if self.scorer is not None:
                raise ValueError(
                    "ModelConfig.change: a model has one scorer, and it has learned one"
                )
            last = min(self.vision.feature_layers) - 1
            _require(self.change.after_block <= last, self.change, "after_block", f"0..{last}")
        if self.scorer is not None:
            biased = self.scorer.prune_at + 1
            if min(self.vision.feature_layers) < biased:
                raise ValueError(
                    f"VisionConfig.feature_layers = {self.vision.feature_layers}: must lie behind "
                    f"the scorer, at blocks {biased} and later"
                )

    @property
    def has_scores(self) -> bool:
        """Cells can be chosen by what a scorer says of them."""
        return self.scorer is not None or self.change is not None

    @property
    def scorer_kind(self) -> str:
        """learned, change or none."""
        if self.scorer is not None:
            return "learned"
        return "none" if self.change is None else "change"

    @property
    def scored_after(self) -> int | None:
        """The block whose output is scored."""
        if self.scorer is not None:
            return self.scorer.prune_at
        return None if self.change is None else self.change.after_block

    @property
    def whole_blocks(self) -> int:
        """So many blocks see every cell; those behind them only kept ones. 0 without scores: there
        all of them are kept."""
        return 0 if self.scored_after is None else self.scored_after + 2

    def scored_by_change(self, after_block: int | None = None) -> ModelConfig:
        """The same model with the scorer that has no weights in the place of its own, if any.

        By default behind the block where STTS looks, as far as the features that are read allow.
        Raises ValueError for a block behind those.
        """
        if after_block is None:
            usual = STTS_BLOCK if self.scorer is None else self.scorer.prune_at
            after_block = min(usual, min(self.vision.feature_layers) - 1)
        change = ChangeConfig(after_block=after_block)
        return dataclasses.replace(self, scorer=None, change=change)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        data: dict[str, Any] = dataclasses.asdict(
            self,
            dict_factory=lambda items: {
                k: v.value if isinstance(v, enum.Enum) else list(v) if isinstance(v, tuple) else v
                for k, v in items
            },
        )
        if self.change is None:  # most models; older versions do not know the section
            del data["change"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Raises ValueError that names the section and field which is missing or unknown."""
        sections: dict[str, type] = {
            "vision": VisionConfig,
            "scorer": ScorerConfig,
            "connector": ConnectorConfig,
            "language": LanguageConfig,
        }
        unknown = set(data) - set(sections) - {"attention", "change"}
        if unknown:
            raise ValueError(f"model config has unknown sections {sorted(unknown)}")
        parts: dict[str, Any] = {}
        for name, section in [*sections.items(), ("change", ChangeConfig)]:
            if name == "change" and name not in data:
                continue
            if name not in data:
                raise ValueError(f"model config lacks section {name!r}")
            if data[name] is None and name not in ("scorer", "change"):
                raise ValueError(f"model config, section {name!r}: must not be null")
            try:
                parts[name] = None if data[name] is None else section(**data[name])
            except TypeError as error:
                raise ValueError(f"model config, section {name!r}: {error}") from None
        return cls(attention=data.get("attention", VisionAttention.ALL), **parts)
