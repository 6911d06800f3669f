"""`edge-vlm inspect`: figures from headers alone, at full size without a single weight."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edge_vlm import cli
from edge_vlm.config import ModelConfig
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import weights_bytes
from edge_vlm.model.checkpoint import save_checkpoint
from edge_vlm.model.folder.describe import memory, parameters
from edge_vlm.model.published.config import published_config
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.published.mapping import published_shapes, shapes
from edge_vlm.model.published.names import HUB
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import (
    molmo2_4b,
    molmo2_8b,
    molmo2_o_7b,
    tiny,
)
from tests.model.peers import parameters_of, variant
from tests.tiny import tiny_bundle, tiny_variant

NUM_SHARDS = 4


def hollow_folder(folder: Path, cfg: ModelConfig) -> Path:
    """A published folder of full size whose files are holes behind their headers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config(cfg)))
    weight_map = {}
    wanted = list(published_shapes(HUB, cfg).items())
    for i in range(NUM_SHARDS):
        file, end, header = f"model-{i}.safetensors", 0, {}
        for name, shape in wanted[i::NUM_SHARDS]:
            size = 4 * math.prod(shape)
            header[name] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            weight_map[name] = file
            end += size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def figures(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, dict[str, object]]:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    data: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
    return data


def test_the_published_4b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = dataclasses.replace(molmo2_4b(), scorer=None)
    folder = hollow_folder(tmp_path / "Molmo2-4B", plain)
    assert cli.main(["inspect", str(folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "total 4,850,869,200",
        "fp32 19.40 GB",
        "bf16 9.70 GB",
        "fp16 9.70 GB",
        "cache per token 147.46 kB",
        "scorer none: every cell is kept; export --scorer change adds one without weights",
    ):
        assert line in lines
    assert any("4 files, 19.40 GB, tensors: 706 F32" in line for line in lines)


def test_a_scorer_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hollow_folder(tmp_path / "STTS-4B", molmo2_4b())
    data = figures(capsys, folder)
    assert data["parameters"]["scorer"] == 33_766_769
    assert data["parameters"]["total"] == 4_850_869_200 + 33_766_769
    assert str(data["facts"]["scorer"]).startswith("STTS after block 3")


def test_the_olmo_kind_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [dataclasses.replace(make(), scorer=None) for make in (molmo2_8b, molmo2_o_7b)]
    qwen, olmo = (
        figures(capsys, hollow_folder(tmp_path / str(i), cfg))["facts"]["language"]
        for i, cfg in enumerate(plain)
    )
    assert "norms before, q/k norm per head; rotary base 1,000,000;" in str(qwen)
    assert "norms after, q/k norm over all heads; rotary base 500,000, scaled 8" in str(olmo)
    assert "in 8 blocks" in str(olmo)


def test_parts_are_counted_as_the_modules_hold_them() -> None:
    model = VideoLM(tiny())
    counts = parameters(shapes(tiny()))
    assert model.scorer is not None
    assert counts["vision transformer"] == parameters_of(model.vit)
    assert counts["scorer"] == parameters_of(model.scorer)
    assert counts["connector"] == parameters_of(model.connector)
    language = ("token embeddings", "language head", "language blocks")
    assert sum(counts[name] for name in language) == parameters_of(model.llm)
    assert "scorer" not in parameters(shapes(variant("4b")))


@pytest.mark.parametrize("name", ["plain", "ort-int4"])
def test_the_memory_named_is_that_of_a_bundle(name: str) -> None:
    folder = tiny_bundle() if name == "plain" else tiny_variant(name)
    bundle = EngineBundle.open(folder)
    files = [*(folder / "graphs").glob("*.weights"), folder / "embed_table.npy"]
    written = sum(file.stat().st_size for file in files)
    assert weights_bytes(shapes(bundle.config), bundle.precision) == pytest.approx(written, rel=0.2)
    assert memory(shapes(bundle.config))["fp32"] == 4 * sum(
        math.prod(shape) for shape in shapes(bundle.config).values()
    )


def test_our_own_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "tokenizer.json"
    words.write_text("{}")
    save_checkpoint(tmp_path, tiny(), VideoLM(tiny()).state_dict(), words)
    data = figures(capsys, tmp_path)
    assert "a checkpoint of this project" in str(data["title"])
    assert str(data["facts"]["attention"]).startswith("frame")
    assert ModelConfig.from_dict(data["config"]) == tiny()


@pytest.mark.parametrize("damage", ["cut", "config", "folder"])
def test_a_bad_folder_is_one_line(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = VideoLM(variant("4b")).init_weights(torch.Generator().manual_seed(0))
    save_published(tmp_path / "model", model)
    folder, code = tmp_path / "model", 3
    if damage == "cut":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif damage == "config":
        (folder / "config.json").write_text('{"model_type": "llava"}')
        code = 2
    else:
        folder = tmp_path / "nowhere"
    assert cli.main(["inspect", str(folder)]) == code
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert str(folder) in printed.err


def test_a_run_s_folder_leads_to_its_checkpoint_and_not_to_what_is_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, hint in (
        ("checkpoint.before", "point to a model's folder"),
        ("checkpoint.partial", "point to a model's folder"),
        ("final", f"take {tmp_path / 'final'}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert cli.main(["inspect", str(tmp_path)]) == 3
        assert hint in capsys.readouterr().err


def test_the_command_itself_needs_no_torch() -> None:
    """A folder that holds no weights is described, or refused, where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from edge_vlm.model.folder.inspect_command import inspect; print(type(inspect).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Command"
