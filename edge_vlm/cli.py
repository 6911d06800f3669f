"""The `edge-vlm` command.

Subcommands are entry points of the group `edge_vlm.commands`; each stage contributes its own. A
subcommand's module is imported only when it is called, so `edge-vlm --help` needs nothing but the
standard library. The value of an entry point is a `Command`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import edge_vlm
from edge_vlm.console.output import CLOSED_PIPE_EXIT_CODE, OutputClosed, standard_output
from edge_vlm.console.usage import Parser, did_you_mean
from edge_vlm.errors import EdgeVlmError, MissingExtraError, OutputError

ENTRY_POINT_GROUP = "edge_vlm.commands"

# Our commands in the order of `edge-vlm --help`: the extra each one needs (for a server of its own
# more) and what it does. It stands only here, because printing the list imports no command.
COMMANDS = {
    "demo": ("ort", "stream a rendered clip through the demo model and check its answers"),
    "serve": ("ort", "serve a bundle over a websocket, with a browser page"),
    "watch": ("client", "stream a file, webcam or RTSP camera to a server and ask questions"),
    "ask": ("client", "ask one question about one video file"),
    "mcp": ("mcp", "let an agent see a running server's camera (Model Context Protocol)"),
    "doctor": ("ort", "say what this machine has and lacks for serving, and how to get it"),
    "replay": ("ort", "run a recorded session again: the same report, or figures at full speed"),
    "bench": ("ort", "measure how fast a bundle is on this machine, stage by stage"),
    "plan": ("ort", "say whether a model fits a device, and how fast it would be"),
    "train": ("train", "train a model by a recipe, in one process or many"),
    "data": ("train", "check training data: every record, every video, every length"),
    "world": ("train", "write held-out clips with questions and true answers"),
    "eval": ("ort", "measure models on questions: policies, budgets and paths in one table"),
    "eval-alerts": ("ort", "measure a bundle's alerts on footage with known events"),
    "calibrate": ("ort", "choose settings, precisions and alert thresholds on your own footage"),
    "pull": ("pull", "fetch published weights from a model hub, to inspect, export and serve"),
    "inspect": ("train", "say what a model or bundle holds: parts, sizes, precision"),
    "convert": ("train", "write weights of any known kind in our format or the model hub's"),
    "export": ("export", "turn a checkpoint into a bundle of ONNX graphs"),
    "build": ("trt-rtx", "compile a bundle's graphs to TensorRT engines, on the device"),
    "verify": ("export", "compare a bundle's graphs with torch"),
}

HELP, EXIT_CODES = "help", "exit-codes"
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand. Its name is its entry point's; what `--help` says of it stands in COMMANDS.

    `run` returns the exit code and may raise any `EdgeVlmError`. Modules that define commands
    import heavy libraries inside `run`.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a typed error becomes one line on stderr.

    Output that nobody reads any more ends the command quietly, see `edge_vlm.console.output`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with standard_output():
            return _exit_code(arguments)
    except OutputClosed:
        return CLOSED_PIPE_EXIT_CODE
    except OutputError as error:
        return _reported(error)


def _exit_code(arguments: list[str]) -> int:
    try:
        return run_command(arguments)
    except EdgeVlmError as error:
        return _reported(error)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE


def _reported(error: EdgeVlmError) -> int:
    print(f"edge-vlm: {error.code}: {error}", file=sys.stderr)
    return error.exit_code


def run_command(arguments: list[str]) -> int:
    """As `main`, but what is raised is the caller's: for commands that call another stage's."""
    commands = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if not arguments or arguments[0].startswith("-"):
        parser = _top_parser(sorted(commands, key=_order))
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == HELP and name not in commands:
        return _help(commands, rest)
    if name not in commands:
        hint = did_you_mean(name, [*commands, HELP])
        _top_parser(sorted(commands, key=_order)).error(f"unknown command '{name}'{hint}")
    try:
        return _run(commands[name], rest)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if name not in COMMANDS or library.startswith("edge_vlm"):
            raise  # a bug, not a library that an extra would bring
        raise MissingExtraError.for_library(library, COMMANDS[name][0]) from error
    except MissingExtraError as error:
        raise error.widened(COMMANDS[name][0] if name in COMMANDS else "") from error


def _run(point: metadata.EntryPoint, arguments: list[str]) -> int:
    command, parser = opened(point)
    return command.run(parser.parse_args(arguments))


def opened(point: metadata.EntryPoint) -> tuple[Command, Parser]:
    """A command and what reads its arguments. Imports the command's module."""
    command = point.load()
    if not isinstance(command, Command):
        raise TypeError(f"entry point {point.value} is not an edge_vlm.cli.Command")
    _, summary = COMMANDS.get(point.name, ("", None))
    parser = Parser(prog=f"edge-vlm {point.name}", description=summary)
    command.add_arguments(parser)
    return command, parser


def _help(commands: Mapping[str, metadata.EntryPoint], topics: list[str]) -> int:
    """`edge-vlm help`, `help COMMAND` and `help exit-codes`."""
    parser = _top_parser(sorted(commands, key=_order))
    topic = topics[0] if len(topics) == 1 else None
    if topic == EXIT_CODES:
        from edge_vlm.console.exit_codes import as_text

        print(as_text())
    elif topic is not None and topic in commands:
        return run_command([topic, "--help"])
    elif topics:
        text = " ".join(topics)
        parser.error(f"no help about '{text}'{did_you_mean(text, [*commands, EXIT_CODES])}")
    else:
        parser.print_help()
    return 0


def _top_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    width = max((len(name) for name in names), default=0)
    listing = "\n".join(
        f"  {name:<{width}}  {COMMANDS[name][1] if name in COMMANDS else ''}".rstrip()
        for name in names
    )
    parser = Parser(
        prog="edge-vlm",
        usage="edge-vlm [-h] [--version] COMMAND ...",
        description="A video language model that follows a live feed on small devices.",
        epilog=f"commands:\n{listing}\n\n`edge-vlm COMMAND --help` shows a command's options, "
        f"`edge-vlm {HELP} {EXIT_CODES}`\nwhat each exit code means.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edge-vlm {edge_vlm.__version__}")
    return parser


def _order(name: str) -> tuple[int, str]:
    """Commands in the order of `COMMANDS`; a stranger's come last by name."""
    names = list(COMMANDS)
    return (names.index(name) if name in names else len(names), name)


if __name__ == "__main__":
    sys.exit(main())
