"""The arena: undoing is as if never done, survivors keep rows and positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import KvFull
from edge_vlm.formats.precision import KVLayout
from edge_vlm_runtime.inference.kv_arena import KVArena


def _arena(capacity: int = 16) -> KVArena:
    return KVArena(num_layers=2, capacity=capacity, num_kv_heads=2, head_dim=4)


def _write(arena: KVArena, value: float, num_rows: int) -> None:
    """What a graph does: writes behind the last row, then the rows are taken over."""
    arena.reserve(num_rows)
    start = arena.length
    for i, pointer in enumerate(arena.pointers):
        row = np.full((num_rows, *arena.row_shape), value + i / 8, np.float32)
        address = pointer + start * arena.row_bytes
        target = (np.ctypeslib.ctypes.c_float * row.size).from_address(address)  # type: ignore[attr-defined]
        np.frombuffer(target, np.float32)[:] = row.ravel()
    arena.append(num_rows)


def _content(arena: KVArena) -> list[float]:
    """The value each row was written with; all layers, keys and values must agree."""
    planes = [plane for layer in range(2) for plane in arena.rows(layer)]
    for i, plane in enumerate(planes):
        assert (plane - i / 8 == planes[0]).all()
    column: list[float] = planes[0][:, 0, 0].tolist()
    return column


def test_rows_lie_behind_each_other_in_memory() -> None:
    arena = _arena()
    _write(arena, 1, 3)
    _write(arena, 2, 2)
    assert _content(arena) == [1, 1, 1, 2, 2]
    assert arena.positions.tolist() == [0, 1, 2, 3, 4]
    keys, _ = arena.rows(1)
    assert keys.__array_interface__["data"][0] == arena.pointers[2]


@pytest.mark.parametrize("layout", KVLayout)
def test_new_rows_that_are_not_finite_are_seen(layout: KVLayout) -> None:
    arena = KVArena(
        num_layers=2, capacity=6, num_kv_heads=2, head_dim=4, dtype="float16", layout=layout
    )
    buffer = arena._buffer
    buffer[:] = np.nan  # what lies there before anything is written is anybody's
    rows = buffer[..., :5, :] if layout is KVLayout.HEAD_MAJOR else buffer[:, :, :5]
    rows[:] = 1
    arena.append(2)
    assert arena.takes(3)
    assert not arena.takes(4)
    rows[1, 1, 0, 1, 0] = rows[1, 1, 1, 0, 0] = -np.inf  # of a row that is there already
    assert arena.takes(3)
    rows[..., 3] = -np.inf
    assert not arena.takes(1)


def test_truncate_is_as_if_never_appended() -> None:
    arena = _arena()
    _write(arena, 1, 3)
    mark = arena.mark()
    _write(arena, 2, 5)
    arena.truncate(mark)
    assert (arena.length, arena.next_position, arena.free) == (3, 3, 13)
    _write(arena, 3, 1)
    assert _content(arena) == [1, 1, 1, 3]
    assert arena.positions.tolist() == [0, 1, 2, 3]


def test_evicting_the_newest_is_as_if_never_appended() -> None:
    arena = _arena()
    _write(arena, 1, 3)
    _write(arena, 2, 5)
    arena.evict(3, 8)
    assert (arena.length, arena.next_position) == (3, 3)


def test_survivors_of_an_eviction_keep_their_positions() -> None:
    arena = _arena()
    for value in range(4):
        _write(arena, value, 3)
    arena.evict(3, 6)
    assert _content(arena) == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert arena.positions.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert arena.next_position == 12


def test_a_full_arena_says_so_and_stays_whole() -> None:
    arena = _arena(capacity=4)
    _write(arena, 1, 3)
    with pytest.raises(KvFull, match="2 more tokens do not fit"):
        arena.reserve(2)
    with pytest.raises(KvFull):
        arena.append(2)
    _write(arena, 2, 1)
    assert _content(arena) == [1, 1, 1, 2]
    arena.clear()
    assert (arena.length, arena.next_position, arena.free) == (0, 0, 4)


@pytest.mark.parametrize("mark", [-1, 3])
def test_marks_outside_are_refused(mark: int) -> None:
    arena = _arena()
    _write(arena, 1, 2)
    with pytest.raises(ValueError, match="outside"):
        arena.truncate(mark)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 3)])
def test_rows_outside_are_not_evicted(start: int, stop: int) -> None:
    arena = _arena()
    _write(arena, 1, 2)
    with pytest.raises(ValueError, match="outside"):
        arena.evict(start, stop)


def test_shapes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity must be positive"):
        _arena(capacity=0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("evict"), st.integers(0, 20), st.integers(0, 20)),
    ),
    max_size=20,
)


@given(operations)
def test_any_history_equals_a_list(history: list[tuple[str, int, int]]) -> None:
    arena, model = _arena(), list[tuple[float, int]]()
    for serial, (operation, a, b) in enumerate(history):
        if operation == "append":
            if len(model) + a > arena.capacity:
                continue
            first = model[-1][1] + 1 if model else 0
            _write(arena, float(serial), a)
            model += [(float(serial), first + i) for i in range(a)]
        elif operation == "truncate":
            arena.truncate(min(a, len(model)))
            del model[min(a, len(model)) :]
        else:
            start, stop = sorted((min(a, len(model)), min(b, len(model))))
            arena.evict(start, stop)
            del model[start:stop]
        assert list(zip(_content(arena), arena.positions.tolist(), strict=True)) == model
