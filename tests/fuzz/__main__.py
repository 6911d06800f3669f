"""Looks for files that a reader neither reads nor refuses, for as long as it is let.

    python -m tests.fuzz tokenizer               edits drawn at random, for --seconds
    python -m tests.fuzz tokenizer --atheris -max_total_time=300
                                                 by atheris, which follows what code they reach

Each kind of failure is told once, and the edits and the file that led to it are kept in --found.
What stands behind --atheris is libFuzzer's.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.harness import KINDS, VALUES, Edit, Format, changed, read_or_refused

ROOMS = ["edge_vlm", "edge_vlm_export", "edge_vlm_runtime", "edge_vlm_training"]


class Hunt:
    """One format, its valid file, and what was found so far."""

    def __init__(self, form: Format, folder: Path, found: Path) -> None:
        self._form, self._folder, self._found = form, folder, found
        form.make(folder)
        self._file = folder / form.file
        self._valid = self._file.read_bytes()
        form.read(folder)
        self.seen: Counter[str] = Counter()

    def attempt(self, edits: list[Edit]) -> None:
        data = changed(self._form, self._valid, edits)
        self._file.write_bytes(data)
        try:
            error = read_or_refused(lambda: self._form.read(self._folder))
            self.seen["read" if error is None else error.code] += 1
        except (Exception, AssertionError) as error:  # noqa: BLE001
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            self.seen[kind] += 1
            if self.seen[kind] == 1:
                self._found.mkdir(parents=True, exist_ok=True)
                kept = self._found / f"{self._form.name}-{len(self.seen)}{self._file.suffix}"
                kept.write_bytes(data)
                print(f"{kept}: {kind}: {str(error)[:300]!r} after {edits}", flush=True)
                traceback.print_tb(error.__traceback__)


def edits_of(data: bytes) -> list[Edit]:
    """What a fuzzer's bytes mean: eight for each edit."""
    return [
        Edit(data[i], int.from_bytes(data[i + 1 : i + 3], "big"), data[i + 3], data[i + 4 : i + 8])
        for i in range(0, len(data) - 7, 8)
    ]


def drawn(dice: random.Random) -> list[Edit]:
    return [
        Edit(
            dice.randrange(len(KINDS)),
            dice.randrange(1 << 16),
            dice.randrange(len(VALUES)),
            dice.randbytes(dice.randint(1, 6)),
        )
        for _ in range(dice.randint(1, 3))
    ]


def formats(are_followed: bool) -> tuple[Format, ...]:
    if are_followed:
        import atheris  # type: ignore[import-untyped, unused-ignore]  # a tool of its own

        with atheris.instrument_imports(include=ROOMS):  # all of torch would take minutes
            return formats(False)
    from tests.fuzz import files, weights

    return (*files.FORMATS, *weights.FORMATS)


def main(arguments: list[str]) -> None:
    forms = {form.name: form for form in formats("--atheris" in arguments)}
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*forms, "all"], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each format, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("found"))
    parser.add_argument("--atheris", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    for form in forms.values() if "all" in args.names else [forms[name] for name in args.names]:
        with tempfile.TemporaryDirectory() as folder:
            if args.atheris is not None:
                follow(form, Path(folder), args.found, args.atheris)
                continue
            hunt, dice = Hunt(form, Path(folder), args.found), random.Random(args.seed)
            end, count = time.monotonic() + args.seconds, 0
            while time.monotonic() < end:
                hunt.attempt(drawn(dice))
                count += 1
            print(f"{form.name}: {count} files: {dict(hunt.seen.most_common())}", flush=True)


def follow(form: Format, folder: Path, found: Path, options: list[str]) -> None:
    import atheris

    hunt: Any = Hunt(form, folder, found)

    def one(data: bytes) -> None:
        hunt.attempt(edits_of(data))

    atheris.Setup([form.name, "-max_len=40", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
