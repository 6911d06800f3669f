"""Wrong arguments: one line that says what is wrong, what was probably meant and where help is.

Plain argparse prints all of a command's usage first, twenty lines above the one that matters.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

USAGE_EXIT_CODE = 2
MOST_THREADS = 256
"""Each engine has as many, which wait for work by spinning: thousands stop a machine."""
_CHOICES = re.compile(
    r"invalid choice: '?([^' ]+)'? \(choose from (.+)\)|cannot be '(.+)', only one of (.+)"
)
_LIKE_NUMBER = re.compile(r"[-+.,:/\s]*\d[-+.,:/\s\d]*(\w|%|sec|min)?\s*")
_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")


class Parser(argparse.ArgumentParser):
    """As argparse's, of which its sub-commands' are too."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr."""
        if found := _CHOICES.search(message):
            given, choices = found[1] or found[3], found[2] or found[4]
            message += did_you_mean(given, re.findall(r"[^\s,']+", choices))
        self.exit(USAGE_EXIT_CODE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args is not None:
            self._refuse_unknown(args)
        parsed, left = super().parse_known_args(args, namespace)
        if left:  # here, because the command above does not know this one's options
            extra = next((text for text in left if text != "--"), left[0])
            known = {name for action in self._actions for name in action.option_strings}
            hint = ""
            if any(action.dest == "question" for action in self._actions):
                hint = ", a question of several words wants quotes"
            elif "--bundle" in known and os.path.isdir(extra):
                hint = f", did you mean --bundle {extra}?"
            elif "--model" in known:
                hint = f", did you mean --model {extra}?"
            self.error(f"one argument too many: {extra!r}{hint}")
        return parsed, left

    def _refuse_unknown(self, args: Sequence[str]) -> None:
        """Before argparse, which of a misspelt option says that the right one is missing."""
        known = {name for action in self._actions for name in action.option_strings}
        for text in args:
            if text == "--" or text in self._sub_commands():
                return  # positional from here on, or the sub-command's own
            if len(text) < 2 or text[0] != "-" or " " in text or _NUMBER.match(text):
                continue
            name = text.partition("=")[0]
            is_short = not name.startswith("--")
            if any(option.startswith(name) for option in known):
                continue  # argparse takes an abbreviation too, or says that it is ambiguous
            if is_short and name[:2] in known:
                continue  # -oFOLDER
            self.error(f"no such option: {name}{did_you_mean(name, known)}")

    def _sub_commands(self) -> Iterable[str]:
        return [
            name
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for name in action.choices
        ]


def thread_count(text: str) -> int:
    """`--threads`: 1 to MOST_THREADS. Raises ArgumentTypeError."""
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be 1 to {MOST_THREADS}, got {text}")
    return int(text)


def is_like_a_number(text: str) -> bool:
    """Whether it was meant as one, or as two, though it may be none: `2,5`, `1:30`, `0.8/0,5`."""
    return _LIKE_NUMBER.fullmatch(text) is not None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ ", did you mean ...?" of the closest, or nothing."""
    # Dashes, which all options share, would make any two short ones alike.
    names = {name.lstrip("-"): name for name in sorted(known)}
    near = difflib.get_close_matches(given.lstrip("-"), names, n=1)
    return f", did you mean {names[near[0]]}?" if near else ""
