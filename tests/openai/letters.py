"""The tiny model with a vocabulary of single letters, which can write JSON (and says nothing)."""

from __future__ import annotations

import hashlib
import json
import shutil
import string
from pathlib import Path

from tests.tiny import tiny_bundle

LETTERS = '{}[]":,.- \n?' + string.digits + string.ascii_lowercase


def letters_bundle(folder: Path) -> Path:
    """Made in `folder` from the tiny bundle."""
    place = folder / "letters"
    shutil.copytree(tiny_bundle(), place)
    file = place / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    words = {"<unk>": 1, **special}
    free = (number for number in range(60) if number not in words.values())
    words |= {letter: next(free) for letter in LETTERS}
    tokenizer["model"]["vocab"] = words
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[\\s\\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    file.write_text(json.dumps(tokenizer))
    manifest = place / "manifest.json"
    known = json.loads(manifest.read_text())
    known["files"]["tokenizer.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    known["name"] = "letters"
    manifest.write_text(json.dumps(known))
    return place
