"""Folders that are not what they should be: one typed error that lists what is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_vlm.errors import (
    CheckpointError,
    ConfigError,
    WeightFilesError,
    WeightNamesError,
)
from edge_vlm.model.published.files import INDEX, WEIGHTS
from edge_vlm.model.published.folder import load_published
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.video_lm import VideoLM
from tests.model.peers import variant

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as a folder of one file and as a folder of several."""
    made = tmp_path_factory.mktemp("good")
    model = VideoLM(variant("4b")).init_weights(torch.Generator().manual_seed(0))
    save_published(made / "whole", model)
    save_published(made / "cut", model, max_shard_bytes=60_000)
    assert len(list((made / "cut").glob("*.safetensors"))) >= 4
    return made


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A good folder in one file."""
    return Path(shutil.copytree(good / "whole", tmp_path / "model"))


@pytest.fixture
def shards(good: Path, tmp_path: Path) -> Path:
    """A good folder in several files."""
    return Path(shutil.copytree(good / "cut", tmp_path / "model"))


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)


def refused(folder: Path, kind: type[CheckpointError | ConfigError], *parts: str) -> Any:
    """The error, which names the folder, says everything of `parts` and what to do, in one line."""
    with pytest.raises(kind) as caught:
        load_published(folder)
    text = str(caught.value)
    for part in (str(folder), *parts):
        assert part in text
    assert caught.value.remedy
    assert "\n" not in text
    return caught.value


@pytest.mark.parametrize("keep", [0, 5, 8, 300, -1])
def test_a_cut_off_file(folder: Path, keep: int) -> None:
    size = (folder / WEIGHTS).stat().st_size
    cut(folder / WEIGHTS, keep % size)
    error = refused(folder, WeightFilesError, f"{WEIGHTS} is cut off")
    if keep == -1:
        assert f"{size - 1:,} bytes, expected {size:,}" in str(error)


def test_every_fault_of_the_files_is_in_one_error(shards: Path) -> None:
    names = [shard(shards, i).name for i in range(4)]
    cut(shards / names[0], 1000)
    (shards / names[1]).unlink()
    (shards / names[2]).write_text(LFS)
    with (shards / names[3]).open("ab") as file:
        file.write(b"more")
    error = refused(shards, WeightFilesError)
    assert len(error.problems) == 4
    first, second, third, fourth = error.problems
    assert first.startswith(f"{names[0]} is cut off")
    assert second == f"{names[1]} is missing"
    assert third == f"{names[2]} is a git-lfs pointer, the weights were not fetched"
    assert fourth.startswith(f"{names[3]} is longer than its header says")


def test_tensors_of_a_wrong_type(folder: Path) -> None:
    quantised = "lm_head.weight"
    edit_weights(folder / WEIGHTS, lambda w: w.update({quantised: w[quantised].to(torch.int8)}))
    error = refused(folder, WeightNamesError, f"{quantised} is I8, expected F32, BF16, F16")
    assert len(error.mistyped) == 1
    assert not (error.missing)
    assert not (error.unknown)
    assert not (error.misshaped)


def test_extra_and_missing_names(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.vision_backbone.image_vit.cls"] = torch.zeros(3)
        del weights["lm_head.weight"]

    edit_weights(folder / WEIGHTS, change)
    error = refused(folder, WeightNamesError, "missing: lm_head.weight", "image_vit.cls")
    assert error.unknown == ("model.vision_backbone.image_vit.cls",)
    assert error.missing == ("lm_head.weight",)


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_opened(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    refused(folder, WeightFilesError, "pytorch_model.bin: pickles are never opened", "safetensors")
    assert not trace.exists()


@pytest.mark.parametrize("make", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_that_is_called_safetensors(folder: Path, make: Any, tmp_path: Path) -> None:
    if make is None:
        torch.save({"a": torch.zeros(3)}, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).write_bytes(make(Bomb(tmp_path / "opened")))
    refused(folder, WeightFilesError, f"{WEIGHTS} is a pickle")
    assert not (tmp_path / "opened").exists()


def test_an_index_that_names_pickles_or_files_elsewhere(shards: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        names = list(index["weight_map"])
        index["weight_map"] |= {names[0]: "model-1.bin", names[1]: "../secret.safetensors"}

    edit_json(shards / INDEX, change)
    error = refused(shards, WeightFilesError, "'model-1.bin'", "'../secret.safetensors'")
    assert len(error.problems) == 2


def test_an_index_that_disagrees_with_its_shards(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    first, last = shard(shards, 0), shard(shards, -1)
    gone = next(name for name, file in index.items() if file == first.name)
    edit_weights(first, lambda w: w.pop(gone))
    edit_weights(last, lambda w: w.update(surplus=torch.zeros(2)))
    refused(
        shards,
        WeightFilesError,
        f"{first.name} lacks {gone}, which the index puts there",
        f"{last.name} holds surplus, which the index does not list",
    )


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first, last = shard(shards, 0), shard(shards, -1)
    name, tensor = next(iter(load_file(first).items()))
    edit_weights(last, lambda w: w.update({name: tensor}))
    refused(shards, WeightFilesError, f"{name} is in {first.name} and in {last.name}")


@pytest.mark.parametrize(
    "content", [b"\x10\0\0\0\0\0\0\0{not json at all", b"some text, no header"]
)
def test_a_file_of_another_kind(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, WeightFilesError, WEIGHTS, "safetensors")


def test_a_header_that_lies_about_sizes(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(folder, WeightFilesError, "another size than their shape's: a")


def test_shards_without_their_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    refused(shards, WeightFilesError, shard(shards, 0).name, INDEX)


@pytest.mark.parametrize(
    ("section", "field", "value", "kind"),
    [
        ("text_config", "hidden_size", 48, "misshaped"),
        ("text_config", "num_hidden_layers", 5, "missing"),
        ("text_config", "num_hidden_layers", 3, "unknown"),
        ("text_config", "num_key_value_heads", 1, "misshaped"),
        ("text_config", "qk_norm_type", "olmo", "misshaped"),
        ("text_config", "additional_vocab_size", 17, "misshaped"),
        ("vit_config", "intermediate_size", 50, "misshaped"),
        ("adapter_config", "vit_layers", [3, 2], "unknown"),
    ],
)
def test_a_config_that_disagrees_with_the_weights(
    folder: Path, section: str, field: str, value: object, kind: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        config[section][field] = value
        if field == "hidden_size":
            config["adapter_config"]["text_hidden_size"] = value

    edit_json(folder / "config.json", change)
    error = refused(folder, WeightNamesError, "config that was published with them")
    assert getattr(error, kind)


def test_a_folder_of_another_family(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="qwen2_vl"))
    refused(folder, ConfigError, "another family", "'qwen2_vl'", "expected 'molmo2'")


def test_quantised_folders_are_named_before_their_weights_are_looked_at(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    told = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(told))
    refused(folder, ConfigError, "quantised already (NVFP4)", "--precision int4")
    (folder / "hf_quant_config.json").unlink()
    edit_json(folder / "config.json", lambda c: c.update(quantization={"bits": 4}))
    refused(folder, ConfigError, "quantised already (MLX)")


def test_weights_of_another_family(folder: Path) -> None:
    save_file({"visual.patch_embed.proj.weight": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, WeightNamesError, "visual.patch_embed.proj.weight", "known namings")


def test_a_vision_side_alone(folder: Path) -> None:
    save_file({"image_vit.positional_embedding": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, CheckpointError, "without a language model")


def test_a_scorer_without_room(folder: Path) -> None:
    name = "model.vision_backbone.image_vit.transformer.temporal_token_scorer.mlp.w1.bias"
    edit_weights(folder / WEIGHTS, lambda w: w.update({name: torch.zeros(4)}))
    with pytest.raises(ConfigError, match="no room for the scorer"):
        load_published(folder)


def test_no_folder_no_config_no_json(folder: Path) -> None:
    refused(folder / "nowhere", CheckpointError, "there is no such folder")
    refused(Path("allenai/Molmo2-4B"), CheckpointError, "edge-vlm pull allenai/Molmo2-4B")
    refused(folder / "config.json", CheckpointError, "is a file")
    (folder / "config.json").write_text("{")
    refused(folder, CheckpointError, "cannot be read as JSON")
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "there is no config.json")


def test_our_own_checkpoints_are_checked_alike(tmp_path: Path) -> None:
    from edge_vlm.model.checkpoint import load_checkpoint, save_checkpoint

    cfg = variant("4b")
    words = tmp_path / "tokenizer.json"
    words.write_text("{}")
    save_checkpoint(tmp_path, cfg, VideoLM(cfg).state_dict(), words)
    assert load_checkpoint(tmp_path).cfg == cfg
    cut(tmp_path / WEIGHTS, 10_000)
    with pytest.raises(WeightFilesError, match="cut off"):
        load_checkpoint(tmp_path)
    other = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, mlp_width=8))
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight .* in the place of"):
        save_checkpoint(tmp_path, other, VideoLM(cfg).state_dict(), words)
    save_checkpoint(tmp_path, cfg, VideoLM(cfg).state_dict(), words)
    edit_json(tmp_path / "config.json", lambda c: c["language"].update(mlp_width=8))
    with pytest.raises(WeightNamesError, match=r"llm\.blocks\.0\.mlp\.gate\.weight"):
        load_checkpoint(tmp_path)
