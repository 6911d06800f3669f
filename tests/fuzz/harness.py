"""Files of strangers: a valid file is changed, and its reader reads it or says what is wrong.

A `Format` is a file that this project reads and how. `changed` makes another file of it from a
list of `Edit`s, which hypothesis draws (`test_files.py`) or atheris (`python -m tests.fuzz NAME`):
in its structure, where the format has one, and in its bytes. `read_or_refused` is what is asked of
readers.
"""

from __future__ import annotations

import copy
import json
import math
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_vlm.errors import EdgeVlmError
from edge_vlm.json_text import MALFORMED

FOUND = Path(__file__).parents[1] / "data" / "fuzz"
MOST_BYTES = 512 << 20
"""More than any reader of such small files needs beyond what the process holds already."""
MOST_SECONDS = 60
MOST_WORDS = 8000
"""Characters of an error."""
DEEP: Any = 0
for _ in range(900):
    DEEP = [DEEP]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 0.5, -0.5, 10**6, 10**9, 1 << 31, 1 << 60, 1 << 63, 1 << 70),
    *(1e308, -1e308, 5e-324, math.nan, math.inf, 10**400, -(10**30)),
    *("", "x", "0", "1e999", "\x1b]0;owned\x07", "a\nb", "\x00", "\ud800", "\u202e", "../../x"),
    *("/dev/zero", "a" * 5000, "(a|a)*b", "${x}", "é" * 300, "*"),
    *([], {}, [[]], {"a": 1}, [None], [1, 2], [0.5] * 4, ["p+s"] * 3, DEEP),
]
LENGTHS = [
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x00\x00\x00\x00\x80",
]
KINDS = ("set", "set", "set", "drop", "again", "bytes", "insert", "cut", "number")


class Edit(NamedTuple):
    """One change. Which of the kinds, places and values it means is counted modulo how many there
    are, so that any numbers are an edit."""

    kind: int
    place: int
    value: int
    raw: bytes


EDITS = st.lists(
    st.builds(
        Edit,
        st.integers(0, len(KINDS) - 1),
        st.integers(0, 65_535),
        st.integers(0, len(VALUES) - 1),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=3,
)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass(frozen=True)
class Format:
    """A file that this project reads."""

    name: str
    file: str
    """What is changed, in the folder that `make` fills."""
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    """Of the folder. Has to end, in little memory, without an error or with one of the tree."""
    unpack: Callable[[bytes], Any] | None = json.loads
    """The file as lists and objects; None for one that has only bytes."""
    pack: Callable[[Any], bytes] = as_json
    """Inverse of `unpack`, and makes checksums and lengths fit again."""
    examples: int = 60


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands, the whole left out."""
    if value is DEEP:
        return [path]
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [p for key in value for p in places(value[key], (*path, key))]
    if isinstance(value, list):
        return found + [p for i, each in enumerate(value) for p in places(each, (*path, i))]
    return found


def changed(form: Format, valid: bytes, edits: Sequence[Edit]) -> bytes:
    """Another file: first its structure is changed, then its bytes."""
    data = valid
    chosen = [(KINDS[edit.kind % len(KINDS)], edit) for edit in edits]
    if form.unpack is not None and (inside := [(k, e) for k, e in chosen if k in KINDS[:5]]):
        value = copy.deepcopy(form.unpack(valid))
        for kind, edit in inside:
            value = _changed_inside(value, kind, edit)
        try:
            data = form.pack(value)
        except MALFORMED:  # the format cannot say it
            data = valid
    for kind, edit in chosen:
        data = _changed_bytes(data, kind, edit)
    return data


def _changed_inside(value: Any, kind: str, edit: Edit) -> Any:
    known = places(value)
    if not known:
        return _value(edit)
    *path, last = known[edit.place % len(known)]
    owner = value
    for key in path:
        owner = owner[key]
    if kind == "set":
        owner[last] = _value(edit)
    elif kind == "drop":
        del owner[last]
    elif isinstance(owner, list):
        owner.insert(last, owner[last])
    else:
        owner[f"{last}x"] = owner[last]
    return value


def _value(edit: Edit) -> Any:
    value = VALUES[edit.value % len(VALUES)]
    return value if value is DEEP else copy.deepcopy(value)


def _changed_bytes(data: bytes, kind: str, edit: Edit) -> bytes:
    at = edit.place % (len(data) + 1)
    if kind == "bytes":
        return data[:at] + edit.raw + data[at + len(edit.raw) :]
    if kind == "insert":
        return data[:at] + edit.raw * (edit.value + 1) + data[at:]
    if kind == "cut":
        return data[:at]
    if kind == "number":
        number = LENGTHS[edit.value % len(LENGTHS)]
        return data[:at] + number + data[at + len(number) :]
    return data


def read_or_refused(call: Callable[[], object]) -> EdgeVlmError | None:
    """The error, if there is one. Anything else than a whole one of the tree goes on."""
    try:
        with bounded():
            call()
    except EdgeVlmError as error:
        line = str(error)
        assert line.isprintable(), "an error shows what a terminal would obey"
        assert len(line) <= MOST_WORDS, f"an error of {len(line)} characters: {line[:200]}"
        return error
    return None


@contextmanager
def bounded(most_bytes: int = MOST_BYTES, most_seconds: int = MOST_SECONDS) -> Iterator[None]:
    """In here the process gets no more memory than that, touched or not, and an end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, most_seconds)
    resource.setrlimit(resource.RLIMIT_AS, (held + most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _out_of_time(number: int, frame: object) -> None:
    raise AssertionError(f"no end after {MOST_SECONDS} s")


def found_before(form: Format) -> list[Path]:
    """Files that a reader once did not stand."""
    folder = FOUND / form.name
    return sorted(folder.iterdir()) if folder.is_dir() else []


def check(form: Format, folder: Path) -> None:
    """The format's reader, on its own file and on as many changed ones as the format says."""
    form.make(folder)
    file = folder / form.file
    valid = file.read_bytes()
    form.read(folder)

    @settings(max_examples=form.examples, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def once(edits: list[Edit]) -> None:
        file.write_bytes(changed(form, valid, edits))
        read_or_refused(lambda: form.read(folder))

    once()
