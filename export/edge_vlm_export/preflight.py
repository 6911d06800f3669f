"""Says before an export whether memory and disk suffice."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_vlm.config import ModelConfig
from edge_vlm.errors.export import NoSpaceLeft, NotEnoughMemory
from edge_vlm.formats.bundle import IMAGE_ENCODER, VIT_STEM_REUSE
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import WEIGHT_BYTES, Precision, weight_format
from edge_vlm.memory import free_memory, row_bytes
from edge_vlm_export.verify.check_inputs import check_sizes

PROGRAM_BYTES = 300_000_000
"""Libraries, and a traced graph of some thousand nodes."""
WORKING_COPIES = 2
"""The largest weight is held so many times while it is written, turned and as bytes, and once more
if it is converted. As it was read it is a mapped file, unless it is made up."""
SCORE_COPIES = 4
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
    measured: bool = False,
    made_up: bool = False,
) -> Estimate:
    """`shapes`: of every weight by our name; `largest_check`: graphs are run at their largest;
    `measured`: footage is seen by all graphs as float32 first, which lie on the disk meanwhile;
    `made_up`: weights are drawn and not read.

    Memory is what the process holds itself. Measured 3.5 GB (estimated 3.4) for two blocks each of
    Molmo2-4B in full width as fp32, 5.0 GB (5.0) as int4, 1.4 GB (1.5) for a narrow model with its
    vocabulary, 7.0 GB (6.5) for all of the 4B as int4, made up.
    """
    disk = single = 0.0
    for name, shape in shapes.items():
        count = _count(shape)
        kind = weight_format(name, precision)
        if name == "llm.embed.weight":
            disk += WEIGHT_BYTES[kind] * count
            continue
        # Pictures have a graph that borrows its weights, but not before they are quantised, and not
        # those that were quantised by what another graph has seen.
        seen_twice = IMAGE_ENCODER in specs and name.startswith(("vit.", "connector."))
        copies = 1 + seen_twice + (VIT_STEM_REUSE in specs and _in_stem(name, cfg))
        disk += (copies if precision.vit != "base" else 1) * count * WEIGHT_BYTES[kind]
        single += copies * count * 4
    if measured:
        disk += single
    largest = max(_count(shape) for shape in shapes.values()) * 4
    is_converted = weight_format("llm.head.weight", precision) != "float32"
    memory = PROGRAM_BYTES + max(
        (WORKING_COPIES + is_converted + made_up) * largest,
        _compared(cfg, specs["llm"], largest_check),
    )
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


def _in_stem(name: str, cfg: ModelConfig) -> bool:
    """A weight of the blocks in front of the drop."""
    part, _, rest = name.removeprefix("vit.").partition(".")
    if not name.startswith("vit."):
        return name.startswith("scorer.")
    return part != "blocks" or int(rest.partition(".")[0]) < cfg.whole_blocks


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _compared(cfg: ModelConfig, spec: GraphSpec, largest: bool) -> int:
    """Of the largest comparison of the language graph: the cache that goes in and what comes out on
    both sides, and torch's scores for every query at once."""
    lm = cfg.language

    def held(sizes: Mapping[str, int]) -> int:
        s, p = sizes["s"], sizes["p"]
        cache = row_bytes(lm, spec) * (p + 2 * s)
        logits = 2 * 4 * sizes["n"] * lm.base_vocab
        return cache + logits + SCORE_COPIES * 4 * lm.num_heads * s * (p + s)

    return max(map(held, check_sizes(spec, largest=largest)))


class MemoryWatch:
    """Most memory that this process was seen to hold while the block ran, on Linux."""

    INTERVAL_S = 0.1

    def __init__(self) -> None:
        self.own = self.mapped = 0
        """In bytes: what it holds itself, which has to fit, and pages of files, which the system
        takes back when it needs the room. 0: the system does not say."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        status = Path("/proc/self/status")
        while status.is_file():
            held = dict(line.split(":", 1) for line in status.read_text().splitlines())
            self.own = max(self.own, _kilobytes(held, "RssAnon"))
            self.mapped = max(self.mapped, _kilobytes(held, "RssFile"))
            if self._ended.wait(self.INTERVAL_S):
                return


def _kilobytes(held: Mapping[str, str], field: str) -> int:
    return int(held.get(field, "0 kB").split()[0]) * 1024
