"""`edge-vlm convert`, and what was trained surviving training, export and the way back to hubs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors import safe_open

from edge_vlm.cli import main
from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.errors import CheckpointError, WeightFilesError
from edge_vlm.errors.export import NoSpaceLeft
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm.model.evaluator import TorchEvaluator
from edge_vlm.model.folder.convert_command import HUB, OURS, convert
from edge_vlm.model.published.files import INDEX, SCORER
from edge_vlm.model.published.folder import load_published, open_folder
from edge_vlm.model.published.hub import save_published, write_hub
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.presets import tiny
from edge_vlm.text.prompt import PAD, PromptStyle
from edge_vlm.world.questions import vocabulary as world_texts
from edge_vlm_calibration.collect import calibrate
from edge_vlm_export.graphs.weights import identity_of
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from tests.model.peers import load_peer, our_logits, peer_logits, video_prompt
from tests.published_folder import CUT, EXTRA, LIMITS, config, published_folder, small_tokenizer
from tests.published_training import (
    as_trained,
    published_weights,
    tie,
    training_config,
    write_sharded,
    write_unsharded,
)
from tests.tiny import tiny_footage, traced_once

ROOT = Path(__file__).parents[3]
USAGE = Usage(
    style=PromptStyle(
        own_frame_markers=True, space_before_answers=True, begin=PAD, ends=(PAD, "<|im_end|>")
    ),
    images=CUT,
    frames=FrameRule(num_frames=48, max_fps=1.0),
    defaults={"keep_ratio": 0.7, "max_answer_tokens": 300, "temperature": 0.6, "top_p": 0.9},
)


def scored(cfg: ModelConfig, **changes: Any) -> ModelConfig:
    """With a scorer of its own, and so many blocks that one behind the fourth has room."""
    vision = dataclasses.replace(cfg.vision, num_layers=8, feature_layers=(7, 5))
    scorer = dataclasses.replace(
        tiny().scorer,  # type: ignore[type-var]
        rescale=Rescale.FRAME,
        rescale_min=0.2,
        mlp_width=vision.mlp_width,
        **changes,
    )
    return dataclasses.replace(cfg, vision=vision, scorer=scorer)


def words_config(**changes: Any) -> ModelConfig:
    """A model of the small published vocabulary."""
    found = open_folder(published_folder())
    return dataclasses.replace(as_trained(config(found.config.language.base_vocab)), **changes)


def same(first: Path, second: Path) -> bool:
    ours, theirs = open_folder(first).load().state_dict(), open_folder(second).load().state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(scope="module")
def model() -> VideoLM:
    cfg = scored(words_config())
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(4)).eval()


@pytest.fixture(scope="module")
def hub(model: VideoLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "hub"
    dtype = torch.float32
    words = published_folder() / "tokenizer.json"
    write_hub(folder, model.cfg, model.state_dict(), dtype, usage=USAGE, tokenizer=words)
    return folder


def test_a_scorer_lies_where_transformers_does_not_look(hub: Path, model: VideoLM) -> None:
    """Every other weight finds its place there, and the logits are equal to the bit."""
    with safe_open(hub / SCORER, "pt") as file:
        assert len(list(file.keys())) == 14
    prompt = video_prompt(model.cfg)
    bare = dataclasses.replace(model.cfg, scorer=None)
    ours = VideoLM(bare).eval()
    ours.load_state_dict(
        {n: t for n, t in model.state_dict().items() if not n.startswith("scorer.")}
    )
    theirs = peer_logits(load_peer(hub), prompt)
    assert (theirs - our_logits(ours, prompt)).abs().max() <= 1e-4


def test_a_hub_folder_says_all_of_it_again(hub: Path, model: VideoLM) -> None:
    found = open_folder(hub)
    assert found.config == model.cfg
    assert found.usage == USAGE
    assert found.require_tokenizer() == hub / "tokenizer.json"
    # Others read the same from the files they know.
    read = {p.name: json.loads(p.read_text()) for p in hub.glob("*config.json")}
    assert read["config.json"]["use_frame_special_tokens"] is True
    assert read["processor_config.json"]["use_frame_special_tokens"] is True
    assert read["preprocessor_config.json"]["max_crops"] == CUT.max_crops
    assert read["video_preprocessor_config.json"]["num_frames"] == 48
    assert read["generation_config.json"]["do_sample"] is True
    data = read["config.json"]
    del data["edge_vlm"]
    (hub.parent / "plain").mkdir()
    for path in hub.iterdir():
        if path.name not in ("config.json", SCORER):
            shutil.copyfile(path, hub.parent / "plain" / path.name)
    (hub.parent / "plain" / "config.json").write_text(json.dumps(data))
    again = open_folder(hub.parent / "plain").usage
    assert (again.images, again.frames) == (USAGE.images, USAGE.frames)
    assert dataclasses.replace(again.style, ends=USAGE.style.ends) == USAGE.style
    assert set(again.style.ends) == set(USAGE.style.ends)


@pytest.mark.parametrize("to", [OURS, HUB])
def test_convert_keeps_weights_and_what_was_trained(to: str, hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["convert", str(hub), "-o", str(target), "--to", to]) == 0
    assert same(hub, target)
    found, before = open_folder(target), open_folder(hub)
    assert (found.config, found.usage) == (before.config, before.usage)
    back = tmp_path / "back"
    assert main(["convert", str(target), "-o", str(back), "--to", OURS]) == 0
    assert same(hub, back)
    assert (open_folder(back).config, open_folder(back).usage) == (found.config, found.usage)
    assert load_checkpoint(back).cfg == found.config


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_folder_becomes_one_of_the_hub(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The companion folder gives the words, their first and last token, and no shapes."""
    cfg = scored(words_config(), prune_at=3)
    cfg = dataclasses.replace(
        cfg,
        scorer=dataclasses.replace(cfg.scorer, rescale=Rescale.ROW),  # type: ignore[type-var]
    )
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(1)).eval()
    model = tie(model) if tied else model
    write = write_sharded if tied else write_unsharded
    weights = published_weights(model, tied=tied)
    write(tmp_path / "run" / "step3", weights, training_config(cfg, tied=tied))
    companion = Path(shutil.copytree(published_folder(), tmp_path / "companion"))
    (companion / "tokenizer_config.json").write_text(json.dumps({"eos_token": PAD}))
    source, target = str(tmp_path / "run"), tmp_path / "out"
    command = ["convert", source, "-o", str(target), "--to", "hub"]
    assert main(command) == 3
    assert "Qwen/Qwen3-4B-Instruct-2507" in capsys.readouterr().err
    assert not target.exists()
    assert main([*command, "--tokenizer", str(companion)]) == 0
    assert "transformers does not read scorer.safetensors" in capsys.readouterr().out
    found = open_folder(target)
    assert found.config == cfg
    assert found.usage.defaults == {"keep_ratio": 0.7, "max_answer_tokens": 512}
    assert (found.usage.style.begin, found.usage.style.ends) == (PAD, (PAD,))
    assert found.usage.style.own_frame_markers
    theirs, ours = load_published(target).state_dict(), model.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    load_peer(target)
    assert main(["inspect", source, "--tokenizer", str(companion)]) == 0
    told = capsys.readouterr().out
    assert "a folder of the training repository (step3" in told
    assert "keep_ratio=0.7" in told
    assert "<frame_start>" in told


def test_types_and_shards(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "half"
    arguments = ["convert", str(hub), "-o", str(target), "--to", "hub", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    found = open_folder(target)
    assert {tensor.dtype for tensor in found.tensors.values()} == {"BF16"}
    half, whole = found.load(torch.bfloat16).state_dict(), open_folder(hub).load().state_dict()
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert main(["convert", str(target), "-o", str(tmp_path / "ours")]) == 0
    kept = open_folder(tmp_path / "ours").tensors
    assert {tensor.dtype for tensor in kept.values()} == {"BF16"}
    write_hub(
        tmp_path / "cut",
        *(found.config, found.weights, torch.float32),
        usage=found.usage,
        tokenizer=found.tokenizer,
        max_shard_bytes=40_000,
    )
    assert (tmp_path / "cut" / INDEX).is_file()
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert SCORER not in index["weight_map"].values()
    assert same(tmp_path / "cut", target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(CheckpointError, match="in the way"):
        convert(hub, tmp_path / "full", OURS)
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    with pytest.raises(NoSpaceLeft, match="--dtype bfloat16"):
        convert(hub, tmp_path / "none", OURS)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    """A shard whose content is damaged is met in the middle."""
    cfg = words_config()
    weights = published_weights(VideoLM(cfg))
    step = write_sharded(tmp_path / "in" / "step1", weights, training_config(cfg))
    (data,) = (step / "model_and_optim").glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 3] + bytes(len(whole) - len(whole) // 3))
    for to in (OURS, HUB):
        with pytest.raises(WeightFilesError, match="cut off or no such file"):
            convert(step, tmp_path / "out", to, tokenizer=published_folder())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_eval_and_calibrate_read_published_folders(hub: Path) -> None:
    evaluator = TorchEvaluator(hub)
    prompt = evaluator._model.prompt
    assert prompt.style == USAGE.style
    assert prompt.bos_id == prompt.tokenizer.id_of(PAD)
    table = calibrate(hub, [tiny_footage()], max_frames=3)
    assert table.num_frames == 3
    assert table.num_scores
    assert table.checkpoint_sha256 in identity_of(open_folder(hub))["sha256"].values()
    plain = calibrate(published_folder(), [tiny_footage()], max_frames=3)
    assert (plain.num_scores, plain.num_frames) == (0, 3)
    assert plain.output_ranges["connector.project.down"] > 0


MEASURE = """
import resource, sys
from pathlib import Path
from edge_vlm.model.folder.convert_command import convert

def own():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

import threading
small, large, out, words, *kinds = sys.argv[1:]
for to in kinds:
    convert(Path(small), Path(out, f"small-{to}"), to, tokenizer=Path(words))
    before, done, peaks = own(), threading.Event(), [0]
    def watch():
        while not done.wait(0.002):
            peaks.append(own())
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(Path(large), Path(out, f"large-{to}"), to, tokenizer=Path(words))
    done.set()
    watcher.join()
    print(max(peaks) - before)
"""


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes."""

    peaks: dict[str, int]
    """By what was written."""
    model: int
    largest: int
    """Of its tensors."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Of one large folder, converted to each kind in one process."""
    made, folders = tmp_path_factory.mktemp("held"), {}
    for name, width in (("small", 64), ("large", 1536)):
        cfg = words_config()
        language = dataclasses.replace(
            cfg.language, num_layers=8, mlp_width=width, width=width // 2
        )
        cfg = as_trained(dataclasses.replace(cfg, language=language))
        weights = published_weights(VideoLM(cfg))
        folders[name] = write_sharded(made / name / "step1", weights, training_config(cfg))
    size = sum(t.numel() * t.element_size() for t in weights.values())
    largest = max(t.numel() * t.element_size() for t in weights.values())
    assert size > 4 * largest > 20e6
    words = published_folder() / "tokenizer.json"
    paths = map(str, (folders["small"], folders["large"], made, words))
    command = [sys.executable, "-c", MEASURE, *paths, OURS, HUB]
    # Freed memory is given back at once, so that what is counted is what is held.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    return Held(dict(zip((OURS, HUB), map(int, run.stdout.split()), strict=True)), size, largest)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
@pytest.mark.parametrize("to", [OURS, HUB])
def test_a_model_is_never_held_as_a_whole(to: str, held: Held) -> None:
    """What is taken is a few tensors at a time."""
    assert held.peaks[to] <= 5 * held.largest + 8e6 < held.model / 2


RECIPES = {
    "molmo2_4b_stts_50": (0.5, VisionAttention.ALL, Rescale.ROW),
    "molmo2_4b_stts_30": (0.7, VisionAttention.ALL, Rescale.ROW),
    "molmo2_4b_stream": (0.5, VisionAttention.FRAME, Rescale.FRAME),
    "molmo2_4b_stts_50_lora": (0.5, VisionAttention.ALL, Rescale.ROW),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_was_trained_is_what_is_served_and_saved_back(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train -> export -> convert --to hub -> export again: the same prompts, pictures, share,
    frames and attention; and the trained logits in transformers."""
    # As few blocks as leave room for a scorer behind the fourth: each is traced for the export.
    vision = dataclasses.replace(tiny().vision, num_layers=6, feature_layers=(5, 4))
    vocabulary = small_tokenizer(" ".join(world_texts()).lower())
    vocabulary.normalizer = tokenizers.normalizers.Lowercase()
    cfg = config(vocabulary.get_vocab_size() - len(EXTRA))
    bare = VideoLM(dataclasses.replace(cfg, vision=vision))
    init = tmp_path / "init"
    save_published(init, bare.init_weights(torch.Generator().manual_seed(2)))
    vocabulary.save(str(init / "tokenizer.json"))
    rules = "preprocessor_config.json"
    shutil.copyfile(published_folder() / rules, init / rules)
    words = {"bos_token": PAD, "eos_token": PAD}
    (init / "tokenizer_config.json").write_text(json.dumps(words))
    settings = [
        *("steps=1", "batch=1", "device_batch=1", "sequence_length=1000", "max_frames=3"),
        *("data=world", "world_questions=2", "precision=float32", "device=cpu", "row_frames=3"),
        *("sample_every=0", "activation_checkpointing=false", "warmup_steps=0", "peak_tflops=1"),
    ]
    if recipe.endswith("lora"):
        settings.append("base=float32")
    sets = [part for setting in settings for part in ("--set", setting)]
    run = tmp_path / "run"
    assert main(["train", recipe, "--init", str(init), "-o", str(run), *sets]) == 0
    ratio, attention, rescale = RECIPES[recipe]
    trained = open_folder(run / "checkpoint")
    assert trained.config.attention is attention
    assert trained.config.scorer is not None
    assert trained.config.scorer.rescale is rescale
    usage = trained.usage
    assert usage.style == PromptStyle(
        own_frame_markers=True, space_before_answers=True, begin=PAD, ends=(PAD,)
    )
    assert usage.images == ImageConfig(max_crops=CUT.max_crops, overlap=CUT.overlap)
    assert usage.frames == FrameRule(num_frames=3, max_fps=2.0)
    assert usage.defaults == {"keep_ratio": ratio, "max_answer_tokens": 512}

    capsys.readouterr()
    hub = tmp_path / "hub"
    assert main(["convert", str(run / "checkpoint"), "-o", str(hub), "--to", "hub"]) == 0
    told = capsys.readouterr().out
    assert ("transformers computes vision attention 'all'" in told) == (
        attention is VisionAttention.FRAME
    )
    prompt = video_prompt(dataclasses.replace(trained.config, scorer=None))
    kept = trained.load()
    kept.cfg = prompt.cfg
    kept.scorer = None
    assert (peer_logits(load_peer(hub), prompt) - our_logits(kept, prompt)).abs().max() <= 1e-4
    if recipe not in ("molmo2_4b_stts_50", "molmo2_4b_stream"):
        return  # adapters: test_lora.py; another share is the same export
    options = ExportOptions(limits=LIMITS, thorough=False, name="same")
    with traced_once():
        bundles = [
            export_bundle(source, tmp_path / f"bundle-{number}", options)
            for number, source in enumerate((run / "checkpoint", hub))
        ]
    for bundle in bundles:
        assert bundle.config == trained.config
        assert (bundle.style, bundle.images, bundle.frames) == (
            usage.style,
            usage.images,
            usage.frames,
        )
        assert bundle.defaults == usage.defaults
    assert same(run / "checkpoint", hub)
    assert _weights(bundles[0]) == _weights(bundles[-1])


def _weights(bundle: EngineBundle) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (bundle.path / "graphs").glob("*.weights")}
