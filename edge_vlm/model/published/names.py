"""The published weight names and ours, as tables.

- `STTS`: the vision side as the STTS training repository names it, scorer included, no language
  model;
- `TRAINING`: a whole model as that repository names it;
- `HUB`: the published Molmo2 folders (remote-code names), with the scorer where a checkpoint has
  one;
- `TRANSFORMERS`: the state dict of `Molmo2ForConditionalGeneration` (transformers 5.20 and later),
  which has no scorer.

A row of a table pairs names; `{n}` stands for a block's index. Where one published tensor holds
several of ours it is cut along dimension 0 (fused q, k, v; fused up and gate), where several make
one of ours they are joined along it (base and extra embeddings).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from edge_vlm.config import ModelConfig
from edge_vlm.errors import WeightNamesError


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


_HF_BLOCK = "model.language_model.layers.{n}."
_OUR_BLOCK = "llm.blocks.{n}."


def _fused_language(prefix: str, attention: str, mlp: str, head: str) -> tuple[Row, ...]:
    """The language model with fused projections; the arguments are where its parts hang."""
    block = f"{prefix}transformer.blocks.{{n}}."
    return (
        Row(
            (f"{prefix}transformer.wte.embedding", f"{prefix}transformer.wte.new_embedding"),
            ("llm.embed.weight",),
        ),
        Row(
            (f"{block}{attention}att_proj.weight",),
            tuple(f"{_OUR_BLOCK}attn.{part}.weight" for part in "qkv"),
        ),
        # The published MLP computes silu(second half) * first half.
        Row(
            (f"{block}{mlp}ff_proj.weight",),
            (f"{_OUR_BLOCK}mlp.up.weight", f"{_OUR_BLOCK}mlp.gate.weight"),
        ),
        *_pairs(
            f"{block}{attention}",
            f"{_OUR_BLOCK}attn.",
            "attn_out=o q_norm=q_norm k_norm=k_norm",
            "weight",
        ),
        *_pairs(
            block,
            _OUR_BLOCK,
            f"attn_norm=attn_norm ff_norm=mlp_norm {mlp}ff_out=mlp.down",
            "weight",
        ),
        *_pairs("", "llm.", f"{prefix}transformer.ln_f=norm {head}=head", "weight"),
    )


STTS = Naming("stts", _reference_vision(""))

TRAINING = Naming(
    "training",
    (
        *_reference_vision("vision_backbone."),
        *_fused_language("", "", "", "transformer.ff_out"),
    ),
)

TRAINING_TIED = dataclasses.replace(
    TRAINING,
    rows=tuple(
        row._replace(published=("transformer.wte.embedding",))
        if row.ours == ("llm.head.weight",)
        else row
        for row in TRAINING.rows
    ),
)
"""As `TRAINING` where `weight_tying` holds: logits use the base rows of the embedding table, and no
head is stored. For reading only, since one published tensor is two of ours."""

HUB = Naming(
    "hub",
    (
        *_reference_vision("model.vision_backbone."),
        *_fused_language("model.", "self_attn.", "mlp.", "lm_head"),
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

NAMINGS = (STTS, TRAINING, HUB, TRANSFORMERS)


def recognise(names: Iterable[str], where: object = None) -> Naming:
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
            f"none of {len(found)} weight names is known, such as {', '.join(sorted(found)[:3])}",
            where=where,
            remedy=f"known namings: {', '.join(naming.name for naming in NAMINGS)}",
            unknown=tuple(sorted(found)),
        )
    return best
