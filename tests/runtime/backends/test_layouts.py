"""A head-major arena holds, evicts and truncates what a token-major one does."""

from __future__ import annotations

import ctypes

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.formats.precision import KVLayout
from edge_vlm_runtime.inference.kv_arena import KVArena

LAYERS, CAPACITY, HEADS, WIDTH = 2, 16, 3, 4


def _arenas() -> list[KVArena]:
    return [
        KVArena(
            num_layers=LAYERS,
            capacity=CAPACITY,
            num_kv_heads=HEADS,
            head_dim=WIDTH,
            dtype="float16",
            layout=layout,
        )
        for layout in KVLayout
    ]


def _graph_adds(arena: KVArena, layout: KVLayout, rows: np.ndarray) -> None:
    """What a graph does with the memory it is given; rows [planes, s, HEADS, WIDTH]."""
    _, offset, written = arena.places(rows.shape[1])
    for pointer, new in zip(arena.pointers, rows, strict=True):
        size = int(np.prod(written))
        memory = (ctypes.c_uint16 * size).from_address(pointer + offset)
        target = np.frombuffer(memoryview(memory), np.float16).reshape(written)
        if layout is KVLayout.HEAD_MAJOR:
            target[0, :, arena.length : arena.length + rows.shape[1]] = new.swapaxes(0, 1)
        else:
            target[:] = new
    arena.append(rows.shape[1])


@given(st.data())
def test_both_layouts_hold_the_same_rows_whatever_is_done(data: st.DataObject) -> None:
    arenas = dict(zip(KVLayout, _arenas(), strict=True))
    rng = np.random.default_rng(0)
    for _ in range(data.draw(st.integers(1, 6))):
        first = arenas[KVLayout.TOKEN_MAJOR]
        action = data.draw(st.sampled_from(["add", "evict", "truncate"]))
        if action == "add" and first.free:
            count = data.draw(st.integers(1, first.free))
            rows = rng.random((2 * LAYERS, count, HEADS, WIDTH)).astype(np.float16)
            for layout, arena in arenas.items():
                _graph_adds(arena, layout, rows)
        elif action == "evict":
            start = data.draw(st.integers(0, first.length))
            stop = data.draw(st.integers(start, first.length))
            for arena in arenas.values():
                arena.evict(start, stop)
        elif action == "truncate":
            mark = data.draw(st.integers(0, first.length))
            for arena in arenas.values():
                arena.truncate(mark)
    one, other = arenas.values()
    assert one.positions.tolist() == other.positions.tolist()
    for layer in range(LAYERS):
        for a, b in zip(one.rows(layer), other.rows(layer), strict=True):
            assert a.shape == (one.length, HEADS, WIDTH)
            assert (a == b).all()


def test_what_a_graph_reads_and_writes_of_a_buffer() -> None:
    arenas = dict(zip(KVLayout, _arenas(), strict=True))
    for layout, arena in arenas.items():
        _graph_adds(arena, layout, np.ones((2 * LAYERS, 5, HEADS, WIDTH), np.float16))
    whole = (1, HEADS, CAPACITY, WIDTH)
    assert arenas[KVLayout.HEAD_MAJOR].places(2) == (whole, 0, whole)
    row_bytes = HEADS * WIDTH * 2
    expected = ((5, HEADS, WIDTH), 5 * row_bytes, (2, HEADS, WIDTH))
    assert arenas[KVLayout.TOKEN_MAJOR].places(2) == expected
