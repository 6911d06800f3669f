"""What pages for people and programs that catalogue us must hold."""

from __future__ import annotations

import re
from datetime import date

import yaml
from PIL import Image

import edge_vlm
from tests.conftest import ROOT
from tests.docs.commands import PAGES


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    # What the schema of 1.2.0 asks for; `cffconvert --validate` was run on the file.
    assert {"cff-version", "title", "message", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    assert str(cited["version"]) == edge_vlm.__version__
    assert all(author.get("name") or author.get("family-names") for author in cited["authors"])


def test_changes_have_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert versions[0] == "Unreleased"
    assert versions[1] == edge_vlm.__version__
    kinds = set(re.findall(r"^### (\w+)$", text.partition(f"## [{versions[1]}]")[0], re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for day in re.findall(r"^## \[[\d.]+\] - (\d{4}-\d\d-\d\d)$", text, re.M):
        date.fromisoformat(day)


def test_the_moving_picture_moves_and_is_small() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert first is not None
    file = ROOT / first[1]
    assert file.suffix == ".gif"
    assert file.stat().st_size < 3_000_000
    with Image.open(file) as picture:
        assert getattr(picture, "n_frames", 1) > 10


def test_a_newcomer_is_told_how_the_command_is_found() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^edge-vlm ", text, re.M)
    assert command is not None
    assert "source .venv/bin/activate" in text[: command.start()]


def test_a_new_environment_gets_it_from_a_clone() -> None:
    """It is on no index, where the name could be somebody else's."""
    for page in (*PAGES, ROOT / "deploy" / "edge-vlm.service"):
        for block in re.split(r"^```.*$", page.read_text(encoding="utf-8"), flags=re.M):
            if "-m venv" in block:
                assert not re.search(r"install '?edge-vlm\b", block), page
