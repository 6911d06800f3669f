"""Keys and values of one conversation, in memory that never moves.

Per layer one buffer for keys and one for values, token-major [capacity, heads, head_dim]. A graph
reads the past from a buffer's start and writes the new rows right behind it, so appending copies
nothing, and undoing an append is setting a number back.
"""

from __future__ import annotations

import ctypes

import numpy as np

from edge_vlm.errors import KvFull


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
    ) -> None:
        for field, value in (("num_layers", num_layers), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{field} must be positive, got {value}")
        self._buffer = np.empty((num_layers, 2, capacity, num_kv_heads, head_dim), dtype)
        self._positions = np.empty(capacity, np.int64)
        self._length = 0
        self.row_shape = (num_kv_heads, head_dim)
        self.row_bytes = num_kv_heads * head_dim * self._buffer.itemsize
        start, plane = self._buffer.ctypes.data, capacity * self.row_bytes
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
        return self._buffer.nbytes

    @property
    def positions(self) -> np.ndarray:
        """Position i64 [length] of each row, rising; a copy."""
        return self._positions[: self._length].copy()

    @property
    def next_position(self) -> int:
        """One past the newest row's position; 0 when empty."""
        return int(self._positions[self._length - 1]) + 1 if self._length else 0

    def rows(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of the keys and values in use, each [length, heads, head_dim]."""
        keys, values = self._buffer[layer, :, : self._length]
        return keys, values

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
        for pointer in self.pointers:
            ctypes.memmove(
                pointer + start * self.row_bytes,
                pointer + stop * self.row_bytes,
                tail * self.row_bytes,
            )
        self._positions[start : start + tail] = self._positions[stop : self._length].copy()
        self._length = start + tail

    def clear(self) -> None:
        self._length = 0
