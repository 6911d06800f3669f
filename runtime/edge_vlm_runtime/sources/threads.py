"""Threads that read pictures. They are ended before the interpreter is: one that comes out of
FFmpeg while it is taken down would crash the program at its very end."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable

from edge_vlm.pixels.film.opening import end_waits

PATIENCE_S = 3.0
"""For all at the end: a decoder may be at work, or the name of a host be looked up."""

_running: weakref.WeakKeyDictionary[threading.Thread, weakref.WeakMethod[Callable[[], None]]]
_running = weakref.WeakKeyDictionary()


def reading_thread(
    name: str, run: Callable[[], None], close: Callable[[], None]
) -> threading.Thread:
    """One to be started. `close`: a method of whoever owns it, that lets `run` end soon."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    _running[thread] = weakref.WeakMethod(close)
    return thread


@atexit.register
def _end() -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    # One that was just opening a camera may have begun another one.
    while left := [thread for thread in list(_running) if thread.is_alive()]:
        end_waits()
        for thread in left:
            close = _running[thread]()
            if close is not None:
                close()
        left[0].join(min(0.1, max(0.0, deadline_s - time.monotonic())))
        if time.monotonic() > deadline_s:
            return
