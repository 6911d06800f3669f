"""Folders of Molmo2's training repository: where the weights lie, and what `config.yaml` says.

    step<N>/                 config.yaml, model_and_optim/.metadata and .distcp files
    step<N>-unsharded/       config.yaml, model.pt
    a save folder            config.yaml and several of these: the last step is taken

The released STTS models are such folders. `config.yaml` is translated to a hub `config.json`, as
the repository's own converter does, and checked there; what a hub config has no words for (the
scorer, attention, markers, frames) is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_vlm.config import (
    CELL,
    MOST,
    ModelConfig,
    Rescale,
    ScorerConfig,
    VisionAttention,
)
from edge_vlm.errors import CheckpointError, ConfigError, MissingExtraError
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.published.config import MODEL_TYPE, config_from_published
from edge_vlm.model.published.files import listed
from edge_vlm.model.published.processor import CROPS
from edge_vlm.model.published.section import Section, show
from edge_vlm.model.published.torch_files import SHARDED, UNSHARDED
from edge_vlm.pixels.sampling import UNIFORM_LAST_FRAME
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import RELEASED

CONFIG = "config.yaml"
MERGE = re.compile(r"<<['\"]?\s*:|tag:yaml.org,2002:merge|!!merge")
STEP = re.compile(r"step(\d+)(-unsharded)?")
ATTENTION = {"image_tokens": VisionAttention.ALL, "within_image": VisionAttention.FRAME}
REMOVED = ("residual_patch_features", "patch_residual", "patch_residual_thresh", "debug")
"""Settings of older versions, without effect where they are off."""


@dataclass(frozen=True)
class TrainingConfig:
    config: ModelConfig
    usage: Usage
    tied: bool
    """The head's weights are the base rows of the embedding table, and not stored."""
    unused_blocks: range
    """Blocks of the ViT that are stored though nothing reads them."""
    tokenizer: str
    """The hub's name of the vocabulary; no tokenizer lies in such a folder."""
    notes: tuple[str, ...]


def find_weights(folder: Path) -> Path | None:
    """The folder that holds weights: this one, or that of the last step in it.

    None if this is not a folder of the training repository. Of one step's two forms the sharded
    one is taken.
    """
    if _holds_weights(folder):
        return folder
    if not folder.is_dir():
        return None
    steps = {
        (int(found[1]), found[2] is None): path
        for path in folder.iterdir()
        if (found := STEP.fullmatch(path.name)) and _holds_weights(path)
    }
    if steps:
        return steps[max(steps)]
    if (folder / CONFIG).is_file():
        raise CheckpointError(
            f"there is a {CONFIG}, but no weights: neither {SHARDED}/ nor {UNSHARDED} nor a step",
            where=folder,
            remedy="copy the step's whole folder",
        )
    return None


def _holds_weights(folder: Path) -> bool:
    sharded = folder / SHARDED
    return (folder / UNSHARDED).is_file() or (sharded.is_dir() and any(sharded.iterdir()))


def read_training_config(folder: Path) -> TrainingConfig:
    """Raises ConfigError that lists all that is not computed here, CheckpointError without a
    readable config.yaml, MissingExtraError without PyYAML."""
    path = next((f / CONFIG for f in (folder, folder.parent) if (f / CONFIG).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"there is no {CONFIG}",
            where=folder,
            remedy=f"copy the {CONFIG} that the training repository wrote beside the weights",
        )
    problems: list[str] = []
    model = Section("config.yaml", _read_yaml(path), problems).inner("model")
    _require_family(model, path)
    reading = _Reading(model, problems)
    try:
        found = reading.read()
    except ConfigError as error:
        problems.append(error.what)
        found = None
    except MALFORMED as error:
        if not problems:
            problems.append(str(error))
        found = None
    if problems or found is None:
        raise ConfigError(
            f"the config is not one of a Molmo2 that is computed here: {listed(problems, 20)}",
            where=path,
            remedy="the other settings of the training repository are not supported",
        )
    return found


def _read_yaml(path: Path) -> object:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError.for_library("yaml", "model") from error
    try:
        text = path.read_text(encoding="utf-8")
        if MERGE.search(text):  # a few lines of these can stand for gigabytes
            raise ValueError("it merges tables (<<), which no such file does")
        return yaml.safe_load(text)
    except (yaml.YAMLError, OSError, *MALFORMED) as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"cannot be read as YAML: {told}", where=path, remedy="copy the file again"
        ) from error


def _require_family(model: Section, where: Path) -> None:
    """The name alone says nothing: that of STTS is in none of the public registries."""
    name = str(model.data.get("model_name", "")).lower().replace("-", "_")
    others = {
        "MolmoPoint": "point" in name or "patch_embedding_kind" in model.data,
        "MolmoAct2": "act" in name or "action_expert" in model.data,
        "MolmoMotion": "motion" in name or "trajectory" in name,
    }
    for family, told in others.items():
        if told:
            raise ConfigError(
                f"a model of another family: {family} (model_name {show(name)})",
                where=where,
                remedy="Molmo2 and its STTS models are read",
            )


class _Reading:
    def __init__(self, model: Section, problems: list[str]) -> None:
        self.problems = problems
        self.notes: list[str] = []
        self.model, self.llm = model, model.inner("llm")
        self.backbone = model.inner("vision_backbone")
        self.vit = self.backbone.inner("vit")
        self.prompts = model.inner("mm_preprocessor")

    def read(self) -> TrainingConfig:
        cfg = config_from_published(self._hub_config())
        scorer = self._scorer()
        declared = self.vit.whole("image_num_layers")
        stored = declared if self.backbone.data.get("skip_unused_layers") is False else 0
        tokenizer = self.llm.inner("tokenizer").data.get("identifier", "unknown")
        cfg = replace(cfg, scorer=scorer, attention=self._attention())
        usage = self._usage(scorer is not None)
        self._note_removed()
        return TrainingConfig(
            config=cfg,
            usage=usage,
            tied=bool(self.llm.data.get("weight_tying", False)),
            unused_blocks=range(cfg.vision.num_layers, max(stored, cfg.vision.num_layers)),
            tokenizer=str(tokenizer),
            notes=tuple(self.notes),
        )

    # ---- shapes ----------------------------------------------------------------------------------

    def _hub_config(self) -> dict[str, Any]:
        self.backbone.expect("attention_meanq", "image_pooling_2d")
        self.backbone.expect("mlp", "image_projector")
        self.backbone.expect(None, "image_padding_embed", "pool_size_embeds")
        self.backbone.expect(False, "use_deepstack")
        self.vit.expect("siglip", "image_model_type", "resize_mode", "normalize")
        heads = {
            "num_attention_heads": self.vit.whole("image_num_heads"),
            "num_key_value_heads": self.vit.whole("image_num_key_value_heads", "image_num_heads"),
            "head_dim": self.vit.whole("image_head_dim"),
        }
        width = self.vit.whole("image_emb_dim")
        text = self._text_config()
        return {
            "model_type": MODEL_TYPE,
            "vit_config": {
                **heads,
                "hidden_size": width,
                "intermediate_size": self.vit.whole("image_mlp_dim"),
                "num_hidden_layers": self.vit.whole("image_num_layers"),
                "hidden_act": self.vit.data.get("image_mlp_activations", "gelu_pytorch_tanh"),
                "layer_norm_eps": self.vit.number("image_norm_eps", default=1e-6),
                "image_default_input_size": self.vit.wholes("image_default_input_size"),
                "image_patch_size": self.vit.whole("image_patch_size", default=14),
                "image_num_pos": self.vit.whole("image_num_pos"),
            },
            "adapter_config": {
                **heads,
                "vit_layers": self.backbone.wholes("vit_layers"),
                "pooling_attention_mask": self.backbone.data.get("pooling_attention_mask", False),
                "hidden_size": width,
                "intermediate_size": text["intermediate_size"],
                "hidden_act": "silu",
                "text_hidden_size": text["hidden_size"],
            },
            "text_config": text,
        }

    def _text_config(self) -> dict[str, Any]:
        llm = self.llm
        llm.expect("swiglu", "activation_type")
        llm.expect("sequential", "block_type")
        llm.expect("rms", "layer_norm_type")
        llm.expect(True, "rope", "attention_layer_norm", "layer_norm_with_affine")
        llm.expect(False, "include_bias", "scale_logits", "normalize_input_embeds")
        llm.expect(None, "clip_qkv")
        width, heads = llm.whole("d_model"), llm.whole("n_heads")
        hidden = llm.whole("mlp_hidden_size", default=llm.whole("mlp_ratio", default=4) * width)
        if hidden % 2:
            llm.fault("mlp_hidden_size", hidden, "twice a width")
        scaling = {
            name.removeprefix("rope_"): llm.data[name]
            for name in (
                *("rope_factor", "rope_attention_factor", "rope_beta_fast", "rope_beta_slow"),
                *("rope_original_max_position_embeddings", "rope_truncate"),
                *("rope_mscale", "rope_mscale_all_dim"),
            )
            if llm.has(name)
        }
        kind = llm.data.get("rope_type", "default")
        layers = llm.whole("n_layers", most=MOST["num_layers"])
        scaled = None
        if llm.has("full_attention_layers"):
            scaled = llm.wholes("full_attention_layers")
            if llm.data.get("sliding_attention_rope_scaling", False):
                scaled = [layer for layer in range(layers) if layer not in scaled]
        return {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": llm.whole("n_kv_heads", default=heads),
            "head_dim": llm.whole("head_dim", default=width // heads),
            "vocab_size": llm.whole("embedding_size", "vocab_size"),
            "additional_vocab_size": llm.whole("additional_vocab_size"),
            "qkv_bias": llm.data.get("qkv_bias", False),
            "num_hidden_layers": layers,
            "intermediate_size": hidden // 2,
            "hidden_act": "silu",
            "max_position_embeddings": llm.whole("max_position_embeddings", "max_sequence_length"),
            "rope_theta": llm.number("rope_theta"),
            "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
            "rope_scaling_layers": scaled,
            "qk_norm_type": llm.data.get("attention_layer_norm_type", "olmo"),
            "layer_norm_eps": llm.number("layer_norm_eps"),
            "norm_after": llm.data.get("norm_after", False),
        }

    def _attention(self) -> VisionAttention:
        told = self.model.data.get("bi_directional_attn")
        if told not in ATTENTION:
            self.model.fault("bi_directional_attn", told, f"one of {', '.join(ATTENTION)}")
            return VisionAttention.ALL
        return ATTENTION[told]

    def _scorer(self) -> ScorerConfig | None:
        """Whether one was trained; its weights have to be there then."""
        vit = self.vit
        if not vit.has("topk") and not vit.has("prune_method"):
            return None
        if not vit.data.get("prune", True):
            return None
        method = vit.data.get("prune_method", "scorer")
        if method != "scorer":
            self.notes.append(f"trained with {method} pruning, so there is no scorer")
            return None
        vit.expect(0, "prune_from_frame")
        vit.expect(True, "pruning_in_scorer")
        vit.expect(False, "merge")
        lowest = vit.number("rescale_bias_min", default=math.exp(-2))
        prune_at = vit.data.get("prune_at", 3)
        if type(prune_at) is not int or prune_at < 0:
            vit.fault("prune_at", prune_at, "a block")
            prune_at = 0
        return ScorerConfig(
            prune_at=prune_at,
            num_heads=vit.whole("image_num_heads"),
            head_dim=vit.whole("image_head_dim"),
            mlp_width=vit.whole("image_mlp_dim"),
            rescale=Rescale.ROW,
            rescale_min=float(lowest),
        )

    # ---- prompts and pictures --------------------------------------------------------------------

    def _usage(self, scored: bool) -> Usage:
        """Newer configs keep the video's settings in a section of their own; older ones had them
        one level up, and always marked each frame."""
        video, markers_each = self.prompts, True
        if self.prompts.has("video"):
            video = self.prompts.inner("video")
            markers_each = bool(video.data.get("per_frame_special_token", False))
        if not markers_each:
            self.notes.append(
                "trained with one pair of markers around the whole video; each frame gets its own "
                "here, as in the published folders"
            )
        video.expect("per-frame-compact", "time_mode")
        video.expect(CELL, "pooling_h", "pooling_w")
        images, columns, low_start = self._images()
        style = replace(
            RELEASED,
            own_frame_markers=bool(video.data.get("use_frame_special_tokens", True)),
            low_res_columns=columns,
            low_res_start=low_start,
        )
        return Usage(
            style=style,
            images=images,
            frames=self._frames(video),
            defaults={"keep_ratio": self._keep_ratio()} if scored else {},
        )

    def _frames(self, video: Section) -> FrameRule:
        fps: Any = video.data.get("max_fps")
        if isinstance(fps, list) and len(fps) == 1:
            fps = fps[0]
        if fps is not None and (type(fps) not in (int, float) or not 0 < fps < math.inf):
            video.fault("max_fps", fps, "one number above 0")
            fps = None
        if video.has("frame_sample_mode"):
            video.expect(UNIFORM_LAST_FRAME, "frame_sample_mode")
        return FrameRule(
            num_frames=video.whole("max_frames"),
            max_fps=2.0 if fps is None else float(fps),
        )

    def _images(self) -> tuple[ImageConfig | None, bool, bool]:
        """How pictures are cut, whether rows of the low-resolution view end with a column token,
        and whether it has a start token of its own. STTS was trained on video alone."""
        image = self.prompts.inner("image")
        mode = image.data.get("crop_mode")
        if mode != CROPS:
            if mode is not None:
                self.notes.append(
                    f"still pictures were cut by {mode!r}, which is not computed here: the model "
                    "reads video only"
                )
            return None, False, True
        image.expect(True, "use_col_tokens")
        columns = image.data.get("use_single_crop_col_tokens")
        overlap = image.wholes("overlap_margins") if image.has("overlap_margins") else [4, 4]
        pool = image.whole("pooling_h", default=2)
        image.expect(pool, "pooling_w", "multi_image_pooling_h", "multi_image_pooling_w")
        cut = ImageConfig(
            max_crops=image.whole("max_crops", default=8),
            overlap=(overlap[0], overlap[-1]),
            pool=pool,
        )
        start = bool(image.data.get("use_single_crop_start_token", False))
        return cut, columns is None or bool(columns), start

    def _keep_ratio(self) -> float:
        """`topk` is the share that is removed."""
        removed = float(self.vit.number("topk", default=0.5))
        self.prompts.expect(removed, "topk")
        if not 0 < removed < 1:
            self.vit.fault("topk", removed, "a share below 1")
            return 0.5
        return round(1.0 - removed, 6)

    def _note_removed(self) -> None:
        data: Mapping[str, Any] = self.backbone.data
        self.backbone.expect(2, "image_pooling_h", "image_pooling_w")
        for name in REMOVED:
            if data.get(name):
                self.backbone.fault(name, data[name], "off")
        removed = [
            name
            for name in (*REMOVED, "fix_image_padding", "image_pooling_h", "image_pooling_w")
            if name in data
        ]
        if removed:
            self.notes.append(f"settings of an older version are ignored: {', '.join(removed)}")
