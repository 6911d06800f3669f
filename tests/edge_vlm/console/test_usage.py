"""One line for a usage error, with what was probably meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import metadata

import pytest

from docs import build_exit_codes
from edge_vlm import cli, errors
from edge_vlm.console import exit_codes, output, usage
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("watch --sorce x", "edge-vlm watch: no such option: --sorce, did you mean --source?"),
        ("watch --source x --keep-ration=1", "--keep-ration, did you mean --keep-ratio?"),
        ("ask", "edge-vlm ask: the following arguments are required: video, question"),
        (
            "serve --backend otr",
            "cannot be 'otr', only one of ort, cuda, trt, openvino, auto, did you mean",
        ),
        ("ask a b --detail vidoe", "did you mean video?"),
        ("data chek x", "did you mean check?"),
        ("data check x --fsp 3", "edge-vlm data check: no such option: --fsp, did you mean --fps?"),
        ("verify x -q", "no such option: -q"),
        ("serve .", "edge-vlm serve: one argument too many: '.', did you mean --bundle .?"),
        ("plan 8b", "edge-vlm plan: one argument too many: '8b', did you mean --model 8b?"),
        ("serve -- my-bundle", "one argument too many: 'my-bundle' (see"),
        ("watch localhost:1 my-bundle", "one argument too many: 'my-bundle' (see"),
        ("serve " + "x" * 300, "one argument too many: 'xxx"),
        ("ask a what now", "too many: 'now', a question of several words wants quotes (see"),
        ("build x y", "edge-vlm build: one argument too many: 'y' (see"),
        ("bench --nope", "edge-vlm bench: no such option: --nope (see"),
        ("serv", "edge-vlm: unknown command 'serv', did you mean serve?"),
        ("help exitcodes", "did you mean exit-codes?"),
    ],
)
def test_a_usage_error_is_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert said in shown
    assert shown.endswith("--help)")


@pytest.mark.parametrize(
    "line",
    [
        "--sour x --keep .5",  # abbreviations, as argparse takes them
        "--source x --ask=--what",
        "--source x --alert-hold -1.5",
        "--source - --fast",
    ],
)
def test_what_argparse_takes_is_taken(line: str) -> None:
    (point,) = metadata.entry_points(group=cli.ENTRY_POINT_GROUP, name="watch")
    _, parser = cli.opened(point)
    assert parser.parse_args(line.split()).source in ("x", "-")


def test_an_empty_question_is_told_in_the_words_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["ask", "clip.mp4", " "]) == errors.NoQuestion.exit_code
    said = capsys.readouterr().err
    assert said == "edge-vlm: E-NO-QUESTION: the question is empty: write it in quotation marks\n"


def test_help_of_a_command_and_of_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["help", "watch"])
    assert "--source" in capsys.readouterr().out
    assert cli.main(["help", "exit-codes"]) == 0
    shown = capsys.readouterr().out
    assert all(error.code in shown for error in exit_codes.classes())


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_argument_says_what_it_is(name: str) -> None:
    (point,) = metadata.entry_points(group=cli.ENTRY_POINT_GROUP, name=name)
    _, parser = cli.opened(point)
    silent = [
        "/".join(action.option_strings) or action.dest
        for action in _actions(parser)
        if not isinstance(action, argparse._SubParsersAction) and not (action.help or "").strip()
    ]
    assert not silent


@pytest.mark.parametrize("text", ["0", "-3", "257", "9999", "1.5", "two", ""])
def test_a_number_of_threads_that_stops_a_machine_is_none(text: str) -> None:
    assert usage.thread_count("256") == 256
    with pytest.raises(argparse.ArgumentTypeError, match="must be 1 to 256, got"):
        usage.thread_count(text)


def test_the_tree_says_what_the_classes_say() -> None:
    drawn = exit_codes.described()
    assert set(drawn) == {kind.__name__ for kind in exit_codes.classes()}
    for kind in exit_codes.classes():
        assert drawn[kind.__name__][:2] == (kind.exit_code, kind.code)


def test_every_exit_code_says_what_it_is_about() -> None:
    assert {kind.exit_code for kind in exit_codes.classes()} <= {1, *exit_codes.AREAS}
    assert cli.INTERRUPTED_EXIT_CODE in exit_codes.BESIDES
    assert output.CLOSED_PIPE_EXIT_CODE in exit_codes.BESIDES
    assert all(about for _, about, _ in exit_codes.table())
    assert errors.__doc__ is not None


def test_the_page_of_exit_codes_is_up_to_date() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text(encoding="utf-8")
    assert page == exit_codes.as_markdown(), (
        f"run: python -m {build_exit_codes.__name__} docs/exit-codes.md"
    )
