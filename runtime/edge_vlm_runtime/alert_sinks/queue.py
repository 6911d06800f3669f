"""Alert events on their way to their receivers, in memory or in a file that outlives the process.

Bounded by a number of events and by bytes for each receiver: one that never answers costs its
oldest events, and nothing else. One owner, one thread.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    receiver TEXT NOT NULL,
    body TEXT NOT NULL,
    jpeg BLOB
);
CREATE INDEX IF NOT EXISTS by_receiver ON deliveries (receiver, number);
"""
SIZE = "SUM(LENGTH(CAST(body AS BLOB)) + COALESCE(LENGTH(jpeg), 0))"


@dataclass(frozen=True)
class QueuedAlert:
    """One event for one receiver."""

    number: int
    body: str
    """JSON object, without the picture."""
    jpeg: bytes | None


class DeliveryQueue:
    """First in, first out for each receiver."""

    def __init__(
        self, path: Path | None = None, *, max_events: int = 1000, max_bytes: int = 64 << 20
    ) -> None:
        """Without `path` in memory. Raises ConfigError for a file that cannot be used."""
        self.path = path
        self._max_events = max_events
        self._max_bytes = max_bytes
        try:
            self._database = sqlite3.connect(
                ":memory:" if path is None else path,
                isolation_level=None,
                timeout=0.0,
                check_same_thread=False,  # opened by one thread, then used by another one
            )
            # Two processes would send everything twice, and a power cut must not cost the file.
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(f"BEGIN EXCLUSIVE; {SCHEMA} COMMIT;")
        except sqlite3.Error as error:
            raise ConfigError(
                f"cannot keep alert events here: {error}",
                where=path,
                remedy="name a file that no other process uses, or a new one",
            ) from error

    def put(self, receiver: str, body: str, jpeg: bytes | None) -> int:
        """Takes an event in; returns how many of the receiver's oldest ones were lost for it.

        Raises sqlite3.Error when the disk does not take it.
        """
        insert = "INSERT INTO deliveries (receiver, body, jpeg) VALUES (?, ?, ?)"
        self._database.execute(insert, (receiver, body, jpeg))
        lost = 0
        while self._is_over(receiver):
            oldest = self.oldest(receiver)
            assert oldest is not None  # more than one is there
            self.remove(oldest.number)
            lost += 1
        return lost

    def _is_over(self, receiver: str) -> bool:
        count, size = self._database.execute(
            f"SELECT COUNT(*), {SIZE} FROM deliveries WHERE receiver = ?", (receiver,)
        ).fetchone()
        return count > 1 and (count > self._max_events or size > self._max_bytes)

    def oldest(self, receiver: str) -> QueuedAlert | None:
        row = self._database.execute(
            "SELECT number, body, jpeg FROM deliveries WHERE receiver = ? ORDER BY number LIMIT 1",
            (receiver,),
        ).fetchone()
        return None if row is None else QueuedAlert(*row)

    def remove(self, number: int) -> None:
        """The event has arrived, or never will."""
        self._database.execute("DELETE FROM deliveries WHERE number = ?", (number,))

    def count(self, receiver: str) -> int:
        row = self._database.execute(
            "SELECT COUNT(*) FROM deliveries WHERE receiver = ?", (receiver,)
        ).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Twice does no harm."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
