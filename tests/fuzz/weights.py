"""Formats of weights and of training, each with a file that is in order."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from edge_vlm.config import ModelConfig
from edge_vlm.model.checkpoint import load_checkpoint, read_tensors
from edge_vlm.model.lora.folder import RECORD, Record, identify, save_adapter
from edge_vlm.model.lora.folder import _parsed as parsed
from edge_vlm.model.lora.peft_format import CONFIG, WEIGHTS, read_adapter
from edge_vlm.model.published.files import read_json as read_folder_json
from edge_vlm.model.published.files import read_layout
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.published.processor import read_processors
from edge_vlm.model.published.tokens import with_tokens
from edge_vlm.model.published.torch_files import ShardedTensors, read_unsharded
from edge_vlm.model.published.training import read_training_config
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_export.quantize.plan import PrecisionPlan
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_training.config import plain, read_json
from edge_vlm_training.recipes.base import Recipe
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.checkpoints import CHECKPOINTS
from tests.fuzz.harness import Format
from tests.published_folder import published_folder
from tests.published_training import training_config, write_sharded, write_unsharded
from tests.tiny import tiny_checkpoint
from tests.training.trainer.runs import RECIPE, go, make_run, older

# ---- safetensors ---------------------------------------------------------------------------------


def unpack_tensors(data: bytes) -> Any:
    length = int.from_bytes(data[:8], "little")
    return {"header": json.loads(data[8 : 8 + length]), "rest": data[8 + length :].hex()}


def pack_tensors(value: Any) -> bytes:
    header = json.dumps(value["header"]).encode()
    return len(header).to_bytes(8, "little") + header + bytes.fromhex(value["rest"])


def make_tensors(folder: Path) -> None:
    tensors = {"a": torch.zeros(4, 4), "b": torch.ones(3), "c": torch.zeros(2, dtype=torch.int64)}
    (folder / "model.safetensors").write_bytes(save(tensors))


def make_shards(folder: Path) -> None:
    (folder / "x.safetensors").write_bytes(save({"a": torch.zeros(4)}))
    (folder / "y.safetensors").write_bytes(save({"b": torch.zeros(4)}))
    index = {"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_both(folder: Path) -> None:
    read_layout(folder)
    for tensor in read_tensors(folder / "model.safetensors").values():
        tensor.sum()


# ---- folders of models ---------------------------------------------------------------------------


def linked(source: Callable[[], Path], *own: str) -> Callable[[Path], None]:
    """A model's folder whose files are shared, but for those that are changed."""

    def make(folder: Path) -> None:
        for path in source().iterdir():
            if path.name in own:
                shutil.copyfile(path, folder / path.name)
            else:
                (folder / path.name).symlink_to(path)

    return make


def make_hub_folder(name: str, value: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        linked(published_folder, name)(folder)
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps(value))

    return make


@functools.cache
def hub_model() -> ModelConfig:
    return open_folder(published_folder()).config


def read_rules(folder: Path) -> None:
    """What stands beside the weights, which are not looked at again."""
    usage, _ = with_tokens(read_processors(folder, hub_model().vision), folder)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    with contextlib.suppress(KeyError):  # `require_tokenizer` names those
        PromptFormat(tokenizer, usage.style).question_ids("is there a ball ?")


def use_adapter(folder: Path) -> None:
    read_adapter(folder, hub_model())


def read_record(folder: Path) -> None:
    path = folder / RECORD
    parsed(path, read_folder_json(path), Record.from_dict)


GENERATION = {"eos_token_id": [0], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
PROCESSOR = {
    "image_processor": {"max_crops": 5, "overlap_margins": [2, 3], "pooling_size": [2, 2]},
    "use_frame_special_tokens": True,
}


def make_adapter(folder: Path) -> None:
    from tests.model.test_lora import ALPHA, RANK, factors_of, with_random_adapters

    base = open_folder(published_folder())
    form = RANK, ALPHA, identify(base, "float32"), base.require_tokenizer(), base.usage
    save_adapter(folder, base.config, factors_of(with_random_adapters(("vit",))), *form)
    config = json.loads((folder / CONFIG).read_text())
    config["alpha_pattern"] = {"q_proj": 4.0}
    (folder / CONFIG).write_text(json.dumps(config))


# ---- the training repository ---------------------------------------------------------------------

WEIGHTS_OF_FEW = {"a.weight": torch.ones(4, 3), "b.bias": torch.zeros(5)}


@functools.cache
def small_training_config() -> dict[str, Any]:
    from tests.model.published.test_published_training import small

    return training_config(small())


def make_training_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(small_training_config()))


def make_unsharded(folder: Path) -> None:
    write_unsharded(folder / "step1", WEIGHTS_OF_FEW, {})


def make_sharded(folder: Path) -> None:
    write_sharded(folder / "step1", WEIGHTS_OF_FEW, {})


def use_unsharded(folder: Path) -> None:
    for tensor in read_unsharded(folder / "step1").values():
        tensor.double().sum()


def use_sharded(folder: Path) -> None:
    tensors = ShardedTensors(folder / "step1" / "model_and_optim")
    for name in tensors:
        tensors[name].double().sum()


# ---- runs of training ----------------------------------------------------------------------------

RUNS: dict[Path, Any] = {}


def make_trained(folder: Path) -> None:
    run = make_run(folder / "run", override(RECIPE, ["steps=1", "save_every=1", "sample_every=9"]))
    go(run)
    older(folder / STEP)  # with checksums hardly any change is read
    RUNS[folder] = run


def resume(folder: Path) -> None:
    RUNS[folder].resume()


STEP = f"run/{CHECKPOINTS}/step-00000001"


def make_recipe(folder: Path) -> None:
    (folder / "recipe.json").write_text(json.dumps(plain(RECIPE)))


def make_plan(folder: Path) -> None:
    shutil.copyfile(DEMO_BUNDLE / "precision_plan.json", folder / "precision_plan.json")


def unpack_yaml(data: bytes) -> Any:
    return yaml.safe_load(data)


FORMATS = (
    Format(
        *("safetensors", "model.safetensors", make_tensors, read_both),
        *(unpack_tensors, pack_tensors),
    ),
    Format("weight-index", "model.safetensors.index.json", make_shards, read_layout),
    Format(
        "checkpoint-config", "config.json", linked(tiny_checkpoint, "config.json"), load_checkpoint
    ),
    Format(
        "hub-config",
        "config.json",
        linked(published_folder, "config.json"),
        open_folder,
        examples=25,
    ),
    Format(
        *("hub-tokenizer", "tokenizer.json", linked(published_folder, "tokenizer.json")),
        read_rules,
    ),
    Format(
        *("hub-pictures", "preprocessor_config.json"),
        *(linked(published_folder, "preprocessor_config.json"), read_rules),
    ),
    Format(
        *("hub-processor", "processor_config.json"),
        *(make_hub_folder("processor_config.json", PROCESSOR), read_rules),
    ),
    Format(
        *("hub-generation", "generation_config.json"),
        *(make_hub_folder("generation_config.json", GENERATION), read_rules),
    ),
    Format(
        "training-config", "config.yaml", make_training_config, read_training_config, unpack_yaml
    ),
    Format("torch-file", "step1/model.pt", make_unsharded, use_unsharded, None),
    Format("torch-index", "step1/model_and_optim/.metadata", make_sharded, use_sharded, None),
    Format("torch-shard", "step1/model_and_optim/__0_0.distcp", make_sharded, use_sharded, None),
    Format("adapter-config", CONFIG, make_adapter, use_adapter, examples=20),
    Format("adapter-record", RECORD, make_adapter, read_record, examples=30),
    Format(
        *("adapter-weights", WEIGHTS, make_adapter, use_adapter),
        *(unpack_tensors, pack_tensors),
        examples=20,
    ),
    Format("run-progress", f"{STEP}/run.json", make_trained, resume, examples=20),
    # Nearly all of these are read, with all weights.
    Format("run-process", f"{STEP}/process-00000.json", make_trained, resume, examples=8),
    Format("run-index", f"{STEP}/.metadata", make_trained, resume, None, examples=8),
    Format("recipe", "recipe.json", make_recipe, lambda f: read_json(f / "recipe.json", Recipe)),
    Format(
        *("written-plan", "precision_plan.json", make_plan),
        lambda f: PrecisionPlan.from_json((f / "precision_plan.json").read_text(errors="replace")),
        examples=20,
    ),
)
