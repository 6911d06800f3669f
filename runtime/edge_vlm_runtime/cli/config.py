"""A server's options: command line, else environment, else TOML file, else default.

A key is the option's long name with underscores: `--max-sessions` is `max_sessions` in the file and
EDGE_VLM_MAX_SESSIONS in the environment. One file serves every command that opens a bundle: `watch`
and `ask` take what concerns the server they start, and know the rest of `serve`'s keys. Light to
import.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm_runtime.server.auth import VARIABLE as KEY_VARIABLE

PREFIX = "EDGE_VLM_"
FILE_VARIABLE = "EDGE_VLM_CONFIG"
NOT_OPTIONS = ("help", "config", "print_config")
SECRET_KEYS = ("webhook", "mqtt")
"""Addresses that may hold a password or a token."""
WORDS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}

AddArguments = Callable[[argparse.ArgumentParser], None]


class _NotGiven:
    """Stands for an option that the command line does not name; `--help` shows its default."""

    def __init__(self, default: object) -> None:
        self._default = default

    def __str__(self) -> str:
        return str(self._default)


@dataclass(frozen=True)
class Option:
    """One option that a file or variable may set."""

    key: str
    action: argparse.Action
    default: Any

    @property
    def kind(self) -> str:
        if self.action.nargs == 0:
            return "true or false"
        if isinstance(self.action.default, list) or isinstance(self.default, list):
            return "a list of texts"
        return "a text" if self.action.type in (None, Path) else "a number"

    @property
    def example(self) -> str:
        examples = {
            "true or false": "true",
            "a list of texts": '["TEXT"]',
            "a text": '"TEXT"',
            "a number": str(self.default or 1),
        }
        return f"{self.key} = {examples[self.kind]}"

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()


@dataclass(frozen=True)
class Setting:
    value: Any
    origin: str
    """"command line", the variable, the file, or "default"."""


def configured(
    command: Command,
    *,
    keys: Iterable[str] | None = None,
    file_of: AddArguments | None = None,
    unset: Callable[[], Mapping[str, Any]] | None = None,
) -> Command:
    """`command`, with the options named by `keys` (None: all) set by variables and a file too.

    `file_of` adds the options that a file may hold, where they are more than the command's own.
    With `unset`, which gives the values of options that are None, the command gets --print-config.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        command.add_arguments(parser)
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help=f"TOML file with options (default: the variable {FILE_VARIABLE}, or none)",
        )
        if unset is not None:
            parser.add_argument(
                "--print-config",
                action="store_true",
                help="print every option and where it comes from, as such a file, and end",
            )
        own = _options(parser)
        chosen = own if keys is None else {key: own[key] for key in keys}
        known = set(own if file_of is None else _options_of(file_of))
        for option in chosen.values():
            # An appending option copies its default and appends: None is its "not given".
            appends = isinstance(option.default, list)
            option.action.default = None if appends else _NotGiven(option.default)
        parser.set_defaults(_options=chosen, _known_keys=known | chosen.keys())

    def run(args: argparse.Namespace) -> int:
        settings = resolve(args, os.environ)
        for key, setting in settings.items():
            setattr(args, args._options[key].action.dest, setting.value)
        if unset is not None and args.print_config:
            print(as_toml(settings, unset(), has_key=bool(os.environ.get(KEY_VARIABLE))), end="")
            return 0
        return command.run(args)

    return dataclasses.replace(command, add_arguments=add_arguments, run=run)


def _options(parser: argparse.ArgumentParser) -> dict[str, Option]:
    found = {}
    for action in parser._actions:  # argparse has no public list of them
        long = next((name for name in action.option_strings if name.startswith("--")), None)
        key = None if long is None else long.removeprefix("--").replace("-", "_")
        if key is not None and key not in NOT_OPTIONS:
            found[key] = Option(key, action, action.default)
    return found


def _options_of(add_arguments: AddArguments) -> dict[str, Option]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _options(parser)


def resolve(args: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Setting]:
    """What each option is and why. Raises ConfigError for an unknown key or a value that is wrong,
    MissingExtraError without a reader of TOML (Python 3.10)."""
    options: Mapping[str, Option] = args._options
    known: set[str] = args._known_keys
    file = args.config
    if file is None and environment.get(FILE_VARIABLE):
        file = Path(environment[FILE_VARIABLE])
    table = {} if file is None else read_toml(file)
    for key in table:
        if key not in known:
            raise _unknown(key, known, file, lambda name: name)
    variables = {PREFIX + key.upper() for key in known}
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable not in variables | {
            FILE_VARIABLE,
            KEY_VARIABLE,
        }:
            raise _unknown(variable, known, "environment", lambda name: PREFIX + name.upper())
    settings = {}
    for key, option in options.items():
        given = getattr(args, option.action.dest)
        if given is not None and not isinstance(given, _NotGiven):
            settings[key] = Setting(given, "command line")
        elif option.variable in environment:
            value = _of_text(option, environment[option.variable])
            settings[key] = Setting(value, option.variable)
        elif key in table:
            settings[key] = Setting(_of_toml(option, table[key], file), str(file))
        else:
            settings[key] = Setting(option.default, "default")
    return settings


def read_toml(file: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file, MissingExtraError."""
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("tomli", "ort") from error
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=file) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"this is not TOML: {error}", where=file) from error


def _unknown(
    name: str, known: Iterable[str], where: object, spell: Callable[[str], str]
) -> ConfigError:
    valid = sorted(map(spell, known))
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(
        f"unknown key {name!r}", where=where, remedy=f"{hint}valid keys: {', '.join(valid)}"
    )


def _of_toml(option: Option, given: Any, file: Path) -> Any:
    matches = {
        "true or false": isinstance(given, bool),
        "a list of texts": isinstance(given, list) and all(isinstance(x, str) for x in given),
        "a text": isinstance(given, str),
        "a number": isinstance(given, (int, float)) and not isinstance(given, bool),
    }
    if not matches[option.kind]:
        raise ConfigError(
            f"{option.key} must be {option.kind}, got {given!r}",
            where=file,
            remedy=f"write {option.example}",
        )
    if option.kind in ("true or false", "a list of texts"):
        return given
    value = _converted(option, str(given), file)
    if isinstance(value, Path):  # what a file names lies beside it, wherever we were started
        value = file.absolute().parent / value.expanduser()
    return value


def _of_text(option: Option, text: str) -> Any:
    """The value of a variable."""
    if option.kind == "a list of texts":
        return text.split()
    if option.kind != "true or false":
        return _converted(option, text, option.variable)
    if text.lower() not in WORDS:
        raise ConfigError(
            f"{option.key} must be true or false, got {text!r}",
            where=option.variable,
            remedy=f"one of {', '.join(WORDS)}",
        )
    return WORDS[text.lower()]


def _converted(option: Option, text: str, where: object) -> Any:
    """By the option's own type and choices."""
    convert: Any = option.action.type or str
    try:
        value = convert(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        of_ours = isinstance(error, argparse.ArgumentTypeError)
        problem = str(error) if of_ours else f"must be {option.kind}, got {text!r}"
        raise ConfigError(
            f"{option.key} {problem}", where=where, remedy=f"such as {option.example}"
        ) from error
    choices = option.action.choices
    if choices is not None and value not in choices:
        raise ConfigError(
            f"{option.key} cannot be {text!r}", where=where, remedy=f"one of {', '.join(choices)}"
        )
    return value


def as_toml(settings: Mapping[str, Setting], unset: Mapping[str, Any], *, has_key: bool) -> str:
    """A file that gives these settings again, each line with its origin, without secrets.

    `unset`: what options mean that are None; `has_key`: a key is set by the environment.
    """
    lines = []
    for key, setting in settings.items():
        value = setting.value if setting.value is not None else unset.get(key)
        origin = " ".join(setting.origin.split())
        if value is None or value == []:
            lines.append(f"# {key} is not set")
        elif key in SECRET_KEYS:
            shown = [_without_secrets(address) for address in value]
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
