"""Adapters: merged as beside the weights, in peft's files both ways, on the base they belong to."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_vlm.cli import main
from edge_vlm.errors import (
    CheckpointError,
    ConfigError,
    EdgeVlmError,
    WeightNamesError,
)
from edge_vlm.formats.usage import Usage
from edge_vlm.model.folder.convert_command import OURS, convert
from edge_vlm.model.lora.folder import RECORD, fingerprint, identify, save_adapter
from edge_vlm.model.lora.layers import TARGETS, LoraLinear, adapted, add_lora
from edge_vlm.model.lora.peft_format import CONFIG, WEIGHTS
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.published.mapping import to_published
from edge_vlm.model.published.names import HUB
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_export.graphs.weights import open_weights
from tests.model.peers import largest, load_peer, our_logits, peer_logits, video_prompt
from tests.published_folder import published_folder

RANK, ALPHA = 4, 10.0
# peft 0.21 asks transformers 5.24 for it.
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def with_random_adapters(parts: tuple[str, ...] = ("llm", "vit")) -> VideoLM:
    """The published folder's model with an adapter on every matrix of its blocks."""
    model = open_folder(published_folder()).load()
    rng = torch.Generator().manual_seed(1)
    add_lora(model, adapted(list(model.state_dict()), parts, TARGETS), RANK, ALPHA, rng)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def factors_of(model: VideoLM) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


@pytest.fixture(scope="module")
def unmerged() -> VideoLM:
    return with_random_adapters()


@pytest.fixture(scope="module")
def adapter(unmerged: VideoLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run writes it, on the published folder, which has no scorer."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    base = open_folder(published_folder())
    form = RANK, ALPHA, identify(base, "float32"), base.require_tokenizer(), base.usage
    save_adapter(folder, base.config, factors_of(unmerged), *form)
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    """The adapter on a base of its own."""
    shutil.copytree(published_folder(), tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    edit(tmp_path / "adapter" / CONFIG, base_model_name_or_path="../base")
    return tmp_path / "adapter"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_merged_adapter_computes_what_it_does_beside_the_weights(
    unmerged: VideoLM, adapter: Path
) -> None:
    merged, base = open_folder(adapter).load(), open_folder(published_folder()).load()
    prompt = video_prompt(base.cfg)
    with_adapters = our_logits(unmerged, prompt)
    relative = largest(our_logits(merged, prompt) - with_adapters) / largest(with_adapters)
    assert relative <= 1e-5
    assert largest(our_logits(base, prompt) - with_adapters) > 0.1
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())


def test_an_adapter_that_was_not_trained_changes_nothing() -> None:
    model = open_folder(published_folder()).load()
    prompt = video_prompt(model.cfg)
    before = our_logits(model, prompt)
    names = adapted(list(model.state_dict()), ("llm", "vit"), TARGETS)
    add_lora(model, names, 2, 4.0, torch.Generator())
    assert torch.equal(our_logits(model, prompt), before)
    assert len(names) == 7 * model.cfg.language.num_layers + 6 * model.cfg.vision.num_layers


@OLD_NAME
def test_peft_puts_our_adapter_on_transformers_own_model(unmerged: VideoLM, adapter: Path) -> None:
    """Every tensor finds its place: peft warns of others, and warnings are errors."""
    import transformers

    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    with_adapters = peft.PeftModel.from_pretrained(load_peer(published_folder()), adapter)
    prompt = video_prompt(unmerged.cfg)
    theirs, ours = peer_logits(with_adapters, prompt), our_logits(unmerged, prompt)
    by_folder = transformers.Molmo2ForConditionalGeneration.from_pretrained(
        adapter, attn_implementation="eager", dtype=torch.float32
    )
    assert torch.equal(peer_logits(by_folder.eval(), prompt), theirs)
    assert largest(theirs - ours) / largest(ours) <= 1e-5
    stored = set(load_file(adapter / WEIGHTS))
    assert set(peft.get_peft_model_state_dict(with_adapters)) == stored


@OLD_NAME
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj", "fc1"]},
        {
            "target_modules": "all-linear",
            "exclude_modules": r".*(multi_modal_projector|lm_head|patch_embedding).*",
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {r"language_model\.layers\.1\.mlp\.up_proj": 20, "fc2": 3},
        },
        {"target_modules": r"model\.language_model\..*(gate|k)_proj", "use_rslora": True},
    ],
    ids=["some", "patterns", "rslora"],
)
def test_an_adapter_that_peft_wrote_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    peer = load_peer(published_folder())
    given = {"r": RANK, "lora_alpha": ALPHA, **settings}
    with_adapters = peft.get_peft_model(peer, peft.LoraConfig(**given)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in with_adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    with_adapters.save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs" / CONFIG, base_model_name_or_path=str(published_folder()))
    found = open_folder(tmp_path / "theirs")
    ours, base = found.load(), open_folder(published_folder())
    prompt = video_prompt(ours.cfg)
    theirs = peer_logits(with_adapters, prompt)
    assert largest(our_logits(ours, prompt) - theirs) / largest(theirs) <= 1e-5
    assert largest(our_logits(base.load(), prompt) - theirs) > 0.1
    assert (found.usage, found.tokenizer) == (base.usage, base.tokenizer)
    assert "nothing says which weights" in found.facts["base"]


def test_an_adapter_of_the_hub_s_fused_layers_is_read(adapter: Path, tmp_path: Path) -> None:
    """As fine-tuning of the published remote code writes them: att_proj, attn_out, ff_proj."""
    base = open_folder(published_folder())
    sizes = to_published(HUB, base.config, base.load().state_dict())
    rng = torch.Generator().manual_seed(4)
    tensors, expected = {}, dict(sizes)
    for name, weight in sizes.items():
        if re.fullmatch(r".*blocks\.\d+\..*(att_proj|attn_out|ff_proj|ff_out)\.weight", name):
            module = name.removesuffix(".weight")
            down = torch.randn(RANK, weight.shape[1], generator=rng)
            up = torch.randn(weight.shape[0], RANK, generator=rng)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            expected[name] = weight + ALPHA / RANK * up @ down
    assert len(tensors) == 8 * base.config.language.num_layers
    shutil.copy(adapter / CONFIG, tmp_path / CONFIG)
    save_file(tensors, tmp_path / WEIGHTS)
    found = to_published(HUB, base.config, dict(open_folder(tmp_path).weights.items()))
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"r": 0}, "r = 0"),
        ({"alpha_pattern": {"q_proj[": 2}}, r"alpha_pattern = \{'q_proj\['"),
        ({"alpha_pattern": {"(a|b|[a-z_.])*!": 2}}, r"alpha_pattern = "),  # takes years to match
        ({"alpha_pattern": {".*.*.*.*!": 2}}, r"alpha_pattern = "),
        ({"alpha_pattern": {"q_proj": "much"}}, "alpha_pattern = .*much"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much'"),
        ({"base_model_name_or_path": None}, "names no base.*base_model_name_or_path"),
        ({"base_model_name_or_path": "allenai/Molmo2-4B"}, "base is not here: allenai/Molmo2-4B"),
        ({"base_model_name_or_path": "."}, "its own base"),
    ],
)
def test_a_kind_that_is_not_computed_is_refused(
    changes: dict[str, object], message: str, copied: Path
) -> None:
    edit(copied / CONFIG, **changes)
    with pytest.raises(EdgeVlmError, match=message):
        open_folder(copied)


def test_adapters_that_name_each_other_are_refused(copied: Path) -> None:
    other = copied.with_name("other")
    shutil.copytree(copied, other)
    edit(copied / CONFIG, base_model_name_or_path="../other")
    edit(other / CONFIG, base_model_name_or_path=f"../{copied.name}")
    with pytest.raises(CheckpointError, match=rf"its own base \({copied.name} -> other -> "):
        open_folder(copied)


def _cut_off(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _changed(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return write


ONE = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_off, "not a whole safetensors file"),
        (_pickled, "there is no adapter_model.safetensors, and adapter_model.bin is a pickle"),
        (_changed(lambda held: held.__delitem__(ONE)), "missing: .*up_proj.lora_B"),
        (_changed(lambda held: held.update({ONE: torch.ones(3, RANK)})), "misshaped: .*up_proj"),
        (_changed(lambda held: held.update({"lm_head.weight": torch.ones(1)})), "unknown: lm_head"),
        (_changed(dict.clear), "none of 0 weight names"),
    ],
)
def test_files_that_do_not_fit_are_named(
    damage: Callable[[Path], None], message: str, copied: Path
) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        open_folder(copied)


def test_the_base_is_known_in_any_format_and_other_weights_are_refused(
    copied: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    convert(base, tmp_path / "half", OURS, dtype=torch.bfloat16)
    assert fingerprint(open_folder(tmp_path / "half")) == fingerprint(open_folder(base))
    edit(copied / CONFIG, base_model_name_or_path="../half")
    assert open_folder(copied).facts["base"].startswith(f"base {copied / '../half'}")

    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if n.endswith("ff_out.weight"))
    tensors[name] += 0.01
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    edit(copied / CONFIG, base_model_name_or_path="../base")
    with pytest.raises(CheckpointError, match=r"has other weights.*base_model_name_or_path"):
        open_folder(copied)


def test_a_folder_of_both_is_refused(copied: Path) -> None:
    shutil.copy(published_folder() / "model.safetensors", copied)
    with pytest.raises(CheckpointError, match=r"holds an adapter .* and whole weights"):
        open_folder(copied)


def test_a_base_of_another_shape_is_refused(copied: Path) -> None:
    record = json.loads((copied / RECORD).read_text())
    record["model"]["language"]["rope_theta"] *= 2
    edit(copied / RECORD, **record)
    with pytest.raises(ConfigError, match="a model of another shape"):
        open_folder(copied)


@pytest.mark.parametrize("record", ["{}", '{"base": 3, "model": {}}', "[]"])
def test_a_damaged_record_is_named(record: str, copied: Path) -> None:
    (copied / RECORD).write_text(record)
    with pytest.raises(CheckpointError, match=r"edge_vlm\.json"):
        open_folder(copied)


def test_adapters_on_adapters_add_up(adapter: Path, unmerged: VideoLM, tmp_path: Path) -> None:
    first = open_folder(adapter)
    form = RANK, ALPHA, identify(first, "float32"), first.require_tokenizer(), Usage()
    save_adapter(tmp_path / "second", first.config, factors_of(unmerged), *form)
    second = open_folder(tmp_path / "second")
    name = "llm.blocks.0.mlp.up.weight"
    plain = open_folder(published_folder()).weights[name]
    once, twice = first.weights[name] - plain, second.weights[name] - plain
    assert torch.allclose(twice, 2 * once, atol=1e-5)
    assert second.origin.path == published_folder()


def test_an_export_reads_merged_weights_and_records_both_folders(adapter: Path) -> None:
    source, merged = open_weights(adapter), open_folder(adapter).load().state_dict()
    assert source.cfg == open_folder(adapter).config
    assert all(torch.equal(source.float32(name), merged[name]) for name in merged)
    hashes = source.identity["sha256"]
    assert {WEIGHTS, RECORD, CONFIG, "tokenizer.json"} <= hashes.keys()
    (base,) = [name for name in hashes if name.endswith("/model.safetensors")]
    assert (adapter / base).resolve() == published_folder() / "model.safetensors"


def test_commands_take_an_adapter_as_a_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter)]) == 0
    told = capsys.readouterr().out
    assert "a LoRA adapter, opened as its base with the adapter merged in" in told
    matrices = len(load_file(adapter / WEIGHTS)) // 2
    assert f"rank {RANK} on {matrices} matrices" in told
    assert str(published_folder()) in told

    hub = tmp_path / "hub"
    assert main(["convert", str(adapter), "-o", str(hub), "--to", "hub"]) == 0
    merged, prompt = open_folder(adapter).load(), video_prompt(open_folder(adapter).config)
    theirs = peer_logits(load_peer(hub), prompt)
    assert math.isclose(largest(theirs - our_logits(merged, prompt)), 0, abs_tol=1e-4)
    assert (hub / "preprocessor_config.json").is_file()  # taken over from the base
    assert not (hub / CONFIG).exists()


def test_names_of_another_model_are_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copy(adapter / CONFIG, tmp_path / CONFIG)
    names = [f"base_model.model.bert.layer.0.query.lora_{kind}.weight" for kind in "AB"]
    save_file({name: torch.ones(1, 1) for name in names}, tmp_path / WEIGHTS)
    with pytest.raises(WeightNamesError, match="none of 1 weight names is known"):
        open_folder(tmp_path)
