"""Keys and values of one conversation, in memory that never moves.

Per layer one buffer for keys and one for values. A graph reads the past from a buffer and writes
the new rows behind it, so appending copies nothing, and undoing an append is setting a number back.

Token-major buffers are [capacity, heads, head_dim]: a graph is given their start as its past and
the place behind the last row for its output. Head-major ones are [1, heads, capacity, head_dim]: a
graph is given the whole buffer as input and as output.

The memory is the host's, or that of a device whose engines read and write it there.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np

from edge_vlm.errors import KvFull
from edge_vlm.formats.precision import KVLayout
from edge_vlm_runtime.engines.base import CacheMemory

Shape = tuple[int, ...]


class KVArena:
    """Rows 0..`length` - 1 are in use. One owner, one thread."""

    def __init__(
        self,
        *,
        num_layers: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        layout: KVLayout = KVLayout.TOKEN_MAJOR,
        memory: CacheMemory | None = None,
    ) -> None:
        """`memory`: of the device that is to hold the buffers; None is the host."""
        for field, value in (("num_layers", num_layers), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{field} must be positive, got {value}")
        self._in_place = layout is KVLayout.HEAD_MAJOR
        rows = (num_kv_heads, capacity) if self._in_place else (capacity, num_kv_heads)
        self._dtype, self._memory = np.dtype(dtype), memory
        self._layer_shape = (2, *rows, head_dim)
        self._positions = np.empty(capacity, np.int64)
        self._length = 0
        self.row_shape = (num_kv_heads, head_dim)
        self.row_bytes = num_kv_heads * head_dim * self._dtype.itemsize
        plane = capacity * self.row_bytes
        self._num_bytes = num_layers * 2 * plane
        if memory is None:
            self._buffer = np.empty((num_layers, *self._layer_shape), self._dtype)
            start = self._buffer.ctypes.data
        else:
            start = memory.alloc(self._num_bytes)
            self._finalizer = weakref.finalize(self, memory.free, start)
            self._finalizer.atexit = False  # at the end of the process the device does it
        self.pointers: tuple[int, ...] = tuple(start + i * plane for i in range(num_layers * 2))
        """Addresses of the buffers: keys and values of layer 0, of layer 1, ..."""

    @property
    def capacity(self) -> int:
        return len(self._positions)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def free(self) -> int:
        return self.capacity - self._length

    @property
    def num_bytes(self) -> int:
        """Size of the allocation, full or not."""
        return self._num_bytes

    @property
    def positions(self) -> np.ndarray:
        """Position i64 [length] of each row, rising; a copy."""
        return self._positions[: self._length].copy()

    @property
    def next_position(self) -> int:
        """One past the newest row's position; 0 when empty."""
        return int(self._positions[self._length - 1]) + 1 if self._length else 0

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values in use, each [length, heads, head_dim]: views, or copies from a
        device."""
        both = self._buffer[layer] if self._memory is None else self._fetched(layer, self._memory)
        keys, values = both.swapaxes(1, 2) if self._in_place else both
        return keys[: self._length], values[: self._length]

    def _fetched(self, layer: int, memory: CacheMemory) -> np.ndarray:
        copy = np.empty(self._layer_shape, self._dtype)
        memory.to_host(copy.ctypes.data, self.pointers[2 * layer], copy.nbytes)
        memory.synchronize()
        return copy

    def places(self, num_rows: int) -> tuple[Shape, int, Shape]:
        """What a graph that adds `num_rows` is given of each buffer: the shape that it reads from
        the buffer's start, the offset in bytes at which it writes, and the shape that it writes."""
        if self._in_place:
            whole = (1, self.row_shape[0], self.capacity, self.row_shape[1])
            return whole, 0, whole
        past, new = (self._length, *self.row_shape), (num_rows, *self.row_shape)
        return past, self._length * self.row_bytes, new

    def takes(self, num_rows: int) -> bool:
        """Whether all numbers that a graph has just written behind the last row are finite. Rows in
        a device's memory are not fetched for it."""
        if self._memory is not None:
            return True
        new = slice(self._length, self._length + num_rows)
        rows = self._buffer[:, :, :, new] if self._in_place else self._buffer[:, :, new]
        return bool(np.isfinite(rows).all())

    def reserve(self, num_rows: int) -> None:
        """Raises KvFull unless `num_rows` more fit."""
        if num_rows > self.free:
            raise KvFull(
                f"{num_rows} more tokens do not fit, {self._length} of {self.capacity} are in use",
                remedy="evict old frames or open a larger arena",
            )

    def append(self, num_rows: int) -> None:
        """Takes over rows that a graph has written behind the last one.

        They get the positions from `next_position` on. Raises KvFull.
        """
        self.reserve(num_rows)
        first = self.next_position
        end = self._length + num_rows
        self._positions[self._length : end] = np.arange(first, first + num_rows)
        self._length = end

    def mark(self) -> int:
        """A place for `truncate` to come back to. An eviction before it makes it meaningless."""
        return self._length

    def truncate(self, mark: int) -> None:
        """Forgets all rows from `mark` on, as if they had never been appended."""
        if not 0 <= mark <= self._length:
            raise ValueError(f"mark {mark} lies outside the {self._length} rows in use")
        self._length = mark

    def evict(self, start: int, stop: int) -> None:
        """Drops rows start..stop - 1; later rows move down and keep their positions."""
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"rows {start}..{stop} lie outside the {self._length} in use")
        tail = self._length - stop
        if start == stop:
            return
        # Within a buffer, one run of rows or, head-major, one for every head.
        heads = self.row_shape[0] if self._in_place else 1
        step = self.row_bytes // heads
        for pointer in self.pointers:
            for head in range(heads):
                base = pointer + head * self.capacity * step
                self._move_down(base + start * step, base + stop * step, tail * step)
        self._positions[start : start + tail] = self._positions[stop : self._length].copy()
        self._length = start + tail

    def _move_down(self, target: int, source: int, num_bytes: int) -> None:
        if self._memory is None:
            ctypes.memmove(target, source, num_bytes)
            return
        # In pieces as long as the way is: none of them overlaps its target.
        piece = source - target
        for offset in range(0, num_bytes, piece):
            size = min(piece, num_bytes - offset)
            self._memory.copy(target + offset, source + offset, size)

    def clear(self) -> None:
        self._length = 0

    def close(self) -> None:
        """Frees a device's memory. Using the arena afterwards is an error; closing twice is not."""
        if self._memory is not None:
            self._finalizer()
