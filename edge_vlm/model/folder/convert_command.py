"""`edge-vlm convert`: a folder of weights of any known kind into ours or the model hub's."""

from __future__ import annotations

import argparse
import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.console.paths import output_folder
from edge_vlm.errors import CheckpointError
from edge_vlm.errors.export import NoSpaceLeft

if TYPE_CHECKING:
    import torch

    from edge_vlm.model.published.folder import ModelFolder

OURS, HUB = "ours", "hub"


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Writes the weights of `source` into the new or empty folder `target`, a tensor at a time.

    The folder appears by one rename, when all of it is written. `to` is OURS or HUB, `dtype` what
    weights are stored in (by default as they are). Returns what to know about the result, one line
    each. Raises as `open_folder` and its `require_tokenizer`, before anything is written;
    CheckpointError if `target` is in the way; NoSpaceLeft.
    """
    from edge_vlm.model.published.folder import open_folder
    from edge_vlm.model.published.hub import hub_notes

    found = open_folder(source, tokenizer)
    words = found.require_tokenizer()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError("is in the way", where=target, remedy="give a new or empty folder")
    dtype = dtype or _stored_type(found)
    _require_room(found, target, dtype)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.absolute().parent))
    try:
        _write(found, words, partial, to, dtype)
        os.chmod(partial, 0o755)  # mkdtemp's 0700 would keep others out
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoSpaceLeft("the disk is full", where=target, remedy="make room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [*found.notes, *(hub_notes(found.config) if to == HUB else [])]


def _write(found: ModelFolder, words: Path, target: Path, to: str, dtype: torch.dtype) -> None:
    from edge_vlm.model.checkpoint import save_checkpoint
    from edge_vlm.model.published.hub import config_of, write_hub

    if to == OURS:
        save_checkpoint(target, found.config, found.weights, words, found.usage, dtype)
        return
    origin = found.origin
    from_hub = origin.naming.name in ("hub", "transformers")
    write_hub(
        target,
        *(found.config, found.weights, dtype),
        usage=found.usage,
        config=config_of(origin.path, found.config) if from_hub else None,
        companions=origin.path if from_hub else words.parent,
        tokenizer=words,
    )


def _stored_type(found: ModelFolder) -> torch.dtype:
    """The one they all have, or else the widest."""
    import torch

    from edge_vlm.model.published.mapping import FLOATS

    names = {tensor.dtype for tensor in found.tensors.values()}
    one = [dtype for dtype, name in FLOATS.items() if names == {name}]
    return one[0] if one else torch.float32


def _require_room(found: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    from edge_vlm.model.published.mapping import shapes

    needed = sum(map(math.prod, shapes(found.config).values())) * dtype.itemsize
    disk = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise NoSpaceLeft(
            f"the weights take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            where=disk,
            remedy="make room, name another disk, or add --dtype bfloat16",
        )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        help="a checkpoint, a published Molmo2 folder, or one of its training repository (a step, "
        "or all of a run: the last step is taken)",
    )
    parser.add_argument(
        "-o", "--out", type=output_folder, required=True, help="new or empty folder"
    )
    parser.add_argument(
        "--to",
        choices=[OURS, HUB],
        default=OURS,
        help="this project's format, or the model hub's, which transformers loads (default: ours)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with the vocabulary, such as the published Molmo2 of this size: none lies in "
        "folders of the training repository",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="what weights are stored in (default: as they are)",
    )


def _run(args: argparse.Namespace) -> int:
    import torch

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    notes = convert(args.source, args.out, args.to, tokenizer=args.tokenizer, dtype=dtype)
    for note in notes:
        print(f"note: {note}")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {size / 1e9:.2f} GB, in the format of {args.to}")
    return 0


convert_command = Command(
    add_arguments=_add_arguments,
    run=_run,
)
