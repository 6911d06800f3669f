"""Bundles of strangers: whatever stands in their files, a typed error or a bundle that works."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import BundleError, BundleSchemaError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.fuzz.files import linked_bundle, open_bundle

MANIFEST_DATA = json.loads((DEMO_BUNDLE / MANIFEST).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("model", "language", "num_layers"), 10**9, "num_layers"),
        (("model", "language", "max_positions"), 1 << 60, "max_positions"),
        (("model", "vision", "image_size"), 24 * 10**6, "image_size"),
        (("model", "language", "width"), 1.5, "whole number"),
        (("defaults", "max_time_s"), -5, "max_time_s"),
        (("defaults", "max_positions"), 1 << 70, "max_positions"),
        (("defaults", "fps"), "fast", "fps_cap"),
        (("defaults", "policy"), [], "policy"),
        (("defaults", "instructions"), 5, "instructions"),
        (("name",), "x\x1b]0;owned\x07", "name"),
    ],
)
def test_a_number_that_no_model_has_is_named(
    folder: Path, place: tuple[str, ...], value: Any, words: str
) -> None:
    data = copy.deepcopy(MANIFEST_DATA)
    owner = data
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleSchemaError, match=words):
        open_bundle(folder)


def test_a_manifest_nested_without_end_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"schema_version": ' + "[" * 100_000)
    with pytest.raises(BundleSchemaError, match="nested"):
        EngineBundle.open(folder)


HEADERS = [
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }" % (1 << 62, 192),
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4, 192), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 192), }",
    b"(" * 5000,
    b"",
]


@pytest.mark.parametrize("header", HEADERS, ids=["huge", "negative", "object", "deep", "empty"])
def test_a_table_whose_header_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    folder = linked_bundle(tmp_path / "bundle")
    table = folder / "embed_table.npy"
    table.unlink()
    text = header + b"\n"
    table.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64)
    data = copy.deepcopy(MANIFEST_DATA)
    data["files"]["embed_table.npy"] = hashlib.sha256(table.read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleSchemaError, match=r"embed_table\.npy"):
        _ = EngineBundle.open(folder).embed_table


def test_references_that_unpack_to_gigabytes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = linked_bundle(tmp_path / "bundle")
    path = folder / "reference" / "llm.npz"
    path.unlink()
    np.savez_compressed(path, big=np.zeros(1 << 20))
    bundle = EngineBundle.open(DEMO_BUNDLE)
    object.__setattr__(bundle, "path", folder)
    monkeypatch.setattr("edge_vlm.formats.bundle.MOST_REFERENCE_BYTES", 1 << 20)
    with pytest.raises(BundleSchemaError, match="unpack"):
        bundle.reference("llm")
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(BundleSchemaError, match=r"llm\.npz"):
        bundle.reference("llm")


def test_a_special_token_of_one_character_is_refused(tmp_path: Path) -> None:
    data = json.loads((DEMO_BUNDLE / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 999, "content": "?"})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="shorter than two"):
        PromptFormat(Tokenizer.from_file(path))


def test_a_folder_whose_name_no_library_takes_is_named(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        odd.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(BundleSchemaError, match="not UTF-8") as caught:
        LoadedBundle.open(linked_bundle(odd), threads=1)
    assert caught.value.remedy == "rename the folder"
