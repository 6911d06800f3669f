"""Output that cannot be written: real processes, real pipes, a real full device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_vlm import cli
from edge_vlm.console import output
from edge_vlm.errors import OutputError
from tests.tiny import tiny_bundle

FULL = Path("/dev/full")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONUNB", "PYTHONIO"))}
COMMANDS = [
    *(["--help"], ["--version"], ["watch", "--help"], ["export", "--help"], ["eval", "--help"]),
    ["inspect", "BUNDLE"],
]
PRINTS = (
    "import sys; from edge_vlm import cli; cli.run_command = lambda _: {}; sys.exit(cli.main())"
)


def start(
    arguments: list[str], stdout: Any, *, shell: str = 'exec "$@"', **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [str(tiny_bundle()) if part == "BUNDLE" else part for part in arguments]
    if command[0] != "-c":
        command = ["-m", "edge_vlm", *command]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, *command],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        env=ENVIRONMENT | environment,
        check=False,
    )
    return done


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_a_command_quietly(
    arguments: list[str], unbuffered: str, closed_pipe: int
) -> None:
    done = start(arguments, closed_pipe, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (128 + 13, "")


@pytest.mark.parametrize("count", [1, 100_000])
def test_so_does_one_that_closes_on_the_way(count: int) -> None:
    """`head -1` reads one line and ends, whether or not the rest fits the pipe."""
    code = PRINTS.format(f"[print('line', i, flush=True) for i in range({count})] and 0")
    with subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as head:
        done = start(["-c", code], head.stdin)
        assert head.communicate()[0] == b"line 0\n"
    assert (done.returncode, done.stderr) == (0 if count == 1 else 141, "")


def test_an_error_that_nobody_reads_is_quiet_too(closed_pipe: int) -> None:
    done = start(["inspect", "/nowhere"], closed_pipe, shell='exec "$@" 2>&1')
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closing", [">&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_what_was_closed_from_the_start_takes_everything(
    arguments: list[str], closing: str, unbuffered: str
) -> None:
    done = start(arguments, None, shell=f'exec "$@" {closing}', PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_file_becomes_the_output_that_was_closed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = PRINTS.format(
        f"[open({str(file)!r}, 'w', buffering=1), print('lost', flush=True)] and 0"
    )
    assert start(["-c", code], None, shell='exec "$@" <&- >&-').returncode == 0
    assert file.read_text() == ""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_is_an_error(arguments: list[str], unbuffered: str) -> None:
    with FULL.open("w") as full:
        done = start(arguments, full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == OutputError.exit_code
    assert done.stderr == ("edge-vlm: E-OUTPUT: cannot write the output: No space left on device\n")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", r"\u2588 \xb7 \xe9 \udcff"), ("latin-1", "\\u2588 \xb7 \xe9 \\udcff"),
     ("utf-8", "\u2588 \xb7 \xe9 \\udcff")],
)  # fmt: skip
def test_what_the_encoding_lacks_is_escaped(encoding: str, expected: str, tmp_path: Path) -> None:
    code = PRINTS.format(r"print('\u2588 \xb7 \xe9 \udcff')")
    for stream in ("stdout", "stderr"):
        code = PRINTS.format(rf"print('\u2588 \xb7 \xe9 \udcff', file=sys.{stream})")
        with (tmp_path / "out").open("wb") as out:
            done = start(["-c", code], out, shell='exec "$@" 2>&1', PYTHONIOENCODING=encoding)
        assert done.returncode == 0
        assert (tmp_path / "out").read_bytes() == f"{expected}\n".encode(encoding)


def test_rich_draws_in_ascii_too() -> None:
    code = PRINTS.format(
        "__import__('rich.console').console.Console().print("
        "__import__('rich.panel').panel.Panel('\\u2588'))"
    )
    done = start(["-c", code], subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u2588" in done.stdout


def test_a_pipe_of_our_own_that_breaks_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the standard streams end a command quietly, not a socket or a child's pipe."""

    def run(arguments: list[str]) -> int:
        raise BrokenPipeError("a broker has gone")

    monkeypatch.setattr(cli, "run_command", run)
    with pytest.raises(BrokenPipeError, match="broker"):
        cli.main([])


def test_streams_of_others_are_left_alone_and_ours_are_put_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sys.stdout, sys.stderr
    with output.standard_output():
        assert (sys.stdout, sys.stderr) == before
        print("seen")
    assert capsys.readouterr().out == "seen\n"
    code = (
        "import sys; from edge_vlm import cli; before = sys.stdout; cli.run_command = lambda _: "
        "print(sys.stdout is before); cli.main(); print(sys.stdout is before)"
    )
    done = start(["-c", code], subprocess.PIPE)
    assert done.stdout == "False\nTrue\n"


HOSTILE = "yes\x1b]0;owned\x07\x1b]52;c;cm0=\x07\x1b[2J\r no\x9b8m\u202e\tok\u2588\n"


def test_a_terminal_is_sent_nothing_of_others_that_it_obeys() -> None:
    code = PRINTS.replace("lambda _: {}", f"lambda _: print({HOSTILE!r}, end='')")
    done = start(["-c", code], subprocess.PIPE, PYTHONUTF8="1")
    assert done.stdout == (
        "yes\\x1b]0;owned\\x07\\x1b]52;c;cm0=\\x07\\x1b[2J\\r no\\x9b8m\\u202e\tok\u2588\n"
    )


def test_what_is_ours_is_obeyed() -> None:
    ours = "print('\\x1b[1mbold', file=obeyed(sys.stdout))"
    code = PRINTS.replace("lambda _: {}", f"lambda _: {ours}").replace(
        "from edge_vlm import cli;",
        "from edge_vlm import cli; from edge_vlm.console.output import obeyed;",
    )
    assert start(["-c", code], subprocess.PIPE).stdout == "\x1b[1mbold\n"
