"""Folders of the training repository: what torch wrote there is read bit for bit, and nothing that
a pickle in them names is ever run."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem

from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.errors import (
    CheckpointError,
    ConfigError,
    WeightFilesError,
    WeightNamesError,
)
from edge_vlm.formats.usage import FrameRule
from edge_vlm.model.published.folder import ModelFolder, load_published, open_published
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.published.torch_files import ShardedTensors
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.presets import tiny
from tests.golden import compare
from tests.model.peers import variant
from tests.published_training import (
    HEAD,
    as_trained,
    published_weights,
    read_index,
    tie,
    training_config,
    write_index,
    write_sharded,
    write_unsharded,
)

GOLDEN = sorted((Path(__file__).parents[2] / "data" / "golden").glob("*.safetensors"))
SCORER = "vision_backbone.image_vit.transformer.temporal_token_scorer."


def small(name: str = "4b") -> ModelConfig:
    return as_trained(variant(name))


def stts(cfg: ModelConfig) -> ModelConfig:
    vision = dataclasses.replace(cfg.vision, num_layers=7, feature_layers=(6, 5))
    scorer = dataclasses.replace(
        tiny().scorer,  # type: ignore[type-var]
        prune_at=2,
        rescale=Rescale.ROW,
        rescale_min=0.25,
        mlp_width=vision.mlp_width,
    )
    return dataclasses.replace(cfg, vision=vision, scorer=scorer)


def model_of(cfg: ModelConfig, *, tied: bool) -> VideoLM:
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).eval()
    return tie(model) if tied else model


Write = Callable[[Path, dict[str, Any], dict[str, Any]], Path]
WRITERS: dict[str, Write] = {
    "unsharded": write_unsharded,
    "one rank": write_sharded,
    "two ranks": lambda folder, tensors, config: write_sharded(folder, tensors, config, ranks=2),
}


@pytest.mark.parametrize(
    ("write", "tied", "scored"),
    [
        *(
            case
            for case in itertools.product(WRITERS, (False, True), (False, True))
            # What each writes lies in one file or two, whatever is written: all that there is.
            if case[0] != "two ranks" or case[1:] == (False, True)
        ),
    ],
)
def test_weights_are_read_bit_for_bit(write: str, tied: bool, scored: bool, tmp_path: Path) -> None:
    """Also as our hub folder of the same model has them."""
    cfg = stts(small()) if scored else small()
    model = model_of(cfg, tied=tied)
    config = training_config(cfg, tied=tied)
    folder = WRITERS[write](tmp_path / "step5", published_weights(model, tied=tied), config)
    found = open_published(folder)
    assert found.config == cfg
    save_published(tmp_path / "hub", model)
    ours, theirs = found.load().state_dict(), load_published(tmp_path / "hub").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lazily = found.weights
    assert all(torch.equal(lazily[name], theirs[name]) for name in theirs)
    assert bool(found.usage.defaults.get("keep_ratio")) == scored


@pytest.mark.parametrize("file", GOLDEN, ids=lambda path: path.stem)
def test_a_folder_of_recorded_weights_gives_the_recorded_outputs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code's own vision side, beside a language model of chance."""
    build = compare.build

    def through_a_folder(weights: dict[str, Any], num_patches: int) -> VideoLM:
        model = build(weights, num_patches)
        cfg = model.cfg
        mlp_width = cfg.connector.mlp_width
        language = dataclasses.replace(cfg.language, mlp_width=mlp_width, extra_vocab=10)
        whole = VideoLM(dataclasses.replace(cfg, language=language))
        vision = {n: t for n, t in model.state_dict().items() if not n.startswith("llm.")}
        whole.load_state_dict(vision, strict=False)
        published = published_weights(whole)
        for name, tensor in weights.items():
            assert torch.equal(published[f"vision_backbone.{name}"], tensor)
        folder = write_sharded(tmp_path / "step6250", published, training_config(whole.cfg))
        loaded = open_published(folder)
        assert loaded.config == whole.cfg
        return loaded.load()

    monkeypatch.setattr(compare, "build", through_a_folder)
    found = compare.differences(file)
    assert {"scores", "features", "hidden.7"} <= found.keys()
    assert all(difference <= compare.TOLERANCE for difference in found.values()), found


@pytest.mark.parametrize("name", ["8b", "o-7b"])
def test_the_other_sizes_are_described_alike(name: str, tmp_path: Path) -> None:
    cfg = small(name)
    weights = published_weights(model_of(cfg, tied=False))
    folder = write_unsharded(tmp_path / "step1-unsharded", weights, training_config(cfg))
    assert open_published(folder).config == cfg


@pytest.fixture(scope="module")
def unsharded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = stts(small())
    weights = published_weights(model_of(cfg, tied=False))
    folder = tmp_path_factory.mktemp("unsharded") / "step4"
    return write_unsharded(folder, weights, training_config(cfg))


@pytest.fixture
def folder(unsharded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unsharded_once, tmp_path / "run" / "step4"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config["model"])
    path.write_text(yaml.safe_dump(config))


def usage_after(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Any:
    edit(folder, change)
    return open_published(folder).usage


# ---- which folder -------------------------------------------------------------------------------


def test_of_a_save_folder_the_last_step_is_taken(tmp_path: Path) -> None:
    cfg = small()
    weights, config = published_weights(model_of(cfg, tied=False)), training_config(cfg)
    run = tmp_path / "run"
    for name in ("step9-unsharded", "step30-unsharded"):
        write_unsharded(run / name, weights, config)
    assert open_published(run).path.name == "step30-unsharded"
    write_sharded(run / "step30", weights, config)
    assert open_published(run).path.name == "step30"
    write_sharded(run / "step200", weights, config)
    (run / "step1000").mkdir()  # nothing in it
    (run / "step2000-tmp").mkdir()
    assert open_published(run).path.name == "step200"
    # The config of the whole run lies on top where a step has none.
    (run / "step200" / "config.yaml").rename(run / "config.yaml")
    assert open_published(run).config_file == run / "config.yaml"


def test_a_run_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(CheckpointError, match=r"neither model_and_optim/ nor model\.pt nor a step"):
        open_published(tmp_path)


# ---- what is missing ----------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = torch.load(folder / "model.pt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "model.pt")


def test_an_untied_model_without_its_head_is_refused(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(HEAD))
    with pytest.raises(WeightNamesError) as caught:
        open_published(folder)
    assert caught.value.missing == (HEAD,)


def test_a_tied_model_with_a_head_is_refused(folder: Path) -> None:
    edit(folder, lambda model: model["llm"].update(weight_tying=True))
    with pytest.raises(WeightNamesError) as caught:
        open_published(folder)
    assert caught.value.unknown == (HEAD,)


def test_a_scorer_is_never_made_up(folder: Path) -> None:
    def without_scorer(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.startswith(SCORER)]:
            del weights[name]

    rewrite(folder, without_scorer)
    with pytest.raises(WeightNamesError, match=r"missing: .*temporal_token_scorer") as caught:
        open_published(folder)
    assert len(caught.value.missing) == 14


def test_a_padding_embedding_is_not_ignored(folder: Path) -> None:
    rewrite(folder, lambda w: w.update({"vision_backbone.pad_embed": torch.zeros(2, 64)}))
    with pytest.raises(WeightNamesError, match=r"unknown: vision_backbone\.pad_embed"):
        open_published(folder)


def test_blocks_that_nothing_reads_are_left_out_with_a_note(folder: Path) -> None:
    block = "vision_backbone.image_vit.transformer.resblocks."

    def keep_all(weights: dict[str, Any]) -> None:
        last = {n: t for n, t in weights.items() if n.startswith(f"{block}6.")}
        weights |= {
            n.replace(f"{block}6.", f"{block}{i}."): t for n, t in last.items() for i in (7, 8)
        }

    rewrite(folder, keep_all)
    with pytest.raises(WeightNamesError):
        open_published(folder)
    edit(folder, lambda model: model["vision_backbone"].update(skip_unused_layers=False))
    found = open_published(folder)
    assert found.load().cfg.vision.num_layers == 7
    assert any("tensors of ViT blocks that nothing reads" in note for note in found.notes)


# ---- config.yaml --------------------------------------------------------------------------------


def test_what_was_trained_is_read(folder: Path) -> None:
    usage = open_published(folder).usage
    assert usage.style.own_frame_markers
    assert not usage.style.low_res_columns
    assert usage.images == ImageConfig(max_crops=5, overlap=(2, 3))
    assert usage.frames == FrameRule(num_frames=64, max_fps=2.0, mode="uniform_last_frame")
    assert usage.defaults == {"keep_ratio": 0.7}


def test_the_old_generation_marks_every_frame(tmp_path: Path) -> None:
    cfg = stts(small())
    weights = published_weights(model_of(cfg, tied=True), tied=True)
    config = training_config(cfg, tied=True, old=True)
    found = open_published(write_unsharded(tmp_path / "step1", weights, config))
    assert found.usage.style.own_frame_markers
    assert found.usage.images is None
    assert found.usage.frames == FrameRule(num_frames=64)
    assert not any("one pair of markers" in note for note in found.notes)


def test_markers_follow_the_config(folder: Path) -> None:
    off = {"use_frame_special_tokens": False}
    assert not usage_after(
        folder, lambda m: m["mm_preprocessor"]["video"].update(off)
    ).style.own_frame_markers
    edit(folder, lambda m: m["mm_preprocessor"]["video"].update(per_frame_special_token=False))
    assert any("one pair of markers" in note for note in open_published(folder).notes)


def test_attention_within_an_image_is_ours_by_frame(folder: Path) -> None:
    edit(folder, lambda model: model.update(bi_directional_attn="within_image"))
    assert open_published(folder).config.attention is VisionAttention.FRAME


def test_settings_of_older_versions_are_ignored_with_a_note(folder: Path) -> None:
    old = {"fix_image_padding": True, "image_pooling_h": 2, "patch_residual": False}
    edit(folder, lambda model: model["vision_backbone"].update(old))
    (note,) = [n for n in open_published(folder).notes if "older version" in n]
    assert all(name in note for name in old)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bi_directional_attn", None),
        ("llm.d_model", "wide"),
        ("llm.block_type", "moe"),
        ("llm.include_bias", True),
        ("llm.qkv_bias", True),
        ("llm.layer_norm_type", "default"),
        ("llm.mlp_hidden_size", 127),
        ("vision_backbone.image_pooling_2d", "stack"),
        ("vision_backbone.image_padding_embed", "pad_embed"),
        ("vision_backbone.frame_embedding_or_so.patch_residual", None),
        ("vision_backbone.patch_residual", True),
        ("vision_backbone.image_pooling_h", 3),
        ("vision_backbone.vit.resize_mode", "metaclip"),
        ("vision_backbone.vit.prune_from_frame", 8),
        ("vision_backbone.vit.pruning_in_scorer", False),
        ("vision_backbone.vit.topk", 1.5),
        ("mm_preprocessor.topk", 0.5),
        ("mm_preprocessor.video.time_mode", "per-frame"),
        ("mm_preprocessor.video.pooling_h", 4),
        ("mm_preprocessor.video.max_fps", [1.0, 2.0]),
        ("mm_preprocessor.video.max_frames", 0),
    ],
)
def test_a_setting_that_is_not_computed_is_named(folder: Path, path: str, value: Any) -> None:
    def change(model: dict[str, Any]) -> None:
        *sections, field = path.split(".")
        for section in sections:
            model = model.setdefault(section, {})
        model[field] = value

    edit(folder, change)
    if "or_so" in path:  # what nobody knows is not looked at
        open_published(folder)
        return
    with pytest.raises(ConfigError) as caught:
        open_published(folder)
    assert path.rpartition(".")[2] in str(caught.value)
    assert str(folder / "config.yaml") in str(caught.value)


def test_all_faults_of_a_config_are_listed(folder: Path) -> None:
    def change(model: dict[str, Any]) -> None:
        del model["llm"]["d_model"], model["vision_backbone"]["vit"]["image_emb_dim"]
        model["llm"]["rope"] = False

    edit(folder, change)
    with pytest.raises(ConfigError) as caught:
        open_published(folder)
    assert all(name in str(caught.value) for name in ("d_model", "image_emb_dim", "llm.rope"))


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({"model_name": "molmo_point"}, "MolmoPoint"),
        ({"patch_embedding_kind": "linear"}, "MolmoPoint"),
        ({"model_name": "molmoact2"}, "MolmoAct2"),
        ({"action_expert": {}}, "MolmoAct2"),
        ({"model_name": "molmo2_trajectory"}, "MolmoMotion"),
    ],
)
def test_another_family_is_named(folder: Path, change: dict[str, Any], family: str) -> None:
    edit(folder, lambda model: model.update(change))
    with pytest.raises(ConfigError, match=f"another family: {family}"):
        open_published(folder)


@pytest.mark.parametrize("text", ["model: [", "", "[1]", "model: 3", "- &a [*a]"])
def test_a_broken_config_is_a_typed_error(folder: Path, text: str) -> None:
    (folder / "config.yaml").write_text(text)
    with pytest.raises((CheckpointError, ConfigError)):
        open_published(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config\.yaml"):
        open_published(folder)


def test_yaml_makes_no_objects(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "made"
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trace}']")
    with pytest.raises(CheckpointError, match="cannot be read as YAML"):
        open_published(folder)
    assert not trace.exists()


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = small()
    weights = published_weights(model_of(cfg, tied=False))
    folder = tmp_path_factory.mktemp("sharded") / "step7"
    return write_sharded(folder, weights, training_config(cfg))


@pytest.fixture
def sharded(sharded_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_once, tmp_path / "step7"))


def refused(folder: Path, *texts: str) -> None:
    with pytest.raises(WeightFilesError) as caught:
        open_published(folder).load()
    for text in texts:
        assert text in str(caught.value)


def test_torchs_own_index_is_read_too(sharded: Path) -> None:
    found = open_published(sharded)
    path = sharded / "model_and_optim" / ".metadata"
    metadata = read_index(path)
    metadata.storage_data = {
        key: filesystem._StorageInfo(place.relative_path, place.offset, place.length)
        for key, place in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    assert open_published(sharded).tensors == found.tensors


def test_files_that_are_cut_off_are_named_before_anything_is_read(sharded: Path) -> None:
    shards = sharded / "model_and_optim"
    (data,) = shards.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightFilesError, match=f"{data.name} is cut off"):
        open_published(sharded)
    data.unlink()
    with pytest.raises(WeightFilesError, match=f"{data.name} is missing"):
        open_published(sharded)
    data.write_bytes(whole)
    index = (shards / ".metadata").read_bytes()
    (shards / ".metadata").write_bytes(index[: len(index) // 2])
    refused(sharded, ".metadata is cut off")
    (shards / ".metadata").unlink()
    refused(sharded, ".metadata is missing")


def test_a_shard_that_is_damaged(sharded: Path) -> None:
    (data,) = (sharded / "model_and_optim").glob("*.distcp")
    data.write_bytes(bytes(len(data.read_bytes())))
    refused(sharded, f"{data.name} is cut off or no such file")


def test_an_unsharded_file_that_is_cut_off(folder: Path) -> None:
    whole = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(whole[: len(whole) // 2])
    refused(folder, "model.pt is cut off")
    (folder / "model.pt").write_bytes(b"")
    refused(folder, "model.pt is cut off")
    torch.save([torch.zeros(2)], folder / "model.pt")
    refused(folder, "model.pt is no flat table")


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_something_is_refused(
    folder: Path, sharded: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    torch.save({"a": torch.zeros(2), "b": Bomb(trace)}, folder / "model.pt")
    refused(folder, "model.pt names the global", "mkdir", "nothing of this file was run")
    index = sharded / "model_and_optim" / ".metadata"
    whole = index.read_bytes()
    index.write_bytes(pickle.dumps(Bomb(trace)))
    refused(sharded, ".metadata names the global posix.mkdir", "nothing of this file was run")
    index.write_bytes(whole)
    (data,) = index.parent.glob("*.distcp")
    shards = ShardedTensors(index.parent)
    name = next(iter(shards))
    (shard,) = shards._shards[name]
    bomb = io.BytesIO()
    torch.save(Bomb(trace), bomb)
    content = bytearray(data.read_bytes())
    metadata = read_index(index)
    for key, place in metadata.storage_data.items():
        if key.fqn == f"model.{name}":
            place.offset, place.length = len(content), len(bomb.getvalue())
    data.write_bytes(bytes(content) + bomb.getvalue())
    write_index(index, metadata)
    refused(sharded, f"{data.name} names the global", "mkdir")
    assert shard.length
    assert not trace.exists()


GLOBALS = st.sampled_from(
    [
        ("os", "system"),
        ("posix", "mkdir"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "field"),
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("olmo.train.remote_filesystem", "RemoteFileSystemReader"),
        ("pathlib", "Path.unlink"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("copyreg", "_reconstructor"),
    ]
) | st.tuples(
    st.from_regex(r"[a-z_]{1,9}(\.[a-z_]{1,9}){0,2}", fullmatch=True),
    st.from_regex(r"[A-Za-z_]{1,12}", fullmatch=True),
)


@given(named=GLOBALS, where=st.integers(0, 10**6), called=st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_forbidden_global_is_reached(
    index_folder: Path, named: tuple[str, str], where: int, called: bool
) -> None:
    """Put anywhere among the values of a real index, called or only named."""
    module, name = named
    opcode = b"c" + f"{module}\n{name}\n".encode()
    call = b"(U\x01xtR" if called else b""
    whole = (index_folder / "whole").read_bytes()
    # Just behind the frame's begin and in front of the end, the stack is in order.
    places = [2, len(whole) - 1]
    at = places[where % len(places)]
    garbage = opcode + call + b"0"  # pushed and dropped again
    (index_folder / ".metadata").write_bytes(whole[:at] + garbage + whole[at:])
    with pytest.raises(WeightFilesError) as caught:
        ShardedTensors(index_folder)
    assert f"names the global {module}.{name}" in str(caught.value)


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real index in an older protocol of pickle, which has no frames to be kept right."""
    folder = tmp_path_factory.mktemp("index")
    weights = {"transformer.ln_f.weight": torch.zeros(4)}
    write_sharded(folder / "step1", weights, {})
    found = folder / "step1" / "model_and_optim"
    index = found / ".metadata"
    write_index(found / "whole", read_index(index), protocol=3)
    index.write_bytes((found / "whole").read_bytes())
    assert list(ShardedTensors(found)) == ["transformer.ln_f.weight"]
    return found


@given(noise=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1))
@settings(max_examples=200, deadline=None)
def test_a_damaged_index_is_a_typed_error_or_still_true(
    index_folder: Path, noise: list[tuple[int, int]]
) -> None:
    content = bytearray((index_folder / "whole").read_bytes())
    for place, value in noise:
        content[place % len(content)] = value
    (index_folder / ".metadata").write_bytes(bytes(content))
    try:
        tensors = ShardedTensors(index_folder)
    except WeightFilesError:
        return
    for name in tensors:
        assert tensors.layout[name].shape is not None


def change_index(folder: Path, change: Callable[[Any], None]) -> None:
    index = folder / "model_and_optim" / ".metadata"
    metadata = read_index(index)
    change(metadata)
    write_index(index, metadata)


@pytest.mark.parametrize(
    ("path", "told"), [("../secret", "expected a file beside it"), ("a/b", "expected a file")]
)
def test_an_index_that_leads_elsewhere(sharded: Path, path: str, told: str) -> None:
    def change(metadata: Any) -> None:
        key = next(key for key in metadata.storage_data if key.fqn.startswith("model."))
        metadata.storage_data[key].relative_path = path

    change_index(sharded, change)
    refused(sharded, told)


def test_shards_that_do_not_make_up_their_tensor(sharded: Path) -> None:
    def change(metadata: Any) -> None:
        name = next(n for n in metadata.state_dict_metadata if n.endswith("ln_f.weight"))
        found = metadata.state_dict_metadata[name]
        found.size = torch.Size([found.size[0] + 1])

    change_index(sharded, change)
    refused(sharded, ".metadata is wrong about transformer.ln_f.weight", "do not make up")


def test_a_tensor_whose_shard_is_nowhere(sharded: Path) -> None:
    change_index(sharded, lambda metadata: metadata.storage_data.clear())
    refused(sharded, "no file for its shard")


# ---- words --------------------------------------------------------------------------------------


def test_the_vocabulary_is_named_where_none_lies(folder: Path) -> None:
    found: ModelFolder = open_published(folder)
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen3-4B-Instruct-2507.*--tokenizer"):
        found.require_tokenizer()
    with pytest.raises(ConfigError, match="no such tokenizer"):
        open_published(folder, folder / "nowhere")
