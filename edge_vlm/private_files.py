"""Files that hold pictures, words or secrets: for the user alone who runs this program.

0600 in folders of 0700, whatever the umask. A folder that was there before stays as it is, but that
others can look into it is said.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = 0o077
"""Rights of anybody but the owner."""


def make_folder(path: Path) -> str | None:
    """With those above it. What is to be said of one that was there: that others can look into it,
    and the remedy. Raises OSError."""
    if path.is_dir():
        return exposure(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    path.chmod(FOLDER_MODE)  # the umask may have taken the owner's rights
    return None


def exposure(path: Path) -> str | None:
    """What is to be said of a folder, or of a file of one's own, that others than its owner have
    rights to: a file of root's may be meant for its group. Raises OSError."""
    if os.name != "posix":
        return None
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    is_foreign = stat.S_ISREG(found.st_mode) and found.st_uid != os.geteuid()
    if is_foreign or not mode & OTHERS:
        return None
    wanted = FOLDER_MODE if path.is_dir() else FILE_MODE
    return f"{path}: other users have rights to it ({mode:04o}); chmod {wanted:o} takes them away"


def create(path: Path) -> BinaryIO:
    """A new file. Raises OSError, also when it is there already."""
    return _opened(path, os.O_EXCL)


def replace(path: Path, data: bytes) -> None:
    """Writes a file anew; one that was there loses others' rights. Raises OSError."""
    with _opened(path, os.O_TRUNC) as file:
        file.write(data)


def restrict(path: Path) -> bool:
    """Makes sure of a file, also one that was there; whether others had rights to it. Raises
    OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CLOEXEC, FILE_MODE)
    try:
        mode = os.fstat(descriptor).st_mode
        _own(descriptor)
    finally:
        os.close(descriptor)
    return os.name == "posix" and bool(stat.S_IMODE(mode) & OTHERS)


_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def _opened(path: Path, flag: int) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | flag | _CLOEXEC | _BINARY
    descriptor = os.open(path, flags, FILE_MODE)
    try:
        _own(descriptor)
        return os.fdopen(descriptor, "wb")
    except BaseException:
        os.close(descriptor)
        raise


def _own(descriptor: int) -> None:
    """The umask may have taken too much, and a file that was there may give too much. What is no
    file, as /dev/stdout, is left alone."""
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.fchmod(descriptor, FILE_MODE)
