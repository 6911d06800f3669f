"""The mean of checkpoints' weights, which is often better than each of them.

    python -m benchmarks.training.mean_weights FOLDER FOLDER -o mean
    python -m benchmarks.training.mean_weights FOLDER FOLDER --shares 0.7,0.3 -o mean

What is made says how it is used as the first one does. They have to come from one start: what
trainings from other random weights found lies elsewhere. `average_last` of a recipe takes the mean
along one training.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from edge_vlm.errors import CheckpointError
from edge_vlm.model.checkpoint import TOKENIZER, load_checkpoint, read_own, save_checkpoint


def mean_checkpoint(folders: Sequence[Path], shares: Sequence[float], out: Path) -> None:
    """Raises CheckpointError for models or vocabularies that differ, a folder `out` that is there
    already, and as `load_checkpoint`."""
    first = folders[0]
    if out.exists():
        raise CheckpointError("is there already", where=out, remedy="name a new folder")
    model, words = load_checkpoint(first), (first / TOKENIZER).read_bytes()
    mean = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for folder, share in zip(folders, shares, strict=True):
        found = load_checkpoint(folder)
        if found.cfg != model.cfg or (folder / TOKENIZER).read_bytes() != words:
            raise CheckpointError(f"another model or {TOKENIZER} than in {first}", where=folder)
        for name, tensor in found.state_dict().items():
            mean[name] += share * tensor
    save_checkpoint(out, model.cfg, mean, first / TOKENIZER, read_own(first)[1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="checkpoint folders")
    parser.add_argument("--shares", help="of each, which add up to 1; by default all the same")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    number = len(args.checkpoints)
    try:
        texts = args.shares.split(",") if args.shares else [1 / number] * number
        shares = [float(text) for text in texts]
    except ValueError:
        parser.error(f"--shares: {args.shares!r} must be numbers, with commas")
    if len(shares) != number or not math.isclose(sum(shares), 1):
        parser.error(f"--shares: {number} numbers that add up to 1, got {args.shares!r}")
    mean_checkpoint(args.checkpoints, shares, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
