"""First and last tokens, and how answers are drawn: from the folder, not from the program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.usage import Usage
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.published.tokens import with_tokens
from edge_vlm.text.prompt import PAD, RELEASED, PromptFormat, PromptStyle
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.session.budget import default_settings
from tests.preprocessing_record import PUBLISHED_4B
from tests.published_folder import LIMITS, published_folder
from tests.tiny import traced_once

GREEDY = {"max_answer_tokens": 512}
ADDED = [
    {"id": 7, "content": "<|endoftext|>", "special": True},
    {"id": 9, "content": "<|im_end|>", "special": True},
]


def usage_of(path: Path, **files: Any) -> tuple[Usage, list[str]]:
    for name, data in files.items():
        (path / f"{name}.json").write_text(json.dumps(data))
    return with_tokens(Usage(style=RELEASED), path)


def tokens_of(path: Path, **files: Any) -> tuple[str, tuple[str, ...]]:
    style = usage_of(path, **files)[0].style
    return style.begin, style.ends


def test_a_folder_that_says_nothing_is_one_of_qwen(tmp_path: Path) -> None:
    usage, notes = usage_of(tmp_path)
    assert (usage.style, usage.defaults, notes) == (RELEASED, GREEDY, [])


@pytest.mark.parametrize("as_object", [False, True])
def test_o_7b_begins_and_ends_with_its_own(as_object: bool, tmp_path: Path) -> None:
    """Its first token is the tokenizer's last one where it names no first one."""
    token: Any = {"content": "<|endoftext|>", "lstrip": False} if as_object else "<|endoftext|>"
    assert tokens_of(tmp_path, tokenizer_config={"bos_token": None, "eos_token": token}) == (
        PAD,
        (PAD,),
    )


def test_every_last_token_counts_and_the_tokenizers_comes_first(tmp_path: Path) -> None:
    files = {
        "tokenizer": {"added_tokens": ADDED},
        "tokenizer_config": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        "generation_config": {"bos_token_id": 9, "eos_token_id": [7, 9]},
    }
    assert tokens_of(tmp_path, **files) == ("<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))


def test_ids_alone_are_enough(tmp_path: Path) -> None:
    decoder = {str(item["id"]): {"content": item["content"]} for item in ADDED}
    only = {"tokenizer_config": {"added_tokens_decoder": decoder}}
    by_model = {"config": {"text_config": {"bos_token_id": 9, "eos_token_id": 7}}}
    assert tokens_of(tmp_path, **only, **by_model) == ("<|im_end|>", ("<|endoftext|>",))
    generation = {"generation_config": {"bos_token_id": 7, "eos_token_id": [9]}}
    assert tokens_of(tmp_path, **generation) == ("<|endoftext|>", ("<|im_end|>",))


def test_ids_without_a_tokenizer_name_the_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(ConfigError, match=r"no tokenizer\.json says .*: fetch the tokenizer"):
        with_tokens(Usage(), tmp_path)


@pytest.mark.parametrize(
    "generation",
    [
        *({"eos_token_id": 12}, {"eos_token_id": [9, True]}, {"bos_token_id": "x"}),
        *({"max_new_tokens": -1}, {"do_sample": True, "temperature": "hot"}),
        *({"do_sample": True, "temperature": 11}, {"do_sample": True, "top_p": 2}),
    ],
)
def test_a_value_that_cannot_be_is_named(generation: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        usage_of(tmp_path, tokenizer={"added_tokens": ADDED}, generation_config=generation)
    assert any(f"{field} is" in str(caught.value) for field in generation)


@pytest.mark.parametrize("added", [[{"id": 3}], [3], [{"id": "x", "content": "y"}]])
def test_a_broken_list_of_tokens(added: Any, tmp_path: Path) -> None:
    generation = {"eos_token_id": 3}
    with pytest.raises(ConfigError, match="special tokens cannot be read"):
        usage_of(tmp_path, tokenizer={"added_tokens": added}, generation_config=generation)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        with_tokens(Usage(), tmp_path)


def test_draws_are_those_of_the_folder(tmp_path: Path) -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    usage, notes = usage_of(tmp_path, generation_config={**sampled, "max_new_tokens": 2048})
    assert usage.defaults == {"max_answer_tokens": 2048, "temperature": 0.7, "top_p": 0.8}
    assert notes == ["top_k 20 of generation_config.json not applied"]
    greedy = {**sampled, "do_sample": False}
    assert usage_of(tmp_path, generation_config=greedy) == (
        Usage(style=RELEASED, defaults=GREEDY),
        [],
    )


@pytest.mark.skipif(not PUBLISHED_4B.is_dir(), reason="needs the published 4B folder")
def test_the_published_4b_begins_with_151645() -> None:
    usage, _ = with_tokens(Usage(style=RELEASED), PUBLISHED_4B)
    prompt = PromptFormat(Tokenizer.from_file(PUBLISHED_4B / "tokenizer.json"), usage.style)
    assert (prompt.bos_id, prompt.eos_ids, prompt.patch_id) == (151645, (151645,), 151938)


def o_7b(target: Path) -> Path:
    """The small published folder with the first and last token of O-7B, and a second last one."""
    folder = Path(shutil.copytree(published_folder(), target))
    words = Tokenizer.from_file(folder / "tokenizer.json")
    stops = [words.id_of(PAD), words.id_of("<unk>")]
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": PAD, "eos_token": PAD}))
    generation = {"eos_token_id": stops, "do_sample": True, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_an_exported_bundle_begins_and_stops_as_the_folder_says(tmp_path: Path) -> None:
    folder = o_7b(tmp_path / "o-7b")
    with traced_once():
        export_bundle(folder, tmp_path / "bundle", ExportOptions(limits=LIMITS, thorough=False))
    bundle = EngineBundle.open(tmp_path / "bundle")
    found = open_folder(folder)
    assert bundle.style == found.usage.style
    assert bundle.style.ends == (PAD, "<unk>")
    assert bundle.frames == found.usage.frames
    assert bundle.defaults["max_answer_tokens"] == 512
    settings = default_settings(bundle, ServerLimits())
    assert (settings.temperature, settings.top_p) == (0.5, 1.0)
    # The small cache of this bundle has no room for so long an answer: a quarter of it.
    assert settings.max_answer_tokens == 256
    with LoadedBundle.open(bundle.path, threads=1) as engines:
        prompt = engines.prompt
        assert prompt.bos_ids.tolist() == [prompt.tokenizer.id_of(PAD)]
        assert prompt.eos_ids == tuple(map(prompt.tokenizer.id_of, (PAD, "<unk>")))


def test_turns_keep_the_templates_end_and_answers_have_the_models() -> None:
    words = Tokenizer.from_file(published_folder() / "tokenizer.json")
    prompt = PromptFormat(words, PromptStyle(begin=PAD, ends=(PAD, "<unk>")))
    assert prompt.answer_ids("yes")[-1] == words.id_of(PAD)
    turn = prompt.turn_ids("is there a red ball ?", "yes")
    assert words.id_of("<|im_end|>") in turn
    assert words.id_of(PAD) not in turn
    assert np.array_equal(prompt.bos_ids, [words.id_of(PAD)])
    with pytest.raises(KeyError, match="no token"):
        PromptFormat(words, PromptStyle(ends=("<end>",)))
    with pytest.raises(ValueError, match="must be tokens"):
        PromptStyle(ends=())


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(published_folder(), tmp_path / "other"))
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    word = next(word for word, place in vocab.items() if place == 20)
    del vocab[word]
    for item in [*data["added_tokens"]]:
        if item["id"] > 20:
            item["id"] -= 1
    data["model"]["vocab"] = {w: i - (i > 20) for w, i in vocab.items()}
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="does not fit the weights: <im_patch> is id"):
        open_folder(folder).require_tokenizer()
    data["added_tokens"] = [
        item for item in data["added_tokens"] if item["content"] != "<im_patch>"
    ]
    data["model"]["vocab"].pop("<im_patch>", None)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no token '<im_patch>'"):
        open_folder(folder).require_tokenizer()
