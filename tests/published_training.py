"""Small folders of Molmo2's training repository, written by torch itself.

    python -m tests.published_training RANK STORE WEIGHTS TARGET

is one of two processes that together write a distributed checkpoint.
"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import Shard, distribute_tensor

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.model.published.mapping import to_published
from edge_vlm.model.published.names import TRAINING
from edge_vlm.model.video_lm import VideoLM

ROOT = Path(__file__).parents[1]
HEAD = "transformer.ff_out.weight"
RANKS = 2


def training_config(cfg: ModelConfig, *, tied: bool = False, old: bool = False) -> dict[str, Any]:
    """`config.yaml` of such a model; `old` is the generation with the video's settings on top."""
    vision, language, scorer = cfg.vision, cfg.language, cfg.scorer
    scaling = language.rope_scaling
    llm: dict[str, Any] = {
        "d_model": language.width,
        "n_heads": language.num_heads,
        "n_kv_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "qkv_bias": False,
        "clip_qkv": None,
        "n_layers": language.num_layers,
        "mlp_ratio": 4,
        "mlp_hidden_size": 2 * language.mlp_width,
        "activation_type": "swiglu",
        "block_type": "sequential",
        "rope": True,
        "rope_theta": language.rope_theta,
        "rope_type": "default" if scaling is None else "yarn",
        "full_attention_layers": None,
        "sliding_attention_rope_scaling": False,
        "attention_layer_norm": True,
        "attention_layer_norm_type": "olmo" if language.full_qk_norm else "qwen3",
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "layer_norm_eps": language.norm_eps,
        "include_bias": False,
        "bias_for_layer_norm": None,
        "norm_after": language.post_norm,
        "max_sequence_length": language.max_positions,
        "max_position_embeddings": None,
        "vocab_size": language.base_vocab - 3,
        "embedding_size": language.base_vocab,
        "additional_vocab_size": language.extra_vocab,
        "weight_tying": tied,
        "scale_logits": False,
        "normalize_input_embeds": False,
        "residual_dropout": 0.1,
        "tokenizer": {"identifier": "Qwen/Qwen3-4B-Instruct-2507", "tokenizer_dir": None},
    }
    if scaling is not None:
        llm |= {
            "rope_factor": scaling.factor,
            "rope_attention_factor": scaling.attention_factor,
            "rope_original_max_position_embeddings": scaling.original_max_positions,
            "rope_beta_fast": scaling.beta_fast,
            "rope_beta_slow": scaling.beta_slow,
            "rope_truncate": None,
            "full_attention_layers": list(scaling.layers),
        }
    vit: dict[str, Any] = {
        "image_model_type": "siglip",
        "image_default_input_size": [vision.image_size] * 2,
        "image_patch_size": vision.patch_size,
        "image_emb_dim": vision.width,
        "image_num_heads": vision.num_heads,
        "image_num_key_value_heads": vision.num_heads,
        "image_head_dim": vision.head_dim,
        "image_num_layers": vision.num_layers + 2,  # as the published ones, two are not built
        "image_mlp_dim": vision.mlp_width,
        "image_mlp_activations": "gelu_pytorch_tanh",
        "image_num_pos": vision.num_patches,
        "image_norm_eps": vision.norm_eps,
        "resize_mode": "siglip",
        "normalize": "siglip",
    }
    video = {
        "max_frames": 64,
        "frame_sample_mode": "uniform_last_frame",
        "max_fps": [2.0],
        "time_mode": "per-frame-compact",
        "pooling_h": 3,
        "pooling_w": 3,
        "use_frame_special_tokens": True,
    }
    image = {
        "crop_mode": "overlap-and-resize-c2",
        "use_col_tokens": True,
        "max_crops": 5,
        "pooling_h": 2,
        "pooling_w": 2,
        "overlap_margins": [2, 3],
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
    }
    prompts: dict[str, Any] = {"video": {**video, "per_frame_special_token": True}, "image": image}
    if old:
        prompts = {**video, "max_crops": 1, "image": None}
    if scorer is not None:
        vit |= {
            "topk": 0.3,
            "new_ref_threshold": 0.85,
            "merge": False,
            "prune_at": scorer.prune_at,
            "prune": True,
            "prune_method": "scorer",
            "sim_reg_loss_coefficient": 0.5,
            "rescale_bias_min": scorer.rescale_min,
            "prune_from_frame": 0,
            "pruning_in_scorer": True,
        }
        prompts["topk"] = 0.3
    model = {
        "model_name": "temporal_video_olmo",
        "llm": llm,
        "vision_backbone": {
            "vit": vit,
            "image_pooling_2d": "attention_meanq",
            "pooling_attention_mask": True,
            "image_projector": "mlp",
            "image_padding_embed": None,
            "pool_size_embeds": None,
            "use_deepstack": False,
            "skip_unused_layers": True,
            "vit_layers": [i - vision.num_layers - 2 for i in vision.feature_layers],
        },
        "mm_preprocessor": prompts,
        "bi_directional_attn": (
            "image_tokens" if cfg.attention is VisionAttention.ALL else "within_image"
        ),
    }
    return {"run_name": "a run", "seed": 6198, "model": model, "optimizer": {"metrics": None}}


def as_trained(cfg: ModelConfig) -> ModelConfig:
    """In that repository the projector's MLP is as wide as the language model's."""
    connector = dataclasses.replace(cfg.connector, mlp_width=cfg.language.mlp_width)
    return dataclasses.replace(cfg, connector=connector)


def published_weights(model: VideoLM, *, tied: bool = False) -> dict[str, Tensor]:
    weights = to_published(TRAINING, model.cfg, model.state_dict())
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    if tied:
        assert torch.equal(weights.pop(HEAD), weights["transformer.wte.embedding"])
    return weights


def tie(model: VideoLM) -> VideoLM:
    """The head becomes the base rows of the embedding table."""
    base = model.cfg.language.base_vocab
    with torch.no_grad():
        model.llm.head.weight.copy_(model.llm.embed.weight[:base])
    return model


def write_unsharded(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(weights, folder / "model.pt")
    torch.save({"state": {}}, folder / "optim.pt")
    return folder


def write_sharded(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any], ranks: int = 1
) -> Path:
    target = folder / "model_and_optim"
    target.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "train").mkdir()
    torch.save({"global_step": 5}, folder / "train" / "rank0.pt")
    if ranks == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process, as asked for
            save_shards(_state(weights), checkpoint_id=str(target), no_dist=True)
    else:
        torch.save(weights, folder / "whole.pt")
        command = [sys.executable, "-m", "tests.published_training"]
        files = [str(folder / "store"), str(folder / "whole.pt"), str(target)]
        running = [
            subprocess.Popen([*command, str(rank), *files], cwd=ROOT) for rank in range(ranks)
        ]
        assert [process.wait(120) for process in running] == [0] * ranks
    _rename_storage_info(target / ".metadata")
    return folder


def _state(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    moments = {f"optim.state.{n}.exp_avg": torch.zeros(2) for n in list(weights)[:2]}
    return {**{f"model.{n}": t for n, t in weights.items()}, **moments, "optim.step": 7}


@dataclasses.dataclass
class _StorageInfo:
    relative_path: str
    offset: int
    length: int


@contextmanager
def _their_modules() -> Iterator[None]:
    """The repository's own writer has a class of its own for where a shard lies."""
    names = ("olmo", "olmo.train", "olmo.train.remote_filesystem")
    modules = {name: types.ModuleType(name) for name in names}
    _StorageInfo.__module__ = names[-1]
    modules[names[-1]]._StorageInfo = _StorageInfo  # type: ignore[attr-defined]
    sys.modules |= modules
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def read_index(path: Path) -> Metadata:
    with _their_modules():
        metadata: Metadata = pickle.loads(path.read_bytes())
    return metadata


def write_index(path: Path, metadata: Metadata, protocol: int | None = None) -> None:
    with _their_modules():
        path.write_bytes(pickle.dumps(metadata, protocol))


def _rename_storage_info(path: Path) -> None:
    metadata = read_index(path)
    metadata.storage_data = {
        index: _StorageInfo(found.relative_path, found.offset, found.length)
        for index, found in metadata.storage_data.items()
    }
    write_index(path, metadata)


def _one_rank(rank: int, store: str, source: str, target: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    weights = torch.load(source, weights_only=True)
    shards = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in weights.items()}
    save_shards(_state(shards), checkpoint_id=target)
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), *sys.argv[2:5])
