"""Paths on a command line, looked at before the long work begins: `type=` of an argument.

What is wrong with one is a typed error rather than a usage error, so it has a code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from edge_vlm.errors import ConfigError, RecordingError, VideoNotFound


def output_file(text: str | Path) -> Path:
    """A file to be written into a folder that is there. Raises ConfigError."""
    path = Path(text)
    if path.is_dir():
        raise ConfigError("cannot be written: it is a folder", where=path)
    if path.exists() and not path.is_file():
        return path  # such as /dev/stdout
    if not path.absolute().parent.is_dir():
        raise ConfigError("cannot be written: no such folder", where=path.parent)
    _try_writing(path.absolute().parent, path)
    return path


def output_folder(text: str | Path) -> Path:
    """A folder to be written into, made with those above it if it is not there. Raises
    ConfigError."""
    path = Path(text)
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ConfigError("cannot be written: a file is in the way", where=there)
    _try_writing(there, path)
    return path


def output_file_in_folder(text: str | Path) -> Path:
    """A file whose folder is made if it is not there. Raises ConfigError."""
    path = Path(text)
    if path.is_dir():
        raise ConfigError("cannot be written: it is a folder", where=path)
    output_folder(path.parent)
    return path


def recording_file(text: str | Path) -> Path:
    """As `output_file_in_folder`. Raises RecordingError."""
    return _recorded(output_file_in_folder, text)


def recording_folder(text: str | Path) -> Path:
    """As `output_folder`. Raises RecordingError."""
    return _recorded(output_folder, text)


def _recorded(check: Callable[[str | Path], Path], text: str | Path) -> Path:
    try:
        return check(text)
    except ConfigError as error:
        raise RecordingError(error.what, where=error.where, remedy=error.remedy) from error


def input_footage(text: str | Path) -> Path:
    """A video or question set that is there. Raises VideoNotFound."""
    path = Path(text)
    if not path.exists():
        raise VideoNotFound("no such file or folder", where=path)
    return path


def _try_writing(folder: Path, path: Path) -> None:
    """By writing: what a file system allows is known to nobody else."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot be written: {reason}", where=path, remedy="name another place"
        ) from error
