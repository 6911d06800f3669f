"""A published Molmo2 folder in small: random weights, the hub's names, its ten extra tokens and its
processor file, and the bundle that the real exporter makes of it. Shared and read-only."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.model.published.folder import load_published
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.presets import tiny
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from tests.tiny import WORDS, kept

LIMITS = GraphLimits(max_frames=2, opt_tokens=32, max_tokens=160, max_past=1024)
CUT = ImageConfig(max_crops=5, overlap=(2, 3))
TEXT_SPECIAL = ("<|endoftext|>", "<unk>", "<|im_end|>", "<|im_start|>")
# In the order of the published ids.
EXTRA = (
    *("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>"),
    *("<im_low>", "<frame_start>", "<frame_end>", "<|video|>"),
)


def published_folder() -> Path:
    """config.json, model.safetensors, tokenizer.json and preprocessor_config.json."""
    return kept("tiny-molmo2", _make_folder)


def _make_folder(folder: Path) -> None:
    words = small_tokenizer()
    cfg = config(words.get_vocab_size() - len(EXTRA))
    torch.manual_seed(5)
    model = VideoLM(cfg)
    with torch.no_grad():
        # Weights so large that another picture, order, position or mask gives another answer.
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.15 if "embed" in name else 0.2
            parameter.copy_(1 + 0.2 * noise if is_norm else scale * noise)
        model.llm.head.weight[words.token_to_id("<|im_end|>")] = 0.0  # so that it does not end
    save_published(folder, model.eval())
    words.save(str(folder / "tokenizer.json"))
    rules = {
        "max_crops": CUT.max_crops,
        "overlap_margins": list(CUT.overlap),
        "pooling_size": [CUT.pool, CUT.pool],
        "patch_size": cfg.vision.patch_size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(rules))


@lru_cache(maxsize=1)
def published_model() -> VideoLM:
    return load_published(published_folder())


def image_bundle() -> Path:
    """Folder of the exported bundle, which has an `image_encoder`."""
    options = ExportOptions(limits=LIMITS, defaults={"max_time_s": 600.0})
    return kept("tiny-molmo2-bundle", lambda to: export_bundle(published_folder(), to, options))


def config(base_vocab: int) -> ModelConfig:
    """`tiny` as a published model: no scorer, every vision token sees every other one."""
    cfg = tiny(base_vocab, len(EXTRA))
    language = dataclasses.replace(cfg.language, max_positions=1024)
    return dataclasses.replace(cfg, scorer=None, attention=VisionAttention.ALL, language=language)


def small_tokenizer(texts: str = WORDS) -> tokenizers.Tokenizer:
    """With the words of `texts` and the published markers behind them."""
    pieces = {"\n", " ", ".", "?", "user", "assistant", *map(str, range(10))}
    pieces |= set(re.findall(r"[a-z]+|[^a-z]|[A-Z][a-z]*", texts))
    pieces |= {*'<>/"=;', "points", "tracks", "coords"}  # for scripted answers that point
    base = [*TEXT_SPECIAL, *sorted(pieces)]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({t: i for i, t in enumerate(base)}, unk_token="<unk>")
    )
    pattern = tokenizers.Regex(r"[0-9]|[A-Za-z]+|[^A-Za-z0-9]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([*TEXT_SPECIAL, *EXTRA])
    assert backend.token_to_id(EXTRA[0]) == len(base)
    return backend
