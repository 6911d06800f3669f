"""Pictures that take long to decode, decoded beside the engine thread: one at a time, in the order
in which they came, and after everything else that wants the processor.

A session hands over one picture at a time, so nobody's pictures keep those of others waiting long.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from edge_vlm_runtime.session.frames import EncodedFrame

log = logging.getLogger(__name__)

NICENESS = 5
Done = Callable[[EncodedFrame], None]


class PictureThread:
    """One for each engine thread. Begins with the first picture."""

    def __init__(self, max_evidence_bytes: int) -> None:
        self._max_evidence_bytes = max_evidence_bytes
        self._waiting: SimpleQueue[tuple[EncodedFrame, Done] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def decode(self, frame: EncodedFrame, done: Done) -> None:
        """`done` gets the frame with what came of it, on this thread; it must not block. Called
        from one thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="edge-vlm-pictures", daemon=True)
            self._thread.start()
        self._waiting.put((frame, done))

    def stop(self) -> None:
        """Returns when the picture under way is done. Those that wait are left."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        while not self._waiting.empty():
            self._waiting.get()
        self._waiting.put(None)
        thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere threads have no priority of their own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while (item := self._waiting.get()) is not None:
            frame, done = item
            try:
                done(frame.decoded_ahead(self._max_evidence_bytes))
            except Exception:  # the session decodes it itself, and fails in its own way
                log.exception("a picture could not be decoded beside the engines")
                done(frame)
