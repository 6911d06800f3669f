"""Large areas of a process's own memory come onto huge pages, with what they hold."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.huge_pages import HUGE, Area

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="needs Linux")
SIZE = (32 << 20) + 37 * mmap.PAGESIZE
"""Of odd size, so that Linux lays it beside its neighbours and not where a huge page begins."""


def collapses() -> bool:
    """Whether this kernel puts a written area on huge pages when asked (Linux 6.1 and later)."""
    if not huge_pages.SETTING.exists() or "[never]" in huge_pages.SETTING.read_text():
        return False
    size, collapse = 4 << 20, 25
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.write(bytes(size))
        start = ctypes.c_char.from_buffer(area)
        address = -(-ctypes.addressof(start) // HUGE) * HUGE
        refused: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), HUGE, collapse)
        del start
    return refused == 0


gives_huge_pages = pytest.mark.skipif(
    not collapses(), reason="this system gives no huge pages when asked"
)


@contextlib.contextmanager
def written() -> Iterator[mmap.mmap]:
    """Memory as a library gets it: small pages, every one of them written."""
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        for start in range(0, SIZE, mmap.PAGESIZE):
            area[start : start + 4] = (start // mmap.PAGESIZE).to_bytes(4, "little")
        yield area


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with written() as area:
        yield area


@gives_huge_pages
def test_written_memory_comes_onto_huge_pages_as_it_is(memory: mmap.mmap) -> None:
    before = huge_pages.areas()
    gained = huge_pages.gather()
    assert gained >= SIZE - 2 * HUGE
    for start in range(0, SIZE, mmap.PAGESIZE):
        assert int.from_bytes(memory[start : start + 4], "little") == start // mmap.PAGESIZE
    assert huge_pages.gather() < SIZE // 2  # once is enough
    assert sum(area.end - area.start for area in before) >= SIZE


def test_what_is_to_be_left_stays(memory: mmap.mmap) -> None:
    assert huge_pages.gather(leave=huge_pages.areas()) == 0


@gives_huge_pages
def test_of_neighbours_in_one_area_only_one_is_left(memory: mmap.mmap) -> None:
    left = huge_pages.areas()
    with written():
        gained = huge_pages.gather(leave=left)
        assert SIZE - 3 * HUGE <= gained <= SIZE + HUGE
        assert huge_pages.gather() >= SIZE - 3 * HUGE


def test_an_empty_area_is_not_filled() -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as empty:
        before = sum(area.in_memory for area in huge_pages.areas())
        huge_pages.gather()
        empty[0:1] = b"a"
        assert sum(area.in_memory for area in huge_pages.areas()) < before + SIZE // 2


def test_a_setting_of_never_is_kept(
    memory: mmap.mmap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    assert huge_pages.gather() == 0


def test_areas_are_read_as_linux_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "7f0000000000-7f0000800000 rw-p 00000000 00:00 0 \n"
        "Size:               8192 kB\nRss:                8000 kB\nAnonHugePages:      4096 kB\n"
        "VmFlags: rd wr mr mw me ac sd \n"
        "7f0001000000-7f0001800000 rw-p 00000000 00:00 0 \n"  # half empty
        "Size:               8192 kB\nRss:                4000 kB\nAnonHugePages:         0 kB\n"
        "7f0002000000-7f0002800000 r--p 00000000 fe:00 77                 /a/file (rw-p 0 0 0)\n"
        "Size:               8192 kB\nRss:                8192 kB\nAnonHugePages:         0 kB\n"
        "7f0003000000-7f0003010000 rw-p 00000000 00:00 0                  [heap]\n"  # small
        "Size:                 64 kB\nRss:                  64 kB\nAnonHugePages:         0 kB\n"
        "7f0004000000-7f0004400000 rw-p 00000000 00:00 0                  [heap]\n"
        "Size:               4096 kB\nRss:                4096 kB\nAnonHugePages:         0 kB\n"
    )
    monkeypatch.setattr(huge_pages, "SMAPS", smaps)
    assert huge_pages.areas() == [
        Area(0x7F0000000000, 0x7F0000800000, 8000 << 10, 4096 << 10),
        Area(0x7F0004000000, 0x7F0004400000, 4096 << 10, 0),
    ]
    named = b"7f0006000000-7f0006800000 r--p 00000000 fe:00 77 /a/m\xfcller\xe2\x80\xa8b.weights\n"
    smaps.write_bytes(named + smaps.read_bytes())  # any bytes but a line's end
    assert len(huge_pages.areas()) == 2
    monkeypatch.setattr(huge_pages, "SMAPS", tmp_path / "absent")
    assert huge_pages.areas() == []
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "absent")
    assert huge_pages.gather() == 0
