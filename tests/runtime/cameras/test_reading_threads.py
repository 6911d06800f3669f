"""A program ends while its threads still read pictures."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.runtime.server.live import TIMEOUT_S

PROGRAM = """
    import threading, time, types
    from edge_vlm_runtime.sources import threads
    from edge_vlm_runtime.sources.threads import reading_thread

    class Reader:
        def __init__(self, deaf):
            self.closed, self.ended, self.deaf = threading.Event(), threading.Event(), deaf

        def close(self):
            self.closed.set()

        def read(self):
            while self.deaf or not self.closed.wait(0.01):
                time.sleep(0.01)
            time.sleep(0.1)
            print("the reader has ended\\n", end="", flush=True)
            self.ended.set()

    readers = [Reader(False), Reader(True)][:{count}]
    # Time stands still until the one that ends has ended; then patience is at its end.
    threads.time = types.SimpleNamespace(monotonic=lambda: 1e9 * readers[0].ended.is_set())
    for reader in readers:
        reading_thread("r", reader.read, reader.close).start()
    print("the program ends\\n", end="", flush=True)
"""


def lines_of(count: int) -> list[str]:
    program = textwrap.dedent(PROGRAM).replace("{count}", str(count))
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_the_interpreter_waits_for_those_that_end() -> None:
    assert lines_of(1) == ["the program ends", "the reader has ended"]


def test_one_that_does_not_end_holds_nobody() -> None:
    assert lines_of(2) == ["the program ends", "the reader has ended"]


SILENT = """
    import socket
    from edge_vlm.errors import VideoError
    from edge_vlm_runtime.sources import addresses, threads
    from edge_vlm_runtime.sources.addresses import open_camera

    threads.PATIENCE_S = addresses.OPEN_TIMEOUT_S = 1e4  # far more than the test waits
    silent = socket.create_server(("127.0.0.1", 0))

    class Reader:
        def close(self):
            pass

        def read(self):
            try:
                open_camera(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/live")
            except VideoError as error:
                print("not opened\\n", end="", flush=True)

    reader = Reader()
    threads.reading_thread("r", reader.read, reader.close).start()
    line, _ = silent.accept()  # dropped, it would be hung up
    print("the program ends\\n", end="", flush=True)
"""


def test_nobody_waits_inside_ffmpeg_for_a_camera_that_says_nothing() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SILENT)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["the program ends", "not opened"]
