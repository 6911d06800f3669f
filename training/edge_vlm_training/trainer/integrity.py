"""That a checkpoint of a run holds the bytes that were saved, by their CRC-32.

The file of each process says those of the files that it wrote, `run.json` those of the processes'
files and, as its last entry, that of its own text before it. Older checkpoints lack one or all of
these, and are read as they are.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import CheckpointError
from edge_vlm.json_text import parse_json

RUN = "run.json"
STEP = re.compile(r"step-(\d{8})")
"""Name of a finished checkpoint's folder."""
PIECE = 1 << 20
_CRC32, _OWN = "crc32", "own_crc32"
_LAST = f', "{_OWN}": '


def process_file(rank: int) -> str:
    """Name of what a process says of its data, its random numbers and the files it wrote."""
    return f"process-{rank:05}.json"


def before(path: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = [p.name for p in path.parent.glob("step-*") if STEP.fullmatch(p.name) and p != path]
    if any(name > path.name for name in others):
        return f"remove {path.name}: newer ones are in {path.parent}"
    if others:
        return f"remove {path.name} to resume from the one before in {path.parent}"
    return "it is the run's only one: start a new run"


def process_text(state: dict[str, Any], written: Iterable[Path]) -> str:
    """Of the file of a process that wrote these. Raises OSError."""
    return json.dumps({**state, _CRC32: {file.name: crc32_of(file) for file in written}})


def run_text(run: dict[str, Any], processes: list[int]) -> str:
    """Of `run.json`; `processes` are the checksums of the processes' files, by rank."""
    told = {process_file(rank): crc32 for rank, crc32 in enumerate(processes)}
    text = json.dumps({**run, "processes": len(processes), _CRC32: told})
    return f"{text[:-1]}{_LAST}{zlib.crc32(text.encode())}}}"


def read_run(path: Path) -> dict[str, Any]:
    """`run.json` of a checkpoint. Raises CheckpointError if it cannot be read or was changed."""
    file = path / RUN
    data = _read(file)
    run = _parsed(file, data)
    if run.keys() & {_CRC32, _OWN}:
        text = data.rpartition(_LAST.encode())[0] + b"}"
        if zlib.crc32(text) != run.get(_OWN):
            raise _changed(file)
    number = run.get("processes")
    if type(number) is not int or number < 1:
        raise CheckpointError(
            f"its {RUN} says processes = {number!r:.60}", where=path, remedy=before(path)
        )
    return run


def read_states(path: Path) -> list[dict[str, Any]]:
    """What each process wrote. Raises CheckpointError if a file is missing or was changed."""
    run = read_run(path)
    told = _told(path / RUN, run)
    states = []
    for rank in range(run["processes"]):
        file = path / process_file(rank)
        data = _read(file)
        if file.name in told and zlib.crc32(data) != told[file.name]:
            raise _changed(file)
        states.append(_parsed(file, data))
        _told(file, states[-1])
    return states


def require_intact(
    path: Path, states: Iterable[Mapping[str, Any]], only: str | None = None
) -> None:
    """That the files which these processes wrote, or `only` one, hold what they wrote.

    Raises CheckpointError.
    """
    for state in states:
        for name, crc32 in state.get(_CRC32, {}).items():
            if only not in (None, name):
                continue
            file = path / Path(name).name
            try:
                same = file.is_file() and crc32_of(file) == crc32
            except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
                raise _unreadable(file, error) from error
            if not same:
                raise _changed(file)


def crc32_of(path: Path) -> int:
    """Raises OSError."""
    crc32 = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc32 = zlib.crc32(piece, crc32)
    return crc32


def _told(file: Path, data: dict[str, Any]) -> dict[str, Any]:
    told = data.get(_CRC32, {})
    if not isinstance(told, dict):
        raise CheckpointError(f"its {_CRC32} is no object", where=file, remedy=before(file.parent))
    return told


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _parsed(file: Path, data: bytes) -> dict[str, Any]:
    try:
        found = parse_json(data)
    except ValueError as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise CheckpointError("it holds no object", where=file, remedy=before(file.parent))
    return found


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    what = f"the checkpoint cannot be read: {error}"
    return CheckpointError(what, where=file, remedy=before(file.parent))


def _changed(file: Path) -> CheckpointError:
    what = "the checkpoint cannot be read: not the bytes that were saved"
    return CheckpointError(what, where=file, remedy=before(file.parent))
