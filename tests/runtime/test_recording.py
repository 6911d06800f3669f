"""A recorded session done again says what it said; a damaged file says where."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import EdgeVlmError, FrameDecodeError, RecordingError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.worker import EngineWorker, SessionHandle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.recording.file import (
    Entry,
    Event,
    Op,
    Recording,
    Refused,
    SlotTouch,
    entry_bytes,
    header_bytes,
)
from edge_vlm_runtime.recording.recorder import Recorder, Tape
from edge_vlm_runtime.recording.replay import Comparison, Replay, same, settings_of
from edge_vlm_runtime.session.budget import default_settings
from edge_vlm_runtime.session.frames import EncodedFrame
from tests.runtime.fake_engines import ANSWER, FakeBundle, FakeClock
from tests.runtime.live import TIMEOUT_S
from tests.runtime.pictures import jpeg
from tests.tiny import tiny_bundle

QUESTION = "what colour is the cube ?"


def recorded_session(
    path: Path, number: int, max_bytes: int = 1 << 30, **changes: Any
) -> list[protocol.ServerEvent]:
    """A viewer who sends whatever whenever, recorded; what it was told."""
    clock = FakeClock()
    engines = cast(LoadedBundle, FakeBundle(clock))
    limits = ServerLimits(max_queued_questions=3)
    settings = default_settings(cast(Any, engines.bundle), limits).changed(
        {"delivery": "live", "fps_cap": 8.0, "max_answer_tokens": 9, **changes}
    )
    recorder = Recorder(
        path=path, bundle=EngineBundle.open(tiny_bundle()), threads=1, max_bytes=max_bytes
    )
    tape = recorder.tape("session", settings, limits)
    worker = EngineWorker(engines, limits, clock)
    events: list[protocol.ServerEvent] = []
    opened, closed = threading.Event(), threading.Event()
    handles: list[SessionHandle | EdgeVlmError] = []

    def on_open(result: SessionHandle | EdgeVlmError) -> None:
        handles.append(result)
        opened.set()

    worker.start()
    try:
        worker.open_session(settings, events.append, on_open, lambda: None, tape)
        assert opened.wait(TIMEOUT_S)
        handle = handles[0]
        assert isinstance(handle, SessionHandle)
        _talk(handle, clock, random.Random(number))
        worker.close_session(handle, closed.set)
        assert closed.wait(TIMEOUT_S)
    finally:
        worker.stop()
    return events


def _talk(handle: SessionHandle, clock: FakeClock, dice: random.Random) -> None:
    for number in range(1, 60):
        frame = EncodedFrame(
            sequence=number - (dice.random() < 0.05),
            capture_time_us=number * 100_000,
            jpeg=b"junk" if dice.random() < 0.1 else jpeg(number % 20),
            received_ns=clock(),
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
            clock.pass_s(dice.random())
        if dice.random() < 0.4:
            time.sleep(dice.random() * 2e-3)


def replayed(path: Path) -> tuple[list[protocol.ServerEvent], Comparison, Recording]:
    events: list[protocol.ServerEvent] = []
    engines = cast(LoadedBundle, FakeBundle(FakeClock()))
    with Recording.open(path) as recording:
        comparison = Replay(engines, recording, emit=events.append).run()
    return events, comparison, recording


@pytest.mark.parametrize("seed", range(12))
def test_a_recording_replayed_gives_the_same_events(tmp_path: Path, seed: int) -> None:
    told = recorded_session(tmp_path / "a.evlm", seed)
    events, comparison, recording = replayed(tmp_path / "a.evlm")
    assert (comparison.num_differences, comparison.differences) == (0, [])
    assert comparison.num_events == len(told) == len(events) > 20
    assert recording.cut_off is None

    def in_order(what: list[protocol.ServerEvent]) -> list[str]:
        """Without those that another thread told."""
        return [
            protocol.encode(replace_measured(event))
            for event in what
            if not isinstance(event, protocol.FrameDropped)
        ]

    assert in_order(events) == in_order(told)
    dropped = [
        sorted(protocol.encode(e) for e in what if isinstance(e, protocol.FrameDropped))
        for what in (events, told)
    ]
    assert dropped[0] == dropped[1]
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
    assert texts[0] == texts[1] and texts[0]
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
    changed = False
    for op in (entry for entry in entries if isinstance(entry, Op)):
        for index, inner in enumerate(op.during):
            if isinstance(inner, Event) and '"text":"' + ANSWER in inner.text and not changed:
                op.during[index] = Event(inner.text.replace("is there", "there is"))
                changed = True
    assert changed
    path.write_bytes(header_bytes(header) + b"".join(map(entry_bytes, entries)))
    _, comparison, _ = replayed(path)
    assert comparison.num_differences == 1
    assert "response.done" in comparison.differences[0] and "text" in comparison.differences[0]
    path.write_bytes(header_bytes(header) + b"".join(map(entry_bytes, entries[:-8])))
    _, comparison, recording = replayed(path)
    assert recording.cut_off is None  # it just ends early


def test_a_bug_comes_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.evlm"
    recorded_session(path, 1)

    class Broken(FakeBundle):
        def __init__(self) -> None:
            super().__init__(FakeClock())
            cast(Any, self.vision).encode = self.fail

        def fail(self, *arguments: object) -> Any:
            raise RuntimeError("a bug of ours")

    with Recording.open(path) as recording:
        comparison = Replay(cast(LoadedBundle, Broken()), recording, emit=lambda event: None).run()
    assert "a bug of ours" in caplog.text
    assert any("error" in line for line in comparison.differences)


def test_a_recording_stops_at_its_limit_and_the_session_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = recorded_session(tmp_path / "whole.evlm", 3)
    size = (tmp_path / "whole.evlm").stat().st_size
    limited = recorded_session(tmp_path / "a.evlm", 3, max_bytes=size // 2)
    assert (
        isinstance(limited[-1], (protocol.FrameDropped, protocol.ResponseDone, protocol.Error))
        or len(limited) > len(told) // 2
    )
    assert "ends: it has reached" in caplog.text
    assert (tmp_path / "a.evlm").stat().st_size <= size // 2
    _, comparison, recording = replayed(tmp_path / "a.evlm")
    assert comparison.num_differences == 0 and recording.cut_off is None


# ---- the file --------------------------------------------------------------------------------


def frame(number: int) -> EncodedFrame:
    return EncodedFrame(
        sequence=number, capture_time_us=number * 7, jpeg=bytes([number]) * number, received_ns=-5
    )


FRAMES = st.integers(0, 30).map(frame)
EVENTS = st.text(max_size=20).map(Event)
INNER = st.one_of(FRAMES, EVENTS, st.sampled_from(["take", "len"]).map(SlotTouch))
OPS = st.builds(
    Op,
    st.sampled_from(["answer", "watch", "message"]),
    st.lists(st.integers(0, 1 << 62), max_size=4),
    st.none() | st.text(max_size=10),
    st.none() | st.integers(0, 1 << 62),
    st.lists(INNER, max_size=4),
)
ENTRIES = st.lists(
    st.one_of(FRAMES, EVENTS, OPS, st.builds(Refused, FRAMES, st.text(max_size=9))), max_size=8
)


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
        assert note is not None and str(cut - ends[num_whole]) in note


@given(data=st.data())
def test_damage_is_a_typed_error_that_says_where(file: Path, data: st.DataObject) -> None:
    entries: list[Entry] = [frame(9), Op("watch", [1, 2], during=[Event("{}")]), Event("{}")]
    whole = bytearray(header_bytes({"threads": 1}) + b"".join(map(entry_bytes, entries)))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(whole))
    try:
        found, note = read(file)
    except RecordingError as error:
        assert str(file) in str(error)
    else:  # a length became larger than the rest of the file
        assert note is not None and len(found) < len(entries)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a recording"),
        (b"hello, world, this is text", "not a recording"),
        (b"EVLMREC\x02" + bytes(40), "format 2"),
        (b"EVLMREC\x01", "cut off in its header"),
    ],
)
def test_files_that_are_no_recordings(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.evlm"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=words):
        Recording.open(path)
    with pytest.raises(RecordingError, match="cannot be read"):
        Recording.open(tmp_path / "nothing.evlm")


def test_a_recording_does_not_overwrite_and_says_what_it_cannot_write(tmp_path: Path) -> None:
    tape = Tape(tmp_path / "new" / "a.evlm", {}, 1000)
    tape.close()
    with pytest.raises(RecordingError, match="already"):
        Tape(tmp_path / "new" / "a.evlm", {}, 1000)
    with pytest.raises(RecordingError, match="cannot be written"):
        Tape(tmp_path / "new" / "a.evlm" / "b.evlm", {}, 1000)


def test_headers_of_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "a.evlm"
    for header in ({}, {"settings": {"fps": 1}, "limits": {}}, {"settings": 3, "limits": 4}):
        path.write_bytes(header_bytes(header))
        with Recording.open(path) as recording, pytest.raises(RecordingError, match="settings"):
            settings_of(recording)
    path.write_bytes(header_bytes({"settings": {}, "limits": {"max_sessions": 2, "gone": 1}}))
    with Recording.open(path) as recording:
        assert settings_of(recording)[1] == replace(ServerLimits(), max_sessions=2)


def test_what_counts_as_the_same() -> None:
    assert same({"a": [1.0, {"b": "x"}]}, {"a": [1.0 + 1e-9, {"b": "x"}]})
    assert same(2, 2.0) and same(None, None)
    for one, other in ((1.0, 1.1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (1.0, "1"), (None, 0.0)):
        assert not same(one, other)


def parts(entries: list[Entry]) -> Iterator[object]:
    for entry in entries:
        yield entry
        if isinstance(entry, Op):
            yield from entry.during


def test_idle_polls_leave_no_trace(tmp_path: Path) -> None:
    recorded_session(tmp_path / "a.evlm", 5)
    entries, _ = read(tmp_path / "a.evlm")
    assert not any(
        isinstance(e, Op) and e.name in ("answer", "watch") and not e.during for e in entries
    )
    assert sum(isinstance(part, EncodedFrame) for part in parts(entries)) > 20
