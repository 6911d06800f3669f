"""What holds pictures, words or secrets is for its owner alone; recordings have one limit."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_vlm import private_files
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.alert_sinks.queue import DeliveryQueue
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.recording.file import MAGIC
from edge_vlm_runtime.recording.folder import RecordFolder, mark
from edge_vlm_runtime.recording.recorder import Recorder, create
from edge_vlm_runtime.server.access.auth import read_api_key
from edge_vlm_runtime.server.access.tls import self_signed
from edge_vlm_runtime.session.frames import DroppedFrame
from tests.runtime.server.live import TIMEOUT_S
from tests.runtime.session.test_recording import frame, recorder
from tests.runtime.session.viewer import LIMITS, Viewer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="rights of POSIX files")


@pytest.fixture(params=[0o000, 0o022, 0o777], autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def recorded(made: Recorder, name: str = "a1") -> Path:
    log = made.record(name, Viewer().settings, LIMITS, 0)
    log.write(DroppedFrame(frame=frame(1), reason=DropReason.BUSY))
    log.close()
    assert log.wait(TIMEOUT_S)
    return log.path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The umask may take the rights to what tests make themselves."""
    folder = tmp_path / "own"
    folder.mkdir()
    folder.chmod(0o700)
    return folder


def test_recordings(own: Path) -> None:
    made = recorder(own / "recordings")
    path = recorded(made)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert path.read_bytes().startswith(MAGIC)
    file = own / "one.evlm"
    assert recorded(recorder(file)) == file
    assert mode(file) == 0o600


def test_the_alert_queue_and_what_sqlite_keeps_beside_it(own: Path) -> None:
    queue = DeliveryQueue(own / "alerts.db")
    queue.put("receiver", "{}", b"picture")
    files = {path.name: mode(path) for path in own.iterdir()}
    queue.close()
    assert set(files.values()) == {0o600}
    assert len(files) >= 2  # its log


def test_a_made_key(own: Path) -> None:
    made = self_signed(own / "tls", ["localhost"])
    assert (mode(made.key), mode(made.key.parent)) == (0o600, 0o700)


def test_a_picture_that_is_saved_again(own: Path) -> None:
    path = own / "a.jpg"
    path.write_bytes(b"a longer one of before")
    path.chmod(0o644)
    private_files.replace(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
    private_files.replace(own / "b.jpg", b"other")
    assert mode(own / "b.jpg") == 0o600


def test_folders_that_were_there_are_left_as_they_are_and_said(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("recordings", "tls", "alerts"):
        (own / name).mkdir()
        (own / name).chmod(0o755)
    assert mode(recorded(recorder(own / "recordings"))) == 0o600
    self_signed(own / "tls", ["localhost"])
    DeliveryQueue(own / "alerts" / "a.db").close()
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    for name in ("recordings", "tls", "alerts"):
        assert mode(own / name) == 0o755
        wanted = f"{own / name}: other users have rights to it (0755); chmod 700 takes them away"
        assert sum(wanted in text for text in said) == 1
    recorder(own / "mine")
    recorder(own / "mine")  # as it was made
    assert len(said) == len([each for each in caplog.records if each.levelno == logging.WARNING])


def test_files_that_were_there(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    queue = own / "alerts.db"
    DeliveryQueue(queue).close()
    queue.chmod(0o644)  # as earlier versions made it
    DeliveryQueue(queue).close()
    assert mode(queue) == 0o600
    assert f"{queue}: other users had rights to it" in caplog.text
    key = own / "key.txt"
    key.write_text("key")
    key.chmod(0o640)
    assert read_api_key(key) == "key"
    assert f"{key}: other users have rights to it (0640); chmod 600 takes them away" in caplog.text
    with pytest.raises(ConfigError, match="cannot keep alert events here"):
        DeliveryQueue(own)


# ---- the size of all -------------------------------------------------------------------------

SIZE = 100_000
DAY = "2026-01-{:02}T00-00-00Z-{}.evlm"


def finished(folder: Path, day: int, content: bytes = MAGIC, name: str = "a1") -> Path:
    path = folder / DAY.format(day, name)
    private_files.replace(path, content + bytes(SIZE - len(content)))
    return path


def test_the_oldest_recordings_make_room(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    days = [finished(own, day) for day in (3, 1, 2, 4)]
    others = [
        finished(own, 1, b"not a recording", "b2"),
        own / "mine.evlm",
        own / "notes.txt",
        own / "2026-01-01T00-00-00Z-a1.evlm.bak",
    ]
    for path in others[1:]:
        private_files.replace(path, MAGIC + bytes(SIZE))
    link = own / DAY.format(1, "link")
    link.symlink_to(others[1])
    with (own / DAY.format(1, "c3")).open("wb") as elsewhere:  # another process writes it
        private_files.restrict(own / DAY.format(1, "c3"))
        mark(elsewhere)
        elsewhere.write(MAGIC + bytes(SIZE - len(MAGIC)))
        elsewhere.flush()
        made = recorder(own, max_total_bytes=int(4.5 * SIZE))
        new = recorded(made)
        assert [path.exists() for path in days] == [True, False, True, True]
        assert caplog.text.count("is deleted") == 1
        assert str(days[1]) in caplog.text
        assert all(path.exists() for path in (*others, link, own / DAY.format(1, "c3"), new))
    assert new.read_bytes().startswith(MAGIC)


def test_what_is_being_written_is_not_deleted(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = finished(own, 1)
    made = recorder(own, max_total_bytes=2 * SIZE)
    big = DroppedFrame(frame=replace(frame(1), data=bytes(SIZE)), reason=DropReason.BUSY)
    logs = [made.record(name, Viewer().settings, LIMITS, 0) for name in ("a1", "b2")]
    logs[0].write(big)
    deadline = time.monotonic() + TIMEOUT_S
    while not logs[0].path.exists() or logs[0].path.stat().st_size < SIZE:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    logs[1].write(big)
    assert logs[1].wait(TIMEOUT_S)  # it ended
    assert not old.exists()
    sizes = [log.path.stat().st_size for log in logs]
    assert sizes[1] < SIZE < sizes[0]
    assert sum(sizes) <= 2 * SIZE
    made.close(TIMEOUT_S)
    assert caplog.text.count("all of its folder have reached their limit (--record-total)") == 1


def test_a_limit_of_none_deletes_nothing(own: Path) -> None:
    old = [finished(own, day) for day in range(1, 5)]
    folder = RecordFolder(own, 0)
    assert folder.add(own / "x.evlm", 1 << 50)
    assert all(path.exists() for path in old)


def test_a_file_that_is_there_is_not_written_over(own: Path) -> None:
    path = finished(own, 1)
    with pytest.raises(FileExistsError):
        create(path)
    assert path.stat().st_size == SIZE
