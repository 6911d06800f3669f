"""Looks at everything that training would read: every record, every video, every length."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_vlm.config import VisionAttention
from edge_vlm.errors import DataError, EdgeVlmError, VideoError
from edge_vlm.formats.report import Report
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pruning.clip_budget import num_kept
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.knapsack import fill_row
from edge_vlm_training.data.packing.row_stream import PackingConfig
from edge_vlm_training.data.packing.trees import Tree, TreeBuilder, split_tree
from edge_vlm_training.data.records import scan_records
from edge_vlm_training.data.sample import Sample
from edge_vlm_training.data.video_source import record_sample

_DECODED_SIDE = 14
"""Pixels a side of what is looked at: decoding is what is checked, not the picture."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """With these, records are measured as rows of tokens."""

    prompt: PromptFormat
    packing: PackingConfig
    num_cells: int

    def kept(self, num_frames: int) -> int:
        """Most cells that a clip keeps at any of the packing's shares."""
        share, floor = max(self.packing.keep_ratio), max(self.packing.min_cells)
        return num_kept(num_frames, self.num_cells, share, floor, variant="first_whole")


@dataclasses.dataclass
class Findings:
    """What was found; `bad` has one error for each record that training could not use."""

    records: int = 0
    frames: int = 0
    seconds: float = 0.0
    videos: set[Path] = dataclasses.field(default_factory=set)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: list[EdgeVlmError] = dataclasses.field(default_factory=list)
    trees: list[Tree] = dataclasses.field(default_factory=list)


def check_records(
    path: Path,
    sampling: FrameRule,
    *,
    decode: bool = True,
    lengths: Lengths | None = None,
    on_bad: Callable[[EdgeVlmError], None] = lambda error: None,
) -> Findings:
    """Reads every record; with `decode` also every picture that training would show.

    `on_bad` hears of each bad record as it is found. Raises DataError if there is no record.
    """
    findings = Findings()
    builder = None if lengths is None else TreeBuilder(lengths.prompt, VisionAttention.FRAME)
    for item in scan_records(path):
        findings.records += 1
        try:
            if isinstance(item, DataError):
                raise item
            sample = record_sample(item, sampling)
            if decode:
                _decode(sample)
            if lengths is not None and builder is not None:
                findings.trees += _measured(builder.build(sample), lengths)
        except (DataError, VideoError) as error:
            findings.bad.append(error)
            on_bad(error)
            continue
        findings.videos.add(item.video)
        findings.frames += len(sample.times_s)
        findings.seconds += float(sample.times_s[-1])
        findings.kinds.update(branch.kind for branch in sample.branches)
    return findings


def _decode(sample: Sample) -> None:
    pictures = sample.load(_DECODED_SIDE)
    assert len(pictures) == len(sample.times_s)


def _measured(tree: Tree, lengths: Lengths) -> list[Tree]:
    packing = lengths.packing
    return list(
        split_tree(
            tree,
            kept_cells=lengths.kept(tree.num_frames),
            max_tokens=packing.max_tokens,
            max_branches=packing.max_branches,
        )
    )


def describe(path: Path, findings: Findings, lengths: Lengths | None = None) -> Report:
    """The findings as a report; with `lengths`, how full packed rows would be."""
    facts = {
        "records": f"{findings.records - len(findings.bad)} of {findings.records} can be used",
        "videos": f"{len(findings.videos)}",
        "clips": f"{findings.seconds / 60:.1f} minutes, {findings.frames} frames",
    }
    tables: dict[str, dict[str, tuple[float, str]]] = {
        "annotations": {kind: (count, "") for kind, count in sorted(findings.kinds.items())}
    }
    if lengths is not None and findings.trees:
        tables[f"tokens, at most {lengths.packing.max_tokens} a row"] = _rows(findings, lengths)
    return Report(title=str(path), facts=facts, tables=tables)


def _rows(findings: Findings, lengths: Lengths) -> dict[str, tuple[float, str]]:
    """Packs everything once, a window at a time as a lane does."""
    packing = lengths.packing
    sizes = [tree.length(lengths.kept(tree.num_frames)) for tree in findings.trees]
    waiting = list(zip(sizes, (tree.num_frames for tree in findings.trees), strict=True))
    rows = 0
    while waiting:
        window = waiting[: packing.window]
        tokens, frames = [t for t, _ in window], [f for _, f in window]
        chosen = set(fill_row(tokens, frames, packing.max_tokens, packing.max_frames))
        waiting = [item for i, item in enumerate(waiting) if i not in chosen]
        rows += 1
    return {
        "median clip": (float(np.median(sizes)), "tokens"),
        "longest clip": (max(sizes), "tokens"),
        "packed rows": (rows, ""),
        "clips a row": (round(len(sizes) / rows, 2), ""),
        "filled": (round(100 * sum(sizes) / (rows * packing.max_tokens), 1), "%"),
    }
