"""The command: its list, its errors and its exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata

import pytest

import edge_vlm
from edge_vlm import cli, errors
from edge_vlm.cli import Command
from edge_vlm.errors import export


class StubEntryPoint:
    """Stands where `importlib.metadata` would give one of our entry points."""

    value = "tests:stub"

    def __init__(self, name: str, outcome: object) -> None:
        self.name = name
        self.outcome = outcome

    def load(self) -> object:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def install(monkeypatch: pytest.MonkeyPatch, outcome: object, name: str = "probe") -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [StubEntryPoint(name, outcome)])


def command(run: object) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--count", type=int, default=1)

    return Command(add_arguments=add_arguments, run=run)  # type: ignore[arg-type]


def test_a_command_gets_its_arguments_and_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, command(lambda args: args.count))
    assert cli.main(["probe", "--count", "7"]) == 7


def test_a_typed_error_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise errors.BundleNotFound("no bundle\nhere", where="/nowhere", remedy="make one")

    install(monkeypatch, command(run))
    assert cli.main(["probe"]) == errors.BundleNotFound.exit_code
    assert capsys.readouterr().err == (
        "edge-vlm: E-BUNDLE-NOT-FOUND: no bundle here (/nowhere): make one\n"
    )


@pytest.mark.parametrize("where", ["load", "run"])
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    missing = ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime.capi")

    def run(args: argparse.Namespace) -> int:
        raise missing

    install(monkeypatch, missing if where == "load" else command(run), name="serve")
    assert cli.main(["serve"]) == errors.MissingExtraError.exit_code
    assert capsys.readouterr().err == (
        "edge-vlm: E-MISSING-EXTRA: onnxruntime is not installed: "
        "install it with: pip install 'edge-vlm[ort]'\n"
    )


def test_a_broken_module_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        ModuleNotFoundError("No module named 'edge_vlm.nope'", name="edge_vlm.nope"),
        "serve",
    )
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serv"])
    assert stopped.value.code == 2
    assert "unknown command 'serv', did you mean serve?" in capsys.readouterr().err


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from edge_vlm import cli; code = cli.main([]); "
        "print(code, sorted(m for m in sys.modules if m.startswith('edge_vlm')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *listing, last = done.stdout.splitlines()
    assert (
        last == "0 ['edge_vlm', 'edge_vlm.cli', 'edge_vlm.console', 'edge_vlm.console.output', "
        "'edge_vlm.console.usage', 'edge_vlm.errors', 'edge_vlm.errors.words']"
    )
    for name, (_, summary) in cli.COMMANDS.items():
        assert any(line.split() == [name, *summary.split()] for line in listing), name


def test_every_entry_point_loads_and_is_listed() -> None:
    points = metadata.entry_points(group=cli.ENTRY_POINT_GROUP)
    assert {point.name for point in points} == set(cli.COMMANDS)
    for point in points:
        loaded = point.load()
        assert isinstance(loaded, Command)
        loaded.add_arguments(argparse.ArgumentParser())


def test_help_of_a_command_says_what_the_list_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["watch", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert cli.COMMANDS["watch"][1] in shown


@pytest.mark.parametrize(
    ("name", "library", "extra", "named"),
    [
        ("watch", "msgspec", "client", "client"),
        ("serve", "msgspec", "client", "ort"),  # one installation, not three
        ("serve", "onnxruntime", "ort", "ort"),
        ("watch", "starlette", "serve", "serve"),
        ("train", "msgspec", "train", "train"),
        ("serve", "aiomqtt", "alerts", "alerts"),
        ("of a stranger", "msgspec", "client", "client"),
    ],
)
def test_a_library_that_is_missing_names_what_the_command_needs(
    name: str,
    library: str,
    extra: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise errors.MissingExtraError.for_library(library, extra)

    install(monkeypatch, command(run), name=name)
    assert cli.main([name]) == errors.MissingExtraError.exit_code
    error = capsys.readouterr().err
    assert f"{library} is not installed" in error
    assert f"'edge-vlm[{named}]'" in error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"edge-vlm {edge_vlm.__version__}\n"


def test_every_error_has_its_own_code() -> None:
    tree = [value for value in {**vars(errors), **vars(export)}.values() if isinstance(value, type)]
    leaves = [value for value in tree if issubclass(value, errors.EdgeVlmError)]
    codes = [leaf.code for leaf in leaves]
    assert len(codes) == len(set(codes))
    assert all(leaf.__name__ in (errors.__doc__ or "") for leaf in leaves)
