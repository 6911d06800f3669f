"""Options of commands: command line, else environment, else TOML file, else default.

One file serves every command that opens a bundle: `watch` and `ask` take what concerns the server
they start, and know the rest of `serve`'s keys. Light to import.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm_runtime.cli.common.arguments import PREFIX, Groups, Option, flat, places
from edge_vlm_runtime.cli.common.options import URL_VARIABLE
from edge_vlm_runtime.server.access.auth import VARIABLE as KEY_VARIABLE

FILE_VARIABLE = "EDGE_VLM_CONFIG"
TABLES = ("alert", "camera", "sink")
"""Keys of a file that are lists of tables, `[[camera]]`, and no options: `serve` reads them."""
SERVICE_VARIABLE = re.compile(PREFIX + r"(\w+_)?(SERVICE_HOST|(SERVICE_)?PORT(_\w+)?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""What Kubernetes sets in every container for each Service of its namespace."""


@dataclass(frozen=True)
class Setting:
    value: Any
    origin: str
    """"command line", the variable, the file, or "default"."""


def configured(
    command: Command,
    options: Callable[[], Groups],
    *,
    file_of: Callable[[], Groups] | None = None,
    is_printed: bool = False,
) -> Command:
    """`command` with more options, which variables and a file may set too.

    `file_of` gives the options that variables and a file may hold, where they are more than these.
    With `is_printed` the command gets --print-config.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        command.add_arguments(parser)
        for option, place in places(parser, options()):
            # What the command line does not name is not in the namespace.
            option.add_to(place, default=argparse.SUPPRESS, is_checked=False)
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help=f"TOML file with options (default: the variable {FILE_VARIABLE}, or none)",
        )
        if is_printed:
            parser.add_argument(
                "--print-config",
                action="store_true",
                help="print every option and where it comes from, as such a file, and end",
            )

    def run(args: argparse.Namespace) -> int:
        own = flat(options())
        settings, warnings = resolve(own, args, os.environ, file_of and (lambda: flat(file_of())))
        for warning in warnings:
            print(f"edge-vlm: {warning}", file=sys.stderr)
        for key, setting in settings.items():
            setattr(args, key, setting.value)
        if is_printed and args.print_config:
            print(as_toml(own, settings, has_key=bool(os.environ.get(KEY_VARIABLE))), end="")
            file, tables = read_tables(args, os.environ)
            for key, listed in tables.items():
                print(f"# [[{key}]]: {len(listed)} in {file}; may hold secrets: copy them yourself")
            return 0
        return command.run(args)

    return dataclasses.replace(command, add_arguments=add_arguments, run=run)


def resolve(
    options: Iterable[Option],
    args: argparse.Namespace,
    environment: Mapping[str, str],
    file_of: Callable[[], Iterable[Option]] | None = None,
) -> tuple[dict[str, Setting], list[str]]:
    """What each option is and why, and warnings about variables.

    Raises ConfigError for an unknown key of the file or a value that is wrong, MissingExtraError
    without a reader of TOML (Python 3.10).
    """
    own = {option.key: option for option in options}
    file = _file(args, environment)
    table = {} if file is None else read_toml(file)
    for key in TABLES:
        table.pop(key, None)
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in (FILE_VARIABLE, KEY_VARIABLE, URL_VARIABLE)
    }
    known = set(own)
    if file_of is not None and not known.issuperset(
        [*table, *(name.removeprefix(PREFIX).lower() for name in variables)]
    ):
        known |= {option.key for option in file_of()}
    injected = {
        name
        for name, value in variables.items()
        if SERVICE_VARIABLE.fullmatch(name)
        and (name.removeprefix(PREFIX).lower() not in known or SERVICE_ADDRESS.match(value))
    }
    for key in table:
        if key not in known:
            near = _near(key, {*known, *TABLES})
            hint = f"did you mean {near}? " if near else ""
            raise ConfigError(
                f"unknown key {key!r}",
                where=file,
                remedy=f"{hint}valid keys: {', '.join(sorted({*known, *TABLES}))}",
            )
    settings = {}
    for key, option in own.items():
        value, origin = option.default, "default"
        try:
            if hasattr(args, key):
                value, origin = getattr(args, key), "command line"
            elif option.variable in variables.keys() - injected:
                origin = option.variable
                value = option.of_text(variables[origin])
            elif file is not None and key in table:
                origin = str(file)
                value = option.of_toml(table[key], file.absolute().parent)
            if origin != "default":
                option.check(value)
        except ValueError as error:
            raise ConfigError(
                f"{key} {error}", where=origin, remedy=f"such as {option.example}"
            ) from error
        settings[key] = Setting(value, origin)
    return settings, _warnings(variables, known, injected)


def _file(args: argparse.Namespace, environment: Mapping[str, str]) -> Path | None:
    named = environment.get(FILE_VARIABLE)
    file: Path | None = args.config
    return Path(named) if file is None and named else file


def read_tables(
    args: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[Path | None, dict[str, Any]]:
    """The file and what it holds for the keys TABLES. Raises as `read_toml`."""
    file = _file(args, environment)
    table = {} if file is None else read_toml(file)
    return file, {key: table[key] for key in TABLES if key in table}


def _warnings(variables: Mapping[str, str], known: set[str], injected: set[str]) -> list[str]:
    keys = {PREFIX + key.upper() for key in known}
    lines = []
    for name in sorted(variables.keys() - keys - injected):
        near = _near(name.removeprefix(PREFIX).lower(), known)
        hint = f"; did you mean {PREFIX}{near.upper()}?" if near else ""
        lines.append(f"the variable {name} is no option and ignored{hint}")
    if injected:
        shown = sorted(f"{name}={variables[name]}" if name in keys else name for name in injected)
        lines.append(
            f"ignored: {', '.join(shown)}: this looks like what Kubernetes injects for a Service "
            "called edge-vlm; rename the Service or set enableServiceLinks: false"
        )
    return lines


def _near(key: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1)), "")


def read_toml(file: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file, MissingExtraError."""
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("tomli", "serve") from error
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=file) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"this is not TOML: {error}", where=file) from error


def as_toml(options: Iterable[Option], settings: Mapping[str, Setting], *, has_key: bool) -> str:
    """A file that gives these settings again, each line with its origin, without secrets.

    `has_key`: a key is set by the environment.
    """
    lines = []
    for option in options:
        key, value = option.key, settings[option.key].value
        origin = " ".join(settings[option.key].origin.split())
        if value is None or value == []:
            lines.append(f"# {key} is not set")
        elif option.about.is_secret:
            addresses = [value] if isinstance(value, str) else value
            shown = [_without_secrets(address) for address in addresses]
            lines.append(f"# {key} = {_toml(shown)}  # {origin}; may hold a secret: set it again")
        else:
            lines.append(f"{key} = {_toml(value)}  # {origin}")
    lines.append(f"# {KEY_VARIABLE} is {'set, not printed' if has_key else 'not set'}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value.absolute())
    return json.dumps(value, ensure_ascii=False)


def _without_secrets(address: str) -> str:
    """Scheme, host and port. The rest of a webhook's address may be what lets one post there."""
    try:
        parts = urlsplit(address)
        port = "" if parts.port is None else f":{parts.port}"
        return f"{parts.scheme}://{parts.hostname or '?'}{port}/..."
    except ValueError:
        return "..."
