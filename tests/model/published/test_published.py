"""Published folders: loaded as they are, written so that transformers answers the same."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.published.config import published_config
from edge_vlm.model.published.folder import load_published, open_published
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.published.mapping import to_ours, to_published
from edge_vlm.model.published.names import HUB, TRAINING, TRANSFORMERS
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.model.peers import (
    TOLERANCE,
    largest,
    load_ours,
    load_peer,
    our_logits,
    parameters_of,
    peer_logits,
    random_peer,
    variant,
    video_prompt,
)

VARIANTS = ("4b", "8b", "o-7b")
SHARD_BYTES = 30_000


@dataclasses.dataclass(frozen=True)
class Pair:
    cfg: ModelConfig
    peer: Any
    ours: VideoLM


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    cfg = variant(request.param)
    peer = random_peer(cfg)
    return Pair(cfg, peer, load_ours(cfg, to_ours(TRANSFORMERS, cfg, peer.state_dict())))


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_a_folder_of_transformers_loads_here(
    pair: Pair, max_shard_size: str, tmp_path: Path
) -> None:
    pair.peer.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "30KB")
    model = load_published(tmp_path)
    assert model.cfg == pair.cfg
    prompt = video_prompt(pair.cfg)
    assert largest(peer_logits(pair.peer, prompt) - our_logits(model, prompt)) <= TOLERANCE


@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD_BYTES])
def test_our_folder_loads_in_transformers(pair: Pair, max_shard_bytes: int, tmp_path: Path) -> None:
    """From transformers to here to a hub folder to transformers: the same logits to the bit."""
    save_published(tmp_path / "out", pair.ours, max_shard_bytes=max_shard_bytes)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == SHARD_BYTES)
    prompt = video_prompt(pair.cfg)
    loaded = load_peer(tmp_path / "out")
    assert torch.equal(peer_logits(loaded, prompt), peer_logits(pair.peer, prompt))
    again = load_published(tmp_path / "out")
    assert again.cfg == pair.cfg
    assert torch.equal(our_logits(again, prompt), our_logits(pair.ours, prompt))


def test_a_shard_holds_no_more_than_it_may(pair: Pair, tmp_path: Path) -> None:
    save_published(tmp_path, pair.ours, max_shard_bytes=SHARD_BYTES)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held, most = [], 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        sizes = [t.numel() * t.element_size() for t in tensors.values()]
        assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
        held += sizes
        most = max(most, len(sizes))
    assert most > 1
    assert sum(held) == index["metadata"]["total_size"]
    assert len(held) == len(index["weight_map"])


def test_the_training_repositorys_names_load(pair: Pair, tmp_path: Path) -> None:
    published = to_published(TRAINING, pair.cfg, pair.ours.state_dict())
    save_file({n: t.clone() for n, t in published.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published_config(pair.cfg)))
    assert open_published(tmp_path).naming is TRAINING
    prompt = video_prompt(pair.cfg)
    loaded = load_published(tmp_path)
    assert torch.equal(our_logits(loaded, prompt), our_logits(pair.ours, prompt))


def stts(cfg: ModelConfig) -> ModelConfig:
    """With more ViT blocks, so that a scorer behind the fourth one has room."""
    vision = dataclasses.replace(cfg.vision, num_layers=7, feature_layers=(6, 5))
    scorer = dataclasses.replace(tiny().scorer, prune_at=3, rescale=Rescale.ROW)  # type: ignore[type-var]
    return dataclasses.replace(cfg, vision=vision, scorer=scorer)


@pytest.mark.parametrize("naming", [HUB, TRAINING], ids=lambda naming: naming.name)
def test_a_scorer_is_found_by_its_weights(naming: Any, tmp_path: Path) -> None:
    cfg = stts(variant("4b"))
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).eval()
    if naming is HUB:
        save_published(tmp_path, model)
    else:
        weights = to_published(naming, cfg, model.state_dict())
        save_file({n: t.clone() for n, t in weights.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(published_config(cfg)))
    loaded = load_published(tmp_path)
    assert loaded.cfg == cfg
    theirs, mine = loaded.state_dict(), model.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)


def test_blocks_that_no_weights_exist_for_are_not_built(tmp_path: Path) -> None:
    """The published folders declare 27 ViT blocks and hold the 25 that are read."""
    cfg = variant("4b")
    vision = dataclasses.replace(cfg.vision, num_layers=9, feature_layers=(8, 2))
    cfg = dataclasses.replace(cfg, vision=vision)
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).eval()
    save_published(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vit_config"]["num_hidden_layers"] = 11
    config["adapter_config"]["vit_layers"] = [-3, -9]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, prompt = load_published(tmp_path), video_prompt(cfg)
    assert loaded.cfg == cfg
    assert largest(peer_logits(load_peer(tmp_path), prompt) - our_logits(loaded, prompt)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_has_the_type_that_was_asked_for(
    pair: Pair, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_published(tmp_path, pair.ours)
    model = load_published(tmp_path, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    mine, stored = model.state_dict(), pair.ours.state_dict()
    assert all(torch.equal(mine[name], stored[name].to(dtype)) for name in stored)
    with pytest.raises(ValueError, match="int8"):
        load_published(tmp_path, torch.int8)


def test_a_loaded_model_does_not_write_into_its_files(pair: Pair, tmp_path: Path) -> None:
    """Weights are mapped, and private: training a loaded model leaves the folder as it was."""
    save_published(tmp_path, pair.ours)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in load_published(tmp_path).parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_companions_are_taken_over(pair: Pair, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_published(source, pair.ours)
    config = json.loads((source / "config.json").read_text()) | {"image_patch_id": 7, "note": "x"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    (source / "training_state.pt").write_text("not for others")
    save_published(tmp_path / "out", pair.ours, companions=source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    other = dataclasses.replace(variant("4b"), vision=tiny().vision)
    language = dataclasses.replace(other.language, norm_eps=1e-3)
    stranger = VideoLM(dataclasses.replace(other, language=language))
    with pytest.raises(ConfigError, match="another model"):
        save_published(tmp_path / "third", stranger, companions=source)


def test_what_a_published_folder_cannot_say_is_refused(tmp_path: Path) -> None:
    cfg = variant("4b")
    vision = dataclasses.replace(cfg.vision, feature_layers=(3, 2))
    with pytest.raises(ConfigError, match="5 ViT blocks, expected the 4"):
        save_published(tmp_path, VideoLM(dataclasses.replace(cfg, vision=vision)))
    assert not any(tmp_path.iterdir())
    (tmp_path / "here").write_text("x")
    with pytest.raises(CheckpointError, match="in the way"):
        save_published(tmp_path, VideoLM(variant("4b")))


MEASURE = """
import gc
import sys
import threading
from pathlib import Path

import torch

from edge_vlm.model.published.folder import load_published


def own() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def watch() -> None:
    while not done.wait(0.002):
        peaks.append(own())


for dtype in (getattr(torch, name) for name in sys.argv[3:]):
    load_published(Path(sys.argv[2]), dtype)  # whatever libraries set up at first is not counted
    before, done, peaks = own(), threading.Event(), [0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_published(Path(sys.argv[1]), dtype)
    done.set()
    watcher.join()
    print(max(*peaks, own()) - before)
    del model
    gc.collect()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_loading_takes_no_second_copy_of_the_model(tmp_path: Path) -> None:
    """As stored: only the joined embedding table is new memory. Converted: the new type's size."""
    cfg = variant("4b")
    save_published(tmp_path / "small", VideoLM(cfg))
    language = dataclasses.replace(cfg.language, width=640, mlp_width=2560, base_vocab=3000)
    model = VideoLM(dataclasses.replace(cfg, language=language))
    save_published(tmp_path / "large", model, max_shard_bytes=30_000_000)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 1
    size = 4 * parameters_of(model)
    table = 4 * model.llm.embed.weight.numel()
    assert size > 8 * table > 50e6
    slack = 10e6
    most = {"float32": table, "bfloat16": size // 2}
    folders = [str(tmp_path / name) for name in ("large", "small")]
    command = [sys.executable, "-c", MEASURE, *folders, *most]
    # What the first of them frees is given back at once, or the second could take it unseen.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    root = Path(__file__).parents[3]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=env)
    for found, (dtype, allowed) in zip(run.stdout.split(), most.items(), strict=True):
        assert int(found) <= allowed + slack, dtype


def test_the_files_can_be_read_by_others(pair: Pair, tmp_path: Path) -> None:
    """A server often runs as another user than whoever saved the model."""
    save_published(tmp_path, pair.ours)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in tmp_path.iterdir())
