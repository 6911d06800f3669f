"""Weights on huge pages (Linux).

Libraries keep weights in memory of 4 kB pages. A language model reads all of them for every token,
and the processor has to look up each page: on pages of 2 MB a token of an int4 model of full width
took 0.83 of its time, of an fp32 one 0.94 (benchmarks/results/huge_pages.json).
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HUGE = 2 << 20
LEAST = 4 << 20
"""Smaller areas hold no weights that matter."""
FULL = 0.9
"""Of an area that is in memory: an emptier one would grow."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25
"""From linux/mman.h: from now on (done by the kernel in its own time), and at once (Linux 6.1)."""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMAPS = Path("/proc/self/smaps")
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (rw-p) 0+ \S+ 0\s*(?:\[heap\]|\[anon\S*)?$")
_NEXT = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


@dataclass(frozen=True)
class Area:
    """Private memory of this process, from `start` up to `end`."""

    start: int
    end: int
    in_memory: int
    on_huge: int


def areas() -> list[Area]:
    """Those that are large and full; none where the system is not Linux."""
    return [
        area
        for area in _all_areas()
        if area.end - area.start >= LEAST and area.in_memory >= FULL * (area.end - area.start)
    ]


def gather(leave: Collection[Area] = ()) -> int:
    """Puts the large areas of this process's memory on huge pages, but for those to `leave`, and
    returns how many bytes came onto them. Nothing where the system's settings say never or cannot
    be read."""
    try:
        if "[never]" in SETTING.read_text():
            return 0
    except OSError:
        return 0
    before = sum(area.on_huge for area in _all_areas())
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for area in areas():
        for start, end in _without(area, leave):
            start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
            if start < end:
                # Each may be refused, in whole or in part: then the pages stay as they are.
                advise(start, end - start, MADV_HUGEPAGE)
                advise(start, end - start, MADV_COLLAPSE)
    # Of all areas: the kernel cuts one in two where its pages are of two kinds.
    gained = max(0, sum(area.on_huge for area in _all_areas()) - before)
    log.debug("%d MB on huge pages", gained >> 20)
    return gained


def _without(area: Area, leave: Collection[Area]) -> Iterator[tuple[int, int]]:
    """The stretches of an area outside those to leave: what lies side by side becomes one area."""
    start = area.start
    for other in sorted(leave, key=lambda other: other.start):
        if other.end > start and other.start < area.end:
            yield start, max(start, other.start)
            start = other.end
    yield start, max(start, area.end)


def _all_areas() -> list[Area]:
    try:
        text = SMAPS.read_text(errors="surrogateescape")  # names of mapped files are any bytes
    except OSError:
        return []
    return list(_parsed(text.split("\n")))


def _parsed(lines: list[str]) -> Iterator[Area]:
    found: re.Match[str] | None = None
    sizes: dict[str, int] = {}
    for line in [*lines, "0-0 "]:
        if _NEXT.match(line):
            if found is not None:
                start, end = int(found[1], 16), int(found[2], 16)
                yield Area(start, end, sizes["Rss"], sizes["AnonHugePages"])
            found, sizes = _AREA.match(line), {}
        elif found is not None:
            name, _, rest = line.partition(":")
            number = rest.split()
            if number and number[0].isdecimal():
                sizes[name] = int(number[0]) << 10
