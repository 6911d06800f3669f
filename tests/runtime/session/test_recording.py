"""A recorded session done again says what it said; a damaged file says where."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import FrameDecodeError, RecordingError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.recording.file import Entry, Recording, entry_bytes, header_bytes
from edge_vlm_runtime.recording.recorder import MAX_WAITING_BYTES, Recorder, create
from edge_vlm_runtime.recording.replay import Comparison, Replay, beginning_of, same
from edge_vlm_runtime.session.calls import (
    Called,
    CloseCall,
    FrameCall,
    MessageCall,
    StatsCall,
    StepCall,
)
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame, Encoding
from edge_vlm_runtime.session.session import Turn
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.test_connection import fake_table
from tests.runtime.protocol.memory_link import Network, network
from tests.runtime.server.live import TIMEOUT_S, run
from tests.runtime.session.fake_engines import ANSWER, FakeBundle, FakeClock
from tests.runtime.session.viewer import LIMITS, Viewer
from tests.tiny import tiny_bundle

QUESTION = "what colour is the cube ?"


def recorder(path: Path, **options: Any) -> Recorder:
    return Recorder(path=path, bundle=EngineBundle.open(tiny_bundle()), threads=1, **options)


def recorded_session(
    path: Path, number: int, max_bytes: int = 1 << 30, engines: Any = None, **changes: Any
) -> list[protocol.ServerEvent]:
    """A viewer who sends whatever whenever, recorded; what it was told."""
    changes = {"delivery": "live", "fps_cap": 8.0, "max_answer_tokens": 9, **changes}
    clock = FakeClock()
    engines = engines or FakeBundle(clock)
    settings = Viewer(engines, clock, **changes).settings
    made = recorder(path, max_bytes=max_bytes)
    call_log = made.record("session", settings, LIMITS, clock())
    viewer = Viewer(engines, clock, call_log=call_log, **changes)
    _talk(viewer, random.Random(number))
    viewer.close()
    made.close(TIMEOUT_S)
    return viewer.events


def _talk(viewer: Viewer, dice: random.Random) -> None:
    handle = viewer.handle
    for number in range(1, 60):
        frame = EncodedFrame(
            seq=number - (dice.random() < 0.05),
            capture_us=number * 100_000,
            received_ns=viewer.clock(),
            data=b"junk" if dice.random() < 0.1 else jpeg(number % 20),
        )
        action = dice.random()
        if action < 0.6:
            handle.put_frame(frame)
        elif action < 0.65:
            handle.refuse_frame(frame, FrameDecodeError("the message was cut"))
        elif action < 0.8:
            handle.take(protocol.ResponseCreate(text=QUESTION, event_id=str(number)))
        elif action < 0.85:
            handle.take(protocol.ResponseCancel())
        elif action < 0.9:
            ratio = dice.choice([0.3, 0.5, 3.0])
            handle.take(protocol.SessionUpdate(session=protocol.SettingsPatch(keep_ratio=ratio)))
        else:
            viewer.clock.pass_s(dice.random())
        for _ in range(dice.randrange(4)):
            viewer.step()
        handle.after_round()


def replayed(path: Path) -> tuple[list[protocol.ServerEvent], Comparison, Recording]:
    events: list[protocol.ServerEvent] = []
    engines = cast(LoadedBundle, FakeBundle(FakeClock()))
    with Recording.open(path) as recording:
        comparison = Replay(engines, recording, on_event=events.append).run()
    return events, comparison, recording


@pytest.mark.parametrize("seed", range(12))
def test_a_recording_replayed_gives_the_same_events(tmp_path: Path, seed: int) -> None:
    told = recorded_session(tmp_path / "a.evlm", seed)
    events, comparison, recording = replayed(tmp_path / "a.evlm")
    assert (comparison.num_differences, comparison.differences) == (0, [])
    assert comparison.num_events == len(told) == len(events) > 20
    assert recording.cut_off is None

    def comparable(what: list[protocol.ServerEvent]) -> list[str]:
        return [protocol.encode(replace_measured(event)) for event in what]

    assert comparable(events) == comparable(told)
    if seed == 0:  # it was worth recording
        assert any(isinstance(e, protocol.ResponseDone) and e.text == ANSWER for e in told)
        kinds = {type(event) for event in told}
        assert kinds >= {protocol.FrameAccepted, protocol.FrameDropped, protocol.Error}


def test_a_sampled_answer_comes_again(tmp_path: Path) -> None:
    drawn: dict[str, Any] = {
        "temperature": 0.9,
        "top_p": 0.8,
        "seed": 5,
        "max_answer_tokens": 4,
    }
    told = recorded_session(tmp_path / "a.evlm", 0, **drawn)
    events, comparison, _ = replayed(tmp_path / "a.evlm")
    assert (comparison.num_differences, comparison.differences) == (0, [])
    texts = [
        [e.text for e in what if isinstance(e, protocol.ResponseDone) and e.status == "completed"]
        for what in (told, events)
    ]
    assert texts[0] == texts[1]
    assert texts[0]
    assert not any(ANSWER.startswith(text) for text in texts[0])  # they were drawn


def replace_measured(event: protocol.ServerEvent) -> protocol.ServerEvent:
    event.sequence = 0
    if isinstance(event, protocol.FrameAccepted):
        event.stage_ms = {}
    return event


def test_a_replay_that_differs_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.evlm"
    recorded_session(path, 0)
    with Recording.open(path) as recording:
        entries = list(recording.entries())
        header = recording.header
    place, done = next(
        (place, entry)
        for place, entry in enumerate(entries)
        if isinstance(entry, Called) and any(f'"text":"{ANSWER}' in text for text in entry.events)
    )
    wrong = tuple(text.replace(f'"text":"{ANSWER}', '"text":"no') for text in done.events)
    changed = [*entries[:place], replace(done, events=wrong), *entries[place + 1 :]]
    path.write_bytes(header_bytes(header) + b"".join(map(entry_bytes, changed)))
    _, comparison, _ = replayed(path)
    assert comparison.num_differences == 1
    assert "response.done" in comparison.differences[0]
    assert "text" in comparison.differences[0]
    for events, words in (
        (done.events[:-1], "came, but is not in the recording"),
        ((*done.events, done.events[-1]), "did not come"),
    ):
        changed = [*entries[:place], replace(done, events=events), *entries[place + 1 :]]
        path.write_bytes(header_bytes(header) + b"".join(map(entry_bytes, changed)))
        _, comparison, _ = replayed(path)
        assert comparison.num_differences == 1
        assert words in comparison.differences[0]
    path.write_bytes(header_bytes(header) + b"".join(map(entry_bytes, entries[:-8])))
    _, comparison, recording = replayed(path)
    assert comparison.num_differences == 0
    assert recording.cut_off is None  # it just ends early


class Broken(FakeBundle):
    """Has a bug in its vision."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        cast(Any, self.vision).encode = self.fail

    def fail(self, *arguments: object) -> Any:
        raise RuntimeError("a bug of ours")


def test_a_bug_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.evlm"
    told = recorded_session(path, 1, engines=Broken(FakeClock()))
    assert isinstance(told[-1], protocol.Error)
    assert told[-1].error.code == "E-INTERNAL"
    for engines, differs in ((Broken(FakeClock()), False), (FakeBundle(FakeClock()), True)):
        with Recording.open(path) as recording:
            events: list[protocol.ServerEvent] = []
            replay = Replay(cast(LoadedBundle, engines), recording, on_event=events.append)
            comparison = replay.run()
        assert (comparison.num_differences > 0) is differs
        assert (protocol.encode(events[-1]) == protocol.encode(told[-1])) is not differs
    assert "a bug of ours" in caplog.text


def test_a_recording_stops_at_its_limit_and_the_session_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = recorded_session(tmp_path / "whole.evlm", 3)
    size = (tmp_path / "whole.evlm").stat().st_size
    limited = recorded_session(tmp_path / "a.evlm", 3, max_bytes=size // 2)
    assert [type(event) for event in limited] == [type(event) for event in told]
    assert "ends: it has reached" in caplog.text
    assert (tmp_path / "a.evlm").stat().st_size <= size // 2
    _, comparison, recording = replayed(tmp_path / "a.evlm")
    assert comparison.num_differences == 0
    assert recording.cut_off is None


# ---- the file --------------------------------------------------------------------------------


def frame(number: int) -> EncodedFrame:
    return EncodedFrame(
        seq=number,
        capture_us=number * 7,
        received_ns=-5,
        data=bytes([number, 10]) * number,
        encoding=Encoding.RAW if number % 2 else Encoding.JPEG,
    )


COUNTS = st.integers(0, 1 << 62)
FRAMES = st.integers(0, 30).map(frame)
CALLS = st.one_of(
    st.builds(FrameCall, frame=FRAMES, frames_waiting=COUNTS),
    st.builds(
        MessageCall,
        message=st.builds(protocol.ResponseCreate, text=st.text(max_size=20)),
        received_ns=COUNTS,
        video_s=st.floats(0, 1e6),
        frames_waiting=COUNTS,
    ),
    st.builds(StepCall, turn=st.sampled_from(Turn), frames_waiting=COUNTS),
    st.builds(
        StatsCall,
        frames_received=COUNTS,
        frames_dropped=st.dictionaries(st.sampled_from(["busy", "rate"]), COUNTS),
    ),
    st.just(CloseCall()),
)
TEXTS = st.lists(st.text(max_size=20), max_size=3).map(tuple)
CALLED = st.builds(Called, call=CALLS, now_ns=COUNTS, done_ns=COUNTS, events=TEXTS)
DROPPED = st.builds(
    DroppedFrame,
    frame=FRAMES,
    reason=st.sampled_from(DropReason),
    code=st.none() | st.text(max_size=9),
    message=st.none() | st.text(max_size=9),
)
ENTRIES = st.lists(st.one_of(CALLED, DROPPED), max_size=8)


def read(path: Path) -> tuple[list[Entry], str | None]:
    with Recording.open(path) as recording:
        return list(recording.entries()), recording.cut_off


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recording") / "a.evlm"


@given(entries=ENTRIES, data=st.data())
def test_a_file_is_good_up_to_its_last_whole_entry(
    file: Path, entries: list[Entry], data: st.DataObject
) -> None:
    head = header_bytes({"threads": 1})
    pieces = [entry_bytes(entry) for entry in entries]
    whole = head + b"".join(pieces)
    file.write_bytes(whole)
    assert read(file) == (entries, None)
    ends = [len(head)]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    cut = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:cut])
    if cut < len(head):
        with pytest.raises(RecordingError):
            read(file)
        return
    num_whole = sum(end <= cut for end in ends) - 1
    found, note = read(file)
    assert found == entries[:num_whole]
    if cut in ends:
        assert note is None
    else:
        assert note is not None
        assert str(cut - ends[num_whole]) in note


@given(data=st.data())
def test_damage_is_a_typed_error_that_says_where(file: Path, data: st.DataObject) -> None:
    entries: list[Entry] = [
        Called(call=FrameCall(frame=frame(9), frames_waiting=1), now_ns=1, done_ns=2, events=()),
        DroppedFrame(frame=frame(10), reason=DropReason.BUSY),
        Called(call=CloseCall(), now_ns=3, done_ns=4, events=("{}",)),
    ]
    whole = bytearray(header_bytes({"threads": 1}) + b"".join(map(entry_bytes, entries)))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(whole))
    try:
        found, note = read(file)
    except RecordingError as error:
        assert str(file) in str(error)
    else:  # a length became larger than the rest of the file
        assert note is not None
        assert len(found) < len(entries)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a recording"),
        (b"hello, world, this is text", "not a recording"),
        (b"EVLMREC\x01" + bytes(40), "format 1, this version reads 2"),
        (b"EVLMREC\x02", "cut off in its header"),
    ],
)
def test_files_that_are_no_recordings(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.evlm"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=words), Recording.open(path):
        pass
    missing = tmp_path / "nothing.evlm"
    with pytest.raises(RecordingError, match="cannot be read"), Recording.open(missing):
        pass


def test_where_nothing_can_be_recorded_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "folder", tmp_path / "file" / "a.evlm"):
        with pytest.raises(RecordingError, match="cannot be written"):
            recorder(path)
    (tmp_path / "a.evlm").write_bytes(b"")
    with pytest.raises(RecordingError, match="already"):
        recorder(tmp_path / "a.evlm")
    folder = tmp_path / "new" / "one"
    recorder(folder)
    assert list(folder.iterdir()) == []


def test_a_file_holds_one_session_and_a_folder_many(tmp_path: Path) -> None:
    settings = Viewer().settings
    single = recorder(tmp_path / "a.evlm")
    single.record("one", settings, LIMITS, 0)
    with pytest.raises(RecordingError, match="has its session already"):
        single.record("two", settings, LIMITS, 0)
    single.close(TIMEOUT_S)
    many = recorder(tmp_path / "all")
    for name in ("one", "two"):
        many.record(name, settings, LIMITS, 0)
    many.close(TIMEOUT_S)
    assert len(list((tmp_path / "all").iterdir())) == 2


def test_headers_of_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "a.evlm"
    for header in (
        {},
        {"settings": {"fps": 1}, "limits": {}},
        {"settings": 3, "limits": 4, "now_ns": 5},
    ):
        path.write_bytes(header_bytes(header))
        with Recording.open(path) as recording, pytest.raises(RecordingError, match="settings"):
            beginning_of(recording)
    path.write_bytes(
        header_bytes({"settings": {}, "limits": {"max_sessions": 2, "gone": 1}, "now_ns": 7})
    )
    with Recording.open(path) as recording:
        assert beginning_of(recording)[1] == replace(ServerLimits(), max_sessions=2)


def test_what_counts_as_the_same() -> None:
    assert same({"a": [1.0, {"b": "x"}]}, {"a": [1.0 + 1e-9, {"b": "x"}]})
    assert same(2, 2.0)
    assert same(None, None)
    for one, other in ((1.0, 1.1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (1.0, "1"), (None, 0.0)):
        assert not same(one, other)


class Entries:
    """A recording in memory."""

    def __init__(self) -> None:
        self.found: list[Entry] = []

    def write(self, entry: Entry) -> None:
        self.found.append(entry)

    def close(self) -> None:
        pass


def test_idle_polls_leave_no_trace() -> None:
    entries = Entries()
    viewer = Viewer(call_log=entries)
    viewer.show(1, 2)
    viewer.ask()
    viewer.run()
    num_entries = len(entries.found)
    assert num_entries > 2
    for _ in range(5):
        assert not viewer.step()
    viewer.handle.after_round()
    assert len(entries.found) == num_entries


# ---- a disk that is slow, full or stuck --------------------------------------------------------


class Disk:
    """Takes bytes when it is let, or fails."""

    def __init__(self) -> None:
        self.has_opened = threading.Event()
        self.may_write = threading.Event()
        self.error: OSError | None = None

    def open_file(self, path: Path) -> BinaryIO:
        file = create(path)
        self.has_opened.set()
        return cast(BinaryIO, DiskFile(self, file))


class DiskFile:
    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk = disk
        self._file = file

    def write(self, data: bytes) -> int:
        assert self._disk.may_write.wait(TIMEOUT_S)
        if self._disk.error is not None:
            raise self._disk.error
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def test_a_stuck_disk_stops_neither_the_loop_nor_the_engines(tmp_path: Path) -> None:
    """The whole conversation is over before the disk has taken its first byte."""
    disk = Disk()
    made = recorder(tmp_path, open_file=disk.open_file)

    async def session(network: Network) -> None:
        client = await Client.connect("ws://memory/v1/realtime", {"delivery": "wait"})
        for number in range(1, 5):
            await client.send_frame(jpeg(number), number * 500_000)
        assert (await client.ask(QUESTION)).text == ANSWER
        await client.wait_processed()
        await client.close()
        await network.settle()

    with fake_table(recorder=made) as table, network(table) as connected:
        run(session(connected))
        assert disk.has_opened.wait(TIMEOUT_S)  # on the recorder's own thread
        (path,) = tmp_path.iterdir()
        assert path.stat().st_size == 0
    disk.may_write.set()
    made.close(TIMEOUT_S)
    events, comparison, recording = replayed(path)
    assert comparison.num_differences == 0, comparison.differences
    assert comparison.num_events == len(events) >= 12
    assert recording.cut_off is None
    assert any(isinstance(e, protocol.ResponseDone) and e.text == ANSWER for e in events)


def test_a_full_disk_ends_the_recording_and_not_the_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    disk.error = OSError(28, "No space left on device")
    disk.may_write.set()
    made = recorder(tmp_path, open_file=disk.open_file)
    viewer = Viewer(call_log=made.record("session", Viewer().settings, LIMITS, 0))
    viewer.show(1, 2)
    viewer.ask()
    viewer.run()
    viewer.close()
    made.close(TIMEOUT_S)
    assert viewer.of(protocol.ResponseDone)[0].text == ANSWER
    assert "No space left on device" in caplog.text


def test_what_waits_for_the_disk_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    made = recorder(tmp_path, open_file=disk.open_file)
    log = made.record("session", Viewer().settings, LIMITS, 0)
    size = 1 << 20
    for number in range(MAX_WAITING_BYTES // size + 10):
        big = replace(frame(1), seq=number, data=bytes(size))
        log.write(DroppedFrame(frame=big, reason=DropReason.BUSY))
    assert caplog.text.count("the disk is too slow") == 1
    disk.may_write.set()
    made.close(TIMEOUT_S)
    (path,) = tmp_path.iterdir()
    entries, cut_off = read(path)
    assert len(entries) == (MAX_WAITING_BYTES - 1) // (size + 1000)
    assert cut_off is None


def test_a_disk_that_never_comes_back_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    made = recorder(tmp_path, open_file=disk.open_file)
    made.record("session", Viewer().settings, LIMITS, 0)
    made.close(timeout_s=0.0)
    assert "the disk is stuck" in caplog.text
    disk.may_write.set()
