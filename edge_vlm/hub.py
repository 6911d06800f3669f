"""`edge-vlm pull`: published weights from a model hub, by huggingface_hub.

The revision is looked up first and everything is fetched of that one commit, which is said and kept
beside the files; so a name that moves on meanwhile mixes nothing. What was fetched is not fetched
again, and a file that broke off goes on where it did. Weights are compared with the digests of the
hub. Code that lies beside them is left there: nothing of ours runs it.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.console.paths import output_folder
from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.errors.export import (
    HubError,
    HubFileDamaged,
    HubNotFound,
    HubRefused,
    HubUnreachable,
    NoSpaceLeft,
)
from edge_vlm.json_text import parse_json

if TYPE_CHECKING:
    from types import ModuleType

WEIGHTS = "*.safetensors"
WANTED = (WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.yaml", "LICENSE*", "README.md")
RECORD = "pulled.json"
"""In the folder: what it is."""
PART = ".part"
"""Behind the name of a file that is under way. (The library's own way to a file begins anew after
an end of the program.)"""
MARGIN_BYTES = 64 << 20
"""Left free on the disk."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository."""

    name: str
    size: int
    sha256: str | None
    """Of what is stored apart, as weights are."""
    blob: str | None
    """Git's digest of the rest."""


@dataclass(frozen=True)
class HubRevision:
    """One commit of a repository, and what is wanted of it."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def _library() -> ModuleType:
    try:
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils.logging
    except ImportError as error:
        raise MissingExtraError.for_library("huggingface_hub", "pull") from error
    return huggingface_hub


def look_up(repository: str, revision: str, endpoint: str | None = None) -> HubRevision:
    """Raises HubError and its leaves, MissingExtraError, ConfigError for what is no name."""
    hub = _library()
    with _told(repository, revision, endpoint):
        info = hub.HfApi(endpoint=endpoint).model_info(
            repository, revision=revision, files_metadata=True
        )
    wanted, left_out = [], []
    for each in info.siblings or ():
        if not _stays_inside(each.rfilename):
            raise HubError(
                f"the hub names a file outside of the folder: {each.rfilename}",
                where=f"{repository} at {info.sha}",
                remedy="do not take anything from there",
            )
        if any(fnmatch(each.rfilename, pattern) for pattern in WANTED):
            sha256 = each.lfs.sha256 if each.lfs is not None else None
            wanted.append(HubFile(each.rfilename, each.size or 0, sha256, each.blob_id))
        else:
            left_out.append(each.rfilename)
    if not any(fnmatch(file.name, WEIGHTS) for file in wanted):
        raise HubNotFound(
            f"{repository} has no weights in the format safetensors",
            where=info.sha,
            remedy="name a repository of a model that `edge-vlm inspect` reads",
        )
    wanted.sort(key=lambda file: file.size)  # what is wrong with a token shows at once
    return HubRevision(repository, info.sha, tuple(wanted), tuple(sorted(left_out)))


def _stays_inside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return ":" not in parts[0] and not {"", ".", ".."} & set(parts)


def fetch(
    found: HubRevision, folder: Path, endpoint: str | None = None, *, shows_bars: bool = False
) -> None:
    """Into the folder, which may hold a part of it. Raises HubError and its leaves, NoSpaceLeft,
    ConfigError if another model lies there."""
    hub = _library()
    _require_same(found, folder)
    _require_room(found, folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"repository": found.repository, "revision": found.commit}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    hub.utils.logging.set_verbosity_error()  # what it warns of is told by us
    if not shows_bars:
        hub.utils.disable_progress_bars()
    for number, file in enumerate(found.files, 1):
        print(f"[{number}/{len(found.files)}] {file.name}  {_size(file.size)}", flush=True)
        path = folder / file.name
        if not path.is_file():
            with _told(found.repository, found.commit, endpoint, folder):
                _transfer(hub, found, file, path, endpoint)
        _check(file, path)


def _transfer(
    hub: ModuleType, found: HubRevision, file: HubFile, path: Path, endpoint: str | None
) -> None:
    """The rest of a file, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    with part.open("ab") as stream:
        hub.file_download.http_get(
            hub.hf_hub_url(found.repository, file.name, revision=found.commit, endpoint=endpoint),
            stream,
            resume_size=stream.tell(),
            headers=hub.utils.build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
    part.replace(path)


def _require_same(found: HubRevision, folder: Path) -> None:
    try:
        record = parse_json((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                "the folder holds something else", where=folder, remedy="name a new one with -o"
            ) from None
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", where=folder / RECORD) from error
    wanted = {"repository": found.repository, "revision": found.commit}
    if not isinstance(record, dict):
        raise ConfigError("not the record of a pull", where=folder / RECORD)
    if record != wanted:
        raise ConfigError(
            f"the folder holds {record.get('repository')} at {record.get('revision')}, not "
            f"{found.repository} at {found.commit}",
            where=folder,
            remedy="name a new folder with -o, or the same revision with --revision",
        )


def _require_room(found: HubRevision, folder: Path) -> None:
    """Raises NoSpaceLeft before the first byte, where it can be known."""
    there = sum(
        _bytes_of(folder / f"{file.name}{end}") for file in found.files for end in ("", PART)
    )
    needed = max(0, found.num_bytes - there) + MARGIN_BYTES
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise NoSpaceLeft(
            f"{_size(needed)} are needed and {_size(free)} are free",
            where=place,
            remedy="name a folder on another disk with -o",
        )


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _check(file: HubFile, path: Path) -> None:
    """Raises HubFileDamaged; the file is gone then."""
    size, wanted = path.stat().st_size, file.sha256 or file.blob
    wrong = f"{size} bytes, not {file.size}"
    if size == file.size:
        git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        if wanted is None or _digest(path, hashlib.sha256() if file.sha256 else git) == wanted:
            return
        wrong = "another digest than the hub's"
    path.unlink()
    raise HubFileDamaged(
        f"what came has {wrong}", where=path, remedy="it was removed: pull again to fetch it anew"
    )


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as stream:
        while piece := stream.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _told(
    repository: str, revision: str, endpoint: str | None, folder: Path | None = None
) -> Iterator[None]:
    """The library's errors as ours, by type."""
    errors = _library().errors
    where = f"{repository} at {revision}"
    place = endpoint or "https://huggingface.co"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubRefused(
            "whoever wants these weights accepts their licence first",
            where=where,
            remedy=f"accept it at {place}/{repository}, then log in: hf auth login, or HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubNotFound("no such revision", where=where, remedy="name another") from error
    except errors.RepositoryNotFoundError as error:
        raise HubNotFound(
            "no such repository, or one that this account may not see",
            where=where,
            remedy="look at its name; for a private one: hf auth login, or HF_TOKEN",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"not a repository: {error}", remedy="write OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        if status in (401, 403):
            raise HubRefused(
                f"the hub says {status}", where=where, remedy="hf auth login, or HF_TOKEN"
            ) from error
        raise HubError(f"the hub says {status}", where=where, remedy="try again later") from error
    except (errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        raise _unreachable(where, place, error.__cause__ or error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceLeft(
                f"the disk takes no more: {error.strerror}",
                where=folder,
                remedy="make room and pull again: it goes on where it stopped",
            ) from error
        if error.errno is not None and error.filename is not None:
            raise HubError(f"cannot be written: {error.strerror}", where=error.filename) from error
        raise _unreachable(where, place, error) from error
    except errors.HTTPError as error:
        raise _unreachable(where, place, error) from error


def _unreachable(where: str, place: str, error: BaseException) -> HubUnreachable:
    return HubUnreachable(
        f"no connection to {place}: {error}",
        where=where,
        remedy="look at the network and pull again, it goes on where it stopped; or copy the "
        "folder from a machine that has it",
    )


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "repository", metavar="OWNER/NAME", help="a model on the hub, such as allenai/Molmo2-4B"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to (default: the model's name, here)",
    )
    parser.add_argument(
        "--revision",
        default="main",
        help="a commit, tag or branch (default: main; which commit that is, is said and kept)",
    )


def _pull(args: argparse.Namespace) -> int:
    endpoint = os.environ.get("HF_ENDPOINT") or None
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"HF_ENDPOINT is no address: {endpoint!r}", remedy="write https://HOST, or unset it"
        )
    if not args.revision:
        raise ConfigError("--revision is empty", remedy="name a commit, tag or branch")
    folder = output_folder(args.output or args.repository.rpartition("/")[2])
    found = look_up(args.repository, args.revision, endpoint)
    print(f"{found.repository} at {found.commit}: {len(found.files)} files, ", end="")
    print(f"{_size(found.num_bytes)}, into {folder}", flush=True)
    if found.left_out:
        shown = ", ".join(found.left_out[:5]) + (", ..." if len(found.left_out) > 5 else "")
        print(f"left out, none of it is needed: {shown}")
    fetch(found, folder, endpoint, shows_bars=sys.stderr.isatty())
    print(f"all there and checked. The same again: --revision {found.commit}")
    print(f"next: edge-vlm inspect {folder}")
    return 0


pull = Command(add_arguments=_arguments, run=_pull)
