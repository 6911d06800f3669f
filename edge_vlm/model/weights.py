"""Published weight names and ours, as tables.

Three namings are known:

- `STTS`: the vision side as the STTS training repository names it, scorer included, no language
  model;
- `HUB`: the published Molmo2 folders (remote-code names), with the scorer where a checkpoint has
  one;
- `TRANSFORMERS`: the state dict of `Molmo2ForConditionalGeneration` (transformers 5.20 and later).

A row of a table pairs names; `{n}` stands for a block's index. Where one published tensor holds
several of ours it is cut along dimension 0 (fused q, k, v; fused up and gate), where several make
one of ours they are joined along it (base and extra embeddings). `to_ours` and `to_published` are
inverses, and both refuse anything that does not fit, listing all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import WeightNamesError
from edge_vlm.model.video_lm import VideoLM


class Row(NamedTuple):
    """Published names and ours; one side has one name, or both do."""

    published: tuple[str, ...]
    ours: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Naming:
    name: str
    rows: tuple[Row, ...]

    def expand(self, cfg: ModelConfig) -> list[Row]:
        """The rows of a model of this shape, one per block where a row names blocks."""
        counts = {"vit": cfg.vision.num_layers, "llm": cfg.language.num_layers}
        rows: list[Row] = []
        for row in self.rows:
            part = row.ours[0].partition(".")[0]
            if part == "scorer" and cfg.scorer is None:
                continue
            if "{n}" not in row.ours[0]:
                rows.append(row)
                continue
            rows += [
                Row(
                    tuple(name.format(n=n) for name in row.published),
                    tuple(name.format(n=n) for name in row.ours),
                )
                for n in range(counts[part])
            ]
        return rows


def _pairs(published: str, ours: str, names: str, kinds: str = "weight bias") -> Iterable[Row]:
    """Rows for a module's tensors; `names` lists "published=ours" below the two prefixes."""
    for pair in names.split():
        theirs, _, mine = pair.partition("=")
        for kind in kinds.split():
            yield Row((f"{published}{theirs}.{kind}",), (f"{ours}{mine}.{kind}",))


def _reference_vision(prefix: str) -> tuple[Row, ...]:
    """ViT, scorer and connector as the training repository and the published folders name them."""
    vit = f"{prefix}image_vit."
    block = f"{vit}transformer.resblocks.{{n}}."
    scorer = f"{vit}transformer.temporal_token_scorer."
    attention = "wq=q wk=k wv=v wo=o"
    return (
        Row((f"{vit}positional_embedding",), ("vit.pos_embed",)),
        *_pairs(vit, "vit.", "patch_embedding=patch_embed"),
        *_pairs(block, "vit.blocks.{n}.", "attention_norm=norm1 ffn_norm=norm2"),
        *_pairs(f"{block}attention.", "vit.blocks.{n}.attn.", attention),
        *_pairs(f"{block}feed_forward.", "vit.blocks.{n}.", "w1=fc1 w2=fc2"),
        *_pairs(f"{scorer}patch_token_pooler.", "scorer.pool.", attention),
        *_pairs(f"{scorer}mlp.", "scorer.", "w1=fc1 w2=fc2 w3=fc3"),
        *_pairs(f"{prefix}image_pooling_2d.", "connector.pool.", attention),
        *_pairs(
            f"{prefix}image_projector.", "connector.project.", "w1=gate w2=down w3=up", "weight"
        ),
    )


_HUB_BLOCK = "model.transformer.blocks.{n}."
_HF_BLOCK = "model.language_model.layers.{n}."
_OUR_BLOCK = "llm.blocks.{n}."

STTS = Naming("stts", _reference_vision(""))

HUB = Naming(
    "hub",
    (
        *_reference_vision("model.vision_backbone."),
        Row(
            ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding"),
            ("llm.embed.weight",),
        ),
        Row(
            (f"{_HUB_BLOCK}self_attn.att_proj.weight",),
            tuple(f"{_OUR_BLOCK}attn.{part}.weight" for part in "qkv"),
        ),
        Row(
            (f"{_HUB_BLOCK}mlp.ff_proj.weight",),
            (f"{_OUR_BLOCK}mlp.up.weight", f"{_OUR_BLOCK}mlp.gate.weight"),
        ),
        *_pairs(
            _HUB_BLOCK,
            _OUR_BLOCK,
            "attn_norm=attn_norm ff_norm=mlp_norm self_attn.attn_out=attn.o "
            "self_attn.q_norm=attn.q_norm self_attn.k_norm=attn.k_norm mlp.ff_out=mlp.down",
            "weight",
        ),
        *_pairs("", "llm.", "model.transformer.ln_f=norm lm_head=head", "weight"),
    ),
)

TRANSFORMERS = Naming(
    "transformers",
    (
        Row(("model.vision_tower.positional_embedding",), ("vit.pos_embed",)),
        *_pairs("model.vision_tower.", "vit.", "patch_embedding=patch_embed"),
        *_pairs(
            "model.vision_tower.layers.{n}.",
            "vit.blocks.{n}.",
            "layer_norm1=norm1 layer_norm2=norm2 mlp.fc1=fc1 mlp.fc2=fc2 "
            "self_attn.q_proj=attn.q self_attn.k_proj=attn.k "
            "self_attn.v_proj=attn.v self_attn.o_proj=attn.o",
        ),
        *_pairs(
            "model.multi_modal_projector.image_pooling_2d.",
            "connector.pool.",
            "q_proj=q k_proj=k v_proj=v o_proj=o",
        ),
        *_pairs(
            "model.multi_modal_projector.image_projector.",
            "connector.project.",
            "gate_proj=gate up_proj=up down_proj=down",
            "weight",
        ),
        *_pairs(
            _HF_BLOCK,
            _OUR_BLOCK,
            "input_layernorm=attn_norm post_attention_layernorm=mlp_norm "
            "self_attn.q_proj=attn.q self_attn.k_proj=attn.k self_attn.v_proj=attn.v "
            "self_attn.o_proj=attn.o self_attn.q_norm=attn.q_norm self_attn.k_norm=attn.k_norm "
            "mlp.gate_proj=mlp.gate mlp.up_proj=mlp.up mlp.down_proj=mlp.down",
            "weight",
        ),
        *_pairs(
            "",
            "llm.",
            "model.language_model.embed_tokens=embed model.language_model.norm=norm lm_head=head",
            "weight",
        ),
    ),
)

NAMINGS = (STTS, HUB, TRANSFORMERS)


def recognise(names: Iterable[str]) -> Naming:
    """The naming that shares most names with a checkpoint, by its tables.

    Raises WeightNamesError if there is none with any.
    """
    found = set(names)

    def shared(naming: Naming) -> int:
        wanted = {name for row in naming.rows for name in row.published}
        return len(found & {name.format(n=0) for name in wanted})

    best = max(NAMINGS, key=shared)
    if not shared(best):
        raise WeightNamesError(
            f"none of {len(found)} weight names is known",
            remedy=f"known namings: {', '.join(naming.name for naming in NAMINGS)}",
            unknown=tuple(sorted(found)),
        )
    return best


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names and their shapes, without allocating anything."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in VideoLM(cfg).state_dict().items()}


def to_ours(
    naming: Naming, cfg: ModelConfig, weights: Mapping[str, Tensor], where: object = None
) -> dict[str, Tensor]:
    """Renames a published state dict: every name of ours that the naming covers.

    Tensors are views where nothing has to be joined. Raises WeightNamesError listing every missing,
    unknown and mis-shaped name.
    """
    wanted = shapes(cfg)
    rows = naming.expand(cfg)
    expected: dict[str, tuple[int, ...]] = {}
    for row in rows:
        fitting = _published_shapes(row, wanted, cfg)
        if len(row.published) > 1 and all(name in weights for name in row.published):
            # transformers saves the joined table cut in two halves: only the sum is certain.
            found = {name: sum(weights[name].shape[:1]) for name in row.published}
            if sum(found.values()) == wanted[row.ours[0]][0]:
                fitting = {name: (found[name], *fitting[name][1:]) for name in found}
        expected.update(fitting)
    check_fit(expected, weights, where)
    ours: dict[str, Tensor] = {}
    for row in rows:
        joined = _join([weights[name] for name in row.published])
        sizes = [wanted[name][0] for name in row.ours]
        ours.update(zip(row.ours, joined.split(sizes), strict=True))
    return ours


def to_published(
    naming: Naming, cfg: ModelConfig, weights: Mapping[str, Tensor], where: object = None
) -> dict[str, Tensor]:
    """The inverse of `to_ours`; names of ours that the naming does not cover must be absent."""
    wanted = shapes(cfg)
    rows = naming.expand(cfg)
    check_fit({name: wanted[name] for row in rows for name in row.ours}, weights, where)
    published: dict[str, Tensor] = {}
    for row in rows:
        joined = _join([weights[name] for name in row.ours])
        sizes = [shape[0] for shape in _published_shapes(row, wanted, cfg).values()]
        published.update(zip(row.published, joined.split(sizes), strict=True))
    return published


def _join(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _published_shapes(
    row: Row, wanted: Mapping[str, tuple[int, ...]], cfg: ModelConfig
) -> dict[str, tuple[int, ...]]:
    rest = wanted[row.ours[0]][1:]
    if len(row.published) == 1:
        return {row.published[0]: (sum(wanted[name][0] for name in row.ours), *rest)}
    # The only tensor that is published in two pieces is the embedding table.
    language = cfg.language
    rows = (language.base_vocab, language.extra_vocab)
    return {name: (size, *rest) for name, size in zip(row.published, rows, strict=True)}


def check_fit(
    expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], where: object = None
) -> None:
    """Raises WeightNamesError with every missing, unknown and mis-shaped name; none if all fit."""
    missing = tuple(sorted(expected.keys() - weights.keys()))
    unknown = tuple(sorted(weights.keys() - expected.keys()))
    misshaped = tuple(
        f"{name} is {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in weights and tuple(weights[name].shape) != shape
    )
    problems = (("missing", missing), ("unknown", unknown), ("mis-shaped", misshaped))
    if any(names for _, names in problems):
        listed = "; ".join(f"{kind}: {_abridged(names)}" for kind, names in problems if names)
        raise WeightNamesError(
            f"weights do not fit the model: {listed}",
            where=where,
            remedy="load them with the config that was published with them",
            missing=missing,
            unknown=unknown,
            misshaped=misshaped,
        )


def _abridged(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
