"""Every command line of README and docs is one that its program takes."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from importlib import metadata, util
from pathlib import Path

import pytest

from edge_vlm import cli
from edge_vlm.console.usage import Parser
from tests.conftest import ROOT
from tests.docs.commands import NEEDS, PAGES, WORDS, DocCommand, commands_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    points = metadata.entry_points(group=cli.ENTRY_POINT_GROUP)
    return {point.name: cli.opened(point)[1] for point in points}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_each_command_is_known_and_says_what_it_needs(name: str) -> None:
    for command in commands_of(ROOT / name):
        assert command.words[0] in WORDS, f"{command.where}: {command.text}"
        assert command.needs is None or command.needs in NEEDS, (
            f"{command.where}: needs {command.needs!r}, known are {', '.join(NEEDS)}"
        )


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_each_edge_vlm_line_is_taken(
    name: str,
    parsers: dict[str, Parser],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # What is there when a command runs is another test's matter.
    monkeypatch.setattr("edge_vlm.console.paths._try_writing", lambda folder, path: None)
    monkeypatch.setattr(Path, "is_dir", lambda path: path.suffix == "")
    monkeypatch.setattr(Path, "exists", lambda path: True)
    for command in commands_of(ROOT / name):
        for arguments in command.edge_vlm:
            _take(command, arguments, parsers, capsys)


def _take(
    command: DocCommand,
    arguments: list[str],
    parsers: dict[str, Parser],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments[:1] == [cli.HELP] or not arguments or arguments[0].startswith("-"):
        return
    assert arguments[0] in parsers, f"{command.where}: no command {arguments[0]}"
    try:
        parsers[arguments[0]].parse_args(arguments[1:])
    except SystemExit as stopped:
        assert stopped.code == 0, f"{command.where}: {capsys.readouterr().err}"


def test_each_python_line_names_something_that_is_there() -> None:
    missing = []
    for command in (command for name in PAGE_NAMES for command in commands_of(ROOT / name)):
        words = command.words
        if words[0] != "python" or command.needs == "the network":
            continue
        if words[1] == "-m":
            top = words[2].partition(".")[0]
            module = Path(words[2].replace(".", "/"))
            known = util.find_spec(top) is not None
            if (ROOT / top).is_dir():
                known = (ROOT / module).with_suffix(".py").is_file() or (ROOT / module).is_dir()
            if not known:
                missing.append(command.where)
        elif words[1].endswith(".py") and not (ROOT / words[1]).is_file():
            missing.append(command.where)
    assert not missing


def test_each_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named: dict[str, list[str]] = defaultdict(list)
    for name in PAGE_NAMES:
        for found in re.finditer(r"(?:edge-vlm|-e '?\.)\[([\w,-]+)\]", (ROOT / name).read_text()):
            for extra in found[1].split(","):
                named[extra].append(name)
    assert named
    assert not named.keys() - project["optional-dependencies"].keys(), named


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_each_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lost = []
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / target).resolve() if target else page
        is_lost = bool(anchor) and file.suffix == ".md" and anchor not in _anchors(file)
        if not file.exists() or is_lost:
            lost.append(link)
    assert not lost


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    named = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(index)}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert not pages - named - {ROOT / "docs/README.md"}
