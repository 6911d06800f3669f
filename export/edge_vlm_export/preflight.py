"""Says before an export whether memory and disk suffice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.config import ModelConfig
from edge_vlm.errors import NoSpaceLeft, NotEnoughMemory
from edge_vlm.formats.bundle import IMAGE_ENCODER
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Precision
from edge_vlm_export.quantize.plan import LLM_PRODUCTS, VIT_PRODUCTS
from edge_vlm_export.quantize.quantize import BLOCK_SIZES

SIZES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / BLOCK_SIZES[0]}
"""Bytes of one weight, scales included."""
PROGRAM_BYTES = 2_000_000_000
"""Libraries, and a traced graph of some thousand nodes."""
WORKING_COPIES = 4
"""A weight is held so many times while it is written: itself, turned, as integers, as bytes."""
MARGIN = 1.05


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """In bytes; `free` is None where the system does not say."""

    disk: int
    disk_free: int
    memory: int
    memory_free: int | None

    def __str__(self) -> str:
        free = "unknown" if self.memory_free is None else f"{self.memory_free / 1e9:.1f} GB"
        return (
            f"needs {self.disk / 1e9:.2f} GB of disk ({self.disk_free / 1e9:.1f} GB free) and "
            f"about {self.memory / 1e9:.1f} GB of memory ({free} free)"
        )


def estimate(
    cfg: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, GraphSpec],
    precision: Precision,
    target: Path,
    *,
    largest_check: bool,
) -> Estimate:
    """`shapes`: of every weight by our name; `largest_check`: graphs are run at their largest."""
    disk = single = 0.0
    for name, shape in shapes.items():
        count = _count(shape)
        if name == "llm.embed.weight":
            disk += 4 * count
            continue
        # Pictures have a graph that borrows its weights, but not before they are quantised, and not
        # those that were quantised by what another graph has seen.
        seen_twice = IMAGE_ENCODER in specs and name.startswith(("vit.", "connector."))
        copies = 2 if seen_twice and precision.vit != "base" else 1
        disk += copies * count * SIZES[weight_format(name, precision)]
        single += (2 if seen_twice else 1) * count * 4
    if precision.needs_ranges:
        disk += single
    largest = max(_count(shape) for shape in shapes.values()) * 4
    memory = PROGRAM_BYTES + WORKING_COPIES * largest + _activations(cfg, specs, largest_check)
    folder = target.absolute()
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        disk=int(disk * MARGIN),
        disk_free=shutil.disk_usage(folder).free,
        memory=int(memory),
        memory_free=free_memory(),
    )


def require_room(needed: Estimate, target: Path) -> None:
    """Raises NoSpaceLeft, NotEnoughMemory."""
    if needed.disk > needed.disk_free:
        raise NoSpaceLeft(
            f"the export {needed}", where=target, remedy="free some space or name another disk"
        )
    if needed.memory_free is not None and needed.memory > needed.memory_free:
        raise NotEnoughMemory(
            f"the export {needed}",
            remedy="close other programs, or lower --max-past and --max-tokens",
        )


def weight_format(name: str, precision: Precision) -> str:
    """What becomes of a checkpoint's weight."""
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    chosen = "base"
    if kind == "weight" and parent.startswith("vit.blocks.") and leaf in VIT_PRODUCTS:
        chosen = precision.vit
    elif kind == "weight" and parent.startswith("llm.blocks.") and leaf in LLM_PRODUCTS:
        chosen = precision.llm
    elif name == "llm.head.weight":
        chosen = precision.head
    return precision.base if chosen == "base" else chosen


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _activations(cfg: ModelConfig, specs: Mapping[str, GraphSpec], largest: bool) -> int:
    """Of one comparison of the language graph: two caches in, two out, scores and mask."""
    lm, dims = cfg.language, specs["llm"].dims
    s, p = (dims[name].max if largest else dims[name].opt for name in ("s", "p"))
    row = 2 * lm.num_layers * lm.num_kv_heads * lm.head_dim * 4
    scores = lm.num_heads * s * (p + s) * 4
    return 2 * row * (p + 2 * s) + 4 * scores


def free_memory() -> int | None:
    """Bytes that may still be allocated, on Linux: of the machine, or of this control group."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        found += [int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found) if found else None


def peak_memory() -> int | None:
    """Most memory this process ever held, in bytes; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
