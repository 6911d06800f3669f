"""The `edge-vlm` command.

Subcommands are entry points of the group `edge_vlm.commands`; each stage contributes its own. A
subcommand's module is imported only when it is called, so `edge-vlm --help` needs nothing but the
standard library. The value of an entry point is a `Command`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import edge_vlm
from edge_vlm.errors import EdgeVlmError, MissingExtraError

ENTRY_POINT_GROUP = "edge_vlm.commands"

# One line per command for `edge-vlm --help`; kept here because printing it imports no command.
SUMMARIES = {
    "demo": "stream a rendered clip through the demo model and check its answers",
    "serve": "serve a bundle over a websocket, with a browser page",
    "watch": "stream a file, webcam or RTSP camera to a server and ask questions",
    "ask": "ask one question about one video file",
    "train": "train a model on the rendered world",
    "eval": "measure a checkpoint or bundle on held-out clips",
    "export": "turn a checkpoint into a bundle of ONNX graphs",
    "verify": "compare a bundle's graphs with torch",
}

# Import name -> distribution name, where they differ.
DISTRIBUTIONS = {"PIL": "pillow"}

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand.

    `help` is shown by `edge-vlm NAME --help`; `run` returns the exit code and may raise any
    `EdgeVlmError`. Modules that define commands import heavy libraries inside `run`.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a typed error becomes one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except EdgeVlmError as error:
        print(f"edge-vlm: {error.code}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # Whoever read our output is gone (`edge-vlm ... | head`): keep the last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    commands = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if not arguments or arguments[0].startswith("-"):
        parser = _top_parser(sorted(commands, key=_order))
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f", did you mean '{near[0]}'?" if near else ""
        _top_parser(sorted(commands, key=_order)).error(f"unknown command '{name}'{hint}")
    command = _load(commands[name])
    parser = argparse.ArgumentParser(prog=f"edge-vlm {name}", description=command.help)
    command.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        return command.run(args)
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error


def _load(point: metadata.EntryPoint) -> Command:
    try:
        command = point.load()
    except ModuleNotFoundError as error:
        raise _missing_extra(error) from error
    if not isinstance(command, Command):
        raise TypeError(f"entry point {point.value} is not an edge_vlm.cli.Command")
    return command


def _missing_extra(error: ModuleNotFoundError) -> Exception:
    """The typed error for a library that one of our extras brings; anything else is a bug."""
    library = (error.name or "").partition(".")[0]
    distribution = DISTRIBUTIONS.get(library, library).lower().replace("_", "-")
    for requirement in metadata.requires("edge-vlm") or ():
        name, _, marker = requirement.partition(";")
        if marker and name.lower().startswith(distribution) and distribution:
            rest = name[len(distribution) :].lstrip()
            if not rest or rest[0] in "<>=!~[ ":
                extra = marker.partition("==")[2].strip(" '\"")
                return MissingExtraError.for_library(library, extra)
    return error


def _top_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    width = max((len(name) for name in names), default=0)
    listing = "\n".join(f"  {name:<{width}}  {SUMMARIES.get(name, '')}".rstrip() for name in names)
    parser = argparse.ArgumentParser(
        prog="edge-vlm",
        usage="edge-vlm [-h] [--version] COMMAND ...",
        description="A video language model that follows a live feed on small devices.",
        epilog=f"commands:\n{listing}\n\n`edge-vlm COMMAND --help` shows a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edge-vlm {edge_vlm.__version__}")
    return parser


def _order(name: str) -> tuple[int, str]:
    """Commands in the order of `SUMMARIES`; a stranger's come last by name."""
    names = list(SUMMARIES)
    return (names.index(name) if name in names else len(names), name)


if __name__ == "__main__":
    sys.exit(main())
