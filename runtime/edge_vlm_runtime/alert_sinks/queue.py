"""Alert events on their way to their receivers: in memory, and in a file that outlives the process.

Delivery reads only memory, so that a disk that is full, slow or broken holds up no alert. The file
follows on a thread of its own; what it does not take is written again later. Bounded by a number of
events and by bytes for each receiver: one that never answers costs its oldest events, and nothing
else.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, parse_json
from edge_vlm.private_files import exposure, restrict

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    receiver TEXT NOT NULL,
    body TEXT NOT NULL,
    jpeg BLOB
);
CREATE INDEX IF NOT EXISTS by_receiver ON deliveries (receiver, number);
"""
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
CLOSE_TIMEOUT_S = 5.0
"""For the last write; a disk that stands still must not hold up the end."""


def receiver_key(name: str, address: str) -> str:
    """What a receiver's queue is known by: `name`, and a digest where credentials are masked in it.

    The file may be copied. So that a weak password cannot be guessed from it, the digest is slow.
    """
    if "***@" not in name:
        return name
    digest = hashlib.pbkdf2_hmac("sha256", address.encode(), name.encode(), 100_000)
    return f"{name} {digest.hex()[:16]}"


@dataclass(frozen=True)
class QueuedAlert:
    """One event for one receiver."""

    number: int
    body: str
    """JSON object, without the picture."""
    jpeg: bytes | None

    @property
    def num_bytes(self) -> int:
        return len(self.body.encode()) + len(self.jpeg or b"")


def _require_alert(number: object, body: object, jpeg: object) -> None:
    """Raises ValueError, TypeError, KeyError for a row that could never be sent: it would stand
    before all others for ever."""
    fields = parse_json(body) if isinstance(body, str) else None
    if type(number) is not int or not isinstance(fields, dict):
        raise ValueError(f"row {number!r:.40} is no alert event")
    has_picture = isinstance(jpeg, bytes) and isinstance(fields["evidence"], dict)
    if not isinstance(fields["id"], str) or not (jpeg is None or has_picture):
        raise ValueError(f"row {number} is no alert event")


class DeliveryQueue:
    """First in, first out for each receiver, known by its key. Any thread may use it."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_events: int = 1000,
        max_bytes: int = 64 << 20,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
        first_back_off_s: float = FIRST_BACK_OFF_S,
    ) -> None:
        """Without `path` in memory alone. Raises ConfigError for a file that cannot be used."""
        self.path = path
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._first_back_off_s = first_back_off_s
        self._waiting: dict[str, deque[QueuedAlert]] = {}
        self._number = 0
        self._changed = threading.Condition()
        self._is_closing = False
        # What the file does not know yet: events by number with their receiver, and numbers.
        self._unsaved: dict[int, tuple[str, QueuedAlert]] = {}
        self._gone: set[int] = set()
        self._is_writing = False
        self._writer: threading.Thread | None = None
        if path is None:
            return
        try:
            if restrict(path):
                log.warning("%s: other users had rights to it, and have none any more", path)
            if (exposed := exposure(path.absolute().parent)) is not None:
                log.warning("alert queue: %s", exposed)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._database = connect(path, timeout=0.0, check_same_thread=False)
            # Two processes would send everything twice, and a power cut must not cost the file.
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(f"BEGIN EXCLUSIVE; {SCHEMA} COMMIT;")
            newest = self._database.execute("SELECT MAX(number) FROM deliveries").fetchone()[0]
            self._number = int(newest or 0)
        except (sqlite3.Error, *MALFORMED) as error:
            if hasattr(self, "_database"):
                self._database.close()  # or the file stays locked
            raise self._unusable(error) from error
        self._writer = threading.Thread(target=self._follow, name="edge-vlm-alerts", daemon=True)
        self._writer.start()

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"cannot keep alert events here: {error}",
            where=self.path,
            remedy="name a file that no other process uses, or a new one",
        )

    def load(self, receivers: Mapping[str, str]) -> None:
        """Takes up what the file holds for these keys. Raises ConfigError if it cannot be read.

        Call it before `put`. The values are the names under which earlier versions kept events:
        those of receivers that differed in credentials stand under one, once for each of them.
        """
        if self.path is None:
            return
        names = {*receivers, *receivers.values()}
        marks = ", ".join("?" * len(names))
        try:
            rows = self._database.execute(
                "SELECT receiver, number, body, jpeg FROM deliveries"
                f" WHERE receiver IN ({marks}) ORDER BY number",
                sorted(names),
            ).fetchall()
            for _, number, body, jpeg in rows:
                _require_alert(number, body, jpeg)
        except (sqlite3.Error, *MALFORMED) as error:
            raise self._unusable(error) from error
        with self._changed:
            for receiver, number, body, jpeg in rows:
                if receiver in receivers:
                    waiting = self._waiting.setdefault(receiver, deque())
                    waiting.append(QueuedAlert(number, body, jpeg))
                    continue
                self._gone.add(number)
                for key in (key for key, name in receivers.items() if name == receiver):
                    if not any(alert.body == body for alert in self._waiting.get(key, ())):
                        self._append(key, body, jpeg)
            self._changed.notify_all()

    def put(self, receiver: str, body: str, jpeg: bytes | None) -> int:
        """Takes an event in; returns how many of the receiver's oldest ones were lost for it."""
        with self._changed:
            waiting = self._append(receiver, body, jpeg)
            size, lost = sum(alert.num_bytes for alert in waiting), 0
            while len(waiting) > 1 and (len(waiting) > self._max_events or size > self._max_bytes):
                oldest = waiting.popleft()
                size -= oldest.num_bytes
                self._forget(oldest.number)
                lost += 1
            self._changed.notify_all()
        return lost

    def _append(self, receiver: str, body: str, jpeg: bytes | None) -> deque[QueuedAlert]:
        self._number += 1
        alert = QueuedAlert(self._number, body, jpeg)
        waiting = self._waiting.setdefault(receiver, deque())
        waiting.append(alert)
        if self._writer is not None:
            self._unsaved[alert.number] = receiver, alert
        return waiting

    def _forget(self, number: int) -> None:
        if self._writer is not None and self._unsaved.pop(number, None) is None:
            self._gone.add(number)

    def oldest(self, receiver: str) -> QueuedAlert | None:
        with self._changed:
            waiting = self._waiting.get(receiver)
            return waiting[0] if waiting else None

    def remove(self, receiver: str, number: int) -> None:
        """The oldest has arrived, or never will. Nothing happens if it was pushed out meanwhile."""
        with self._changed:
            waiting = self._waiting[receiver]
            if waiting and waiting[0].number == number:
                waiting.popleft()
                self._forget(number)
                self._changed.notify_all()

    def count(self, receiver: str) -> int:
        with self._changed:
            return len(self._waiting.get(receiver, ()))

    @property
    def is_saved(self) -> bool:
        """The file holds all that waits, and nothing else of these receivers."""
        with self._changed:
            waiting = self._is_writing or self._unsaved or self._gone
            return self.path is not None and not waiting

    def close(self) -> None:
        """Writes the rest. Twice does no harm."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._writer is not None:
            self._writer.join(CLOSE_TIMEOUT_S)

    # ---- the file, on its own thread -----------------------------------------------------------

    def _follow(self) -> None:
        """Writes what changed until the queue is closed; after a failure again, after a pause."""
        pause_s, is_last = 0.0, False
        while not is_last:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing, pause_s)
                self._changed.wait_for(lambda: self._is_closing or self._unsaved or self._gone)
                is_last = self._is_closing
                # What is removed while these are being written is `gone` with the next write.
                rows, self._unsaved = self._unsaved, {}
                gone, self._gone = self._gone, set()
                self._is_writing = bool(rows or gone)
            if not self._is_writing:  # all that a failed write left has arrived meanwhile
                continue
            try:
                self._write(rows.values(), gone)
            except Exception as error:  # noqa: BLE001  nobody may wait for this thread: it goes on
                with self._changed:
                    again = {n: row for n, row in rows.items() if n not in self._gone}
                    self._unsaved = again | self._unsaved
                    self._gone |= gone
                    self._is_writing = False
                if not pause_s:
                    log.warning("%s: alert events wait in memory alone: %s", self.path, error)
                pause_s = min(max(2 * pause_s, self._first_back_off_s), LONGEST_BACK_OFF_S)
                continue
            with self._changed:
                self._is_writing = False
            if pause_s:
                log.warning("%s takes alert events again", self.path)
            pause_s = 0.0
        self._database.close()

    def _write(self, rows: Collection[tuple[str, QueuedAlert]], gone: Collection[int]) -> None:
        """All of it or nothing; may be repeated."""
        with self._database:
            self._database.executemany(
                "DELETE FROM deliveries WHERE number = ?", [(number,) for number in gone]
            )
            self._database.executemany(
                "INSERT OR REPLACE INTO deliveries (receiver, number, body, jpeg)"
                " VALUES (?, ?, ?, ?)",
                [(name, alert.number, alert.body, alert.jpeg) for name, alert in rows],
            )
