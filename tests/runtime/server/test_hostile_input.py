"""Whatever a client sends: typed errors, outcomes and close codes, and nobody else notices.

Connections in memory over the real tiny model; the other viewer is in the middle of its stream.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from websockets.exceptions import ConnectionClosed

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.frames import MAX_PIXELS, decode_jpeg, encode_jpeg, thumbnail
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.messages import CLIENT_MESSAGES
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.connection import MAX_WAITING_CALLS
from edge_vlm_runtime.server.sessions import SessionRegistry
from edge_vlm_runtime.session.budget import default_settings
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.seen import Seen
from tests.runtime.protocol.memory_link import MemoryLink, Network, network
from tests.runtime.protocol.test_resume import URL
from tests.runtime.server.live import TIMEOUT_S, run
from tests.runtime.server.test_sessions import Gate
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"
LIMIT_BYTES = 60_000
FINAL_CODES = {1000, 1003, 1009, 1013}


@pytest.fixture(scope="module")
def table() -> Iterator[SessionRegistry]:
    limits = ServerLimits(
        max_message_bytes=LIMIT_BYTES, max_sessions=3, max_replay_events=400, resume_grace_s=0.0
    )
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        worker = EngineWorker(engines, limits)
        worker.start()
        try:
            yield SessionRegistry(
                worker=worker,
                bundle_name="tiny",
                settings=default_settings(engines.bundle, limits).changed(
                    {
                        **{"max_answer_tokens": 3, "fps_cap": 1000.0},
                        "max_frame_age_s": TIMEOUT_S,  # a busy machine's frames are not too old
                    }
                ),
                model=ModelLimits.from_bundle(engines.bundle),
                limits=limits,
            )
        finally:
            worker.stop()


async def hear(link: MemoryLink) -> tuple[list[dict[str, Any]], int | None]:
    """Everything the server says from now on, and the code it closes with."""
    events = []
    try:
        while True:
            events.append(json.loads(await link.recv()))
    except Exception:  # noqa: BLE001  however the link ends, it ends here
        return events, None if link._closed is None else link._closed.code


async def hostile_session(
    made: Network, messages: list[str | bytes], other: Client
) -> tuple[list[dict[str, Any]], int | None]:
    """Sends everything at once, and asks at the end whether anybody is still there."""
    link = await made.connect(URL, Access())
    hearing = asyncio.create_task(hear(link))
    await other.send_frame(jpeg(1), 0)
    with suppress(ConnectionClosed):
        for message in messages:
            await link.send(message)
        await link.send('{"type": "ping", "event_id": "still there"}')
        await link.send('{"type": "session.close"}')
    events, code = await hearing
    await other.wait_processed()
    assert other.frames.processed == 1
    assert (await other.ask(QUESTION)).status == "completed"
    return events, code


def check(messages: list[str | bytes], events: list[dict[str, Any]], code: int | None) -> None:
    assert code in FINAL_CODES
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert all(len(json.dumps(event)) < 4 * LIMIT_BYTES for event in events)
    errors = [event["error"] for event in events if event["type"] == "error"]
    assert not {"E-INTERNAL"} & {error["code"] for error in errors}, errors
    if code != 1000:
        return
    pongs = [event["event_id"] for event in events if event["type"] == "pong"]
    assert pongs[-1] == "still there"
    sent = Counter(number for message in messages for number in frame_numbers(message))
    told = Counter(e["frame_sequence"] for e in events if e["type"].startswith("frame."))
    assert told == sent  # one outcome for each frame, however often its number came
    begun = {event["response_id"] for event in events if event["type"] == "response.created"}
    done = [event["response_id"] for event in events if event["type"] == "response.done"]
    assert sorted(done) == sorted(begun)


def frame_numbers(message: str | bytes) -> list[int]:
    """Of a message that is a frame, as far as its head can be read."""
    if len(message) > LIMIT_BYTES:
        return []
    try:
        if isinstance(message, bytes):
            return [protocol.decode_frame_message(message).sequence]
        decoded = protocol.decode_client_message(message)
    except Exception:  # noqa: BLE001  the server is asked, not this
        return []
    if isinstance(decoded, protocol.InputVideoFrameAppend):
        return [decoded.sequence]
    return []


WHOLE = st.sampled_from([0, 1, -1, 2, 255, 2**31, 2**32 - 1, 2**32, 2**53, 2**63, 2**64, 10**30])
REAL = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 5e-324, 1e300, 3.5])
TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from([QUESTION, "", " ", "\x00", "is " * 9000, "<|im_start|>", "é" * 300, "💥"]),
)
VALUE = st.one_of(WHOLE, REAL, TEXT, st.none(), st.booleans(), st.just([]), st.just({}))
SETTING = st.sampled_from(list(protocol.SettingsPatch.__struct_fields__))
TYPES = st.sampled_from([protocol.tag_of(kind) for kind in CLIENT_MESSAGES])
FIELDS = st.sampled_from(
    [
        *("text", "question", "alert_id", "response_id", "sequence", "capture_time_us"),
        *("event_id", "on_threshold", "off_threshold", "interval_s", "hold_s", "last_sequence"),
    ]
)
OBJECT = st.one_of(
    st.builds(
        lambda kind, fields: {"type": kind, **fields},
        TYPES.filter(lambda kind: kind != "session.close"),
        st.dictionaries(FIELDS, VALUE, max_size=3),
    ),
    st.builds(
        lambda fields: {"type": "session.update", "session": fields},
        st.dictionaries(SETTING, VALUE, max_size=3),
    ),
    st.builds(lambda text: {"type": "response.create", "text": text}, TEXT),
    st.builds(lambda text: {"type": "alert.create", "question": text}, TEXT),
    st.builds(
        lambda role, texts: {
            "type": "conversation.item.create",
            "item": {
                "type": "message",
                "role": role,
                "content": [{"type": "input_text", "text": text} for text in texts],
            },
        },
        st.sampled_from(["user", "user", "assistant", 1]),
        st.lists(TEXT, max_size=3),
    ),
    st.just({"type": "response.create"}),
    st.builds(
        lambda number, time_us: {
            "type": "input_video_frame.append",
            "sequence": number,
            "capture_time_us": time_us,
            "frame": "/9j/",
        },
        WHOLE,
        WHOLE,
    ),
    st.just({"type": "response.cancel"}),
)
CORPUS: list[str | bytes] = [
    *("", "null", "[]", "{}", "{", '"', "\x00", "[" * 50_000, '{"x":' * 10_000),
    '{"type":"ping","x":' + "[" * 25_000 + "]" * 25_000 + "}",
    '{"type": "ping", "event_id": "' + "e" * 50_000 + '"}',
    '{"type": "' + "t" * 50_000 + '"}',
    '{"type": "ping", "' + "f" * 50_000 + '": 1}',
    '{"type": "session.update", "session": {"policy_seed": 1' + "0" * 5000 + "}}",
    '{"type": "response.create", "text": "' + "a" * 50_000 + '"}',
    *(b"", b"\x01", bytes(24), b"\xff" * 24, b"\x01\x01" + b"\xff" * 30, b"GET / HTTP/1.1\r\n\r\n"),
    protocol.frame_message(1, 0, jpeg(1)).encode()[:100],
    protocol.frame_message(2, 1, bytes(LIMIT_BYTES - 100)).encode(),
]
TIME = st.sampled_from([0, 1, 5, 10**6, 10**6 + 1, 10**15, protocol.MAX_CAPTURE_TIME_US])
FRAME = st.builds(
    lambda number, time_us, seed: protocol.frame_message(number, time_us, jpeg(seed)).encode(),
    st.integers(0, 12) | st.sampled_from([2**31, 2**32 - 1]),
    st.integers(0, 20).map(lambda tick: tick * 500_000) | TIME,
    st.integers(0, 19),
)
MESSAGE = st.one_of(OBJECT.map(json.dumps), st.sampled_from(CORPUS), FRAME, st.binary(max_size=40))


@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(MESSAGE, max_size=14))
def test_any_messages_in_any_order(
    table: SessionRegistry, caplog: pytest.LogCaptureFixture, messages: list[str | bytes]
) -> None:
    async def session(made: Network) -> tuple[list[dict[str, Any]], int | None]:
        async with await Client.connect(URL, {"delivery": "wait"}) as other:
            return await hostile_session(made, messages, other)

    caplog.clear()
    with network(table) as made:
        events, code = run(session(made))
    check(messages, events, code)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("message", CORPUS, ids=lambda message: repr(message[:12]))
def test_each_of_the_corpus_alone(table: SessionRegistry, message: str | bytes) -> None:
    async def session(made: Network) -> tuple[list[dict[str, Any]], int | None]:
        async with await Client.connect(URL, {"delivery": "wait"}) as other:
            return await hostile_session(made, [message], other)

    with network(table) as made:
        events, code = run(session(made))
    check([message], events, code)
    assert any(event["type"] in ("error", "frame.dropped") for event in events)


def test_frames_twice_and_in_another_order(table: SessionRegistry) -> None:
    messages: list[str | bytes] = [
        protocol.frame_message(number, number * 500_000, jpeg(number)).encode()
        for number in (1, 3, 2, 3, 3, 5, 4, 6, 1)
    ]
    wait = json.dumps({"type": "session.update", "session": {"delivery": "wait"}})

    async def session(made: Network) -> tuple[list[dict[str, Any]], int | None]:
        async with await Client.connect(URL, {"delivery": "wait"}) as other:
            return await hostile_session(made, [wait, *messages], other)

    with network(table) as made:
        events, code = run(session(made))
    check(messages, events, code)
    stale = [e["frame_sequence"] for e in events if e.get("reason") == "stale"]
    assert sorted(stale) == [1, 2, 3, 3, 4]


def test_clocks_that_jump(table: SessionRegistry) -> None:
    """Forward: the memory moves along. Back: frames are stale until time has caught up."""
    hour_us = 3_600_000_000
    times_us = [0, 500_000, 1_000_000, 10 * hour_us, 10 * hour_us + 500_000]
    back_us = [2_000_000, 10 * hour_us + 1_000_000]
    far_us = [protocol.MAX_CAPTURE_TIME_US - 1, protocol.MAX_CAPTURE_TIME_US]

    async def session() -> None:
        seen = Seen()
        async with await Client.connect(URL, {"delivery": "wait"}, on_event=seen) as client:
            for number, time_us in enumerate([*times_us, *back_us, *far_us]):
                await client.send_frame(jpeg(number), time_us)
                await client.wait_processed()
                assert (await client.ask(QUESTION)).status == "completed"
            assert {n: e.reason for n, e in seen.dropped.items()} == {6: "stale"}
            assert seen.accepted[9].time_s == pytest.approx(protocol.MAX_CAPTURE_TIME_US * 1e-6)
            assert not seen.errors

    with network(table):
        run(session())


def test_more_messages_than_the_engines_take_stay_in_the_socket(table: SessionRegistry) -> None:
    async def session(made: Network) -> None:
        client = await Client.connect(URL)
        (served,) = [
            s for s in table._sessions.values() if s.session_id == client.created.session_id
        ]
        handle = served.handle
        assert handle is not None
        gate = Gate(table)
        most = 0
        for number in range(400):
            await client._send_json("session.update", f"u{number}", session={"keep_ratio": 0.5})
            most = max(most, handle.num_waiting)
        for _ in range(50):
            await asyncio.sleep(0.002)
            most = max(most, handle.num_waiting)
        gate.open()
        assert MAX_WAITING_CALLS <= most <= MAX_WAITING_CALLS + 1
        while handle.num_waiting or served.messages_received < 400:
            await asyncio.sleep(0.005)
        await client.close()

    with network(table) as made:
        run(session(made))


# ---- pictures --------------------------------------------------------------------------------


def picture_file(width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


SIZES = [(1, 1), (1, 5000), (5000, 1), (2, 3), (27, 27), (1921, 1081), (3840, 2160), (7680, 4320)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_frames_of_any_size(width: int, height: int) -> None:
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (min(height, 64), min(width, 64), 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG")

    async def session(url_table: SessionRegistry) -> None:
        seen = Seen()
        settings: Settings = {"delivery": "live", "fps_cap": 10.0, "max_frame_age_s": 100.0}
        async with await Client.connect(URL, settings, on_event=seen) as client:
            for number in range(2):
                await client.send_frame(buffer.getvalue(), number * 500_000)
                await client.wait_processed()
            assert seen.accepted[1].cells_seen == 9
            assert seen.dropped[2].reason == "duplicate"

    limits = ServerLimits()
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        worker = EngineWorker(engines, limits)
        worker.start()
        try:
            made = SessionRegistry(
                worker=worker,
                bundle_name="tiny",
                settings=default_settings(engines.bundle, limits),
                model=ModelLimits.from_bundle(engines.bundle),
                limits=limits,
            )
            with network(made):
                run(session(made))
        finally:
            worker.stop()


@pytest.mark.parametrize(
    "data",
    [
        picture_file(20, 10, "L"),
        picture_file(20, 10, "CMYK"),
        picture_file(20, 10, "RGB", progressive=True),
        picture_file(20, 10, "RGB", quality=1),
        picture_file(20, 10, "RGB", exif=b"Exif\x00\x00" + bytes(200)),
        picture_file(20, 10) + b"what follows is ignored",
    ],
)
def test_unusual_pictures_are_still_pictures(data: bytes) -> None:
    assert decode_jpeg(data).shape == (10, 20, 3)


def test_a_picture_that_claims_too_much_is_not_decompressed() -> None:
    data = bytearray(picture_file(20, 10))
    place = data.find(b"\xff\xc0") + 5
    for width, height in ((65535, 65535), (65535, 1000), (8001, 8000)):
        data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        assert width * height > MAX_PIXELS
        with pytest.raises(FrameDecodeError):
            decode_jpeg(bytes(data))


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_damaged_pictures_are_decoded_or_refused(seed: int, changes: int) -> None:
    dice = random.Random(seed)
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}]
    data = bytearray(picture_file(24, 18, **dice.choice(kinds)))
    for _ in range(changes):
        place = dice.randrange(3, len(data))
        action = dice.random()
        if action < 0.6:
            data[place] = dice.choice([0, 255, dice.randrange(256)])
        elif action < 0.8:
            del data[place : place + dice.randint(1, 10)]
        else:
            data[place:place] = dice.randbytes(dice.randint(1, 8))
    try:
        rgb = decode_jpeg(bytes(data))
    except FrameDecodeError as error:
        assert "\n" not in str(error)
    else:
        assert rgb.dtype == np.uint8
        assert rgb.ndim == 3
        assert rgb.shape[2] == 3


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 8, 32]))
def test_a_thumbnail_is_the_mean_of_its_blocks(height: int, width: int, size: int) -> None:
    rgb = np.random.default_rng(height * 71 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    found = thumbnail(rgb, size)
    assert found.shape == (size, size)
    assert found.dtype == np.float32
    if height % size == 0 and width % size == 0:
        blocks = rgb.reshape(size, height // size, size, width // size, 3)
        np.testing.assert_allclose(found, blocks.mean(axis=(1, 3, 4)), atol=1e-3)
    assert rgb.min() - 1e-3 <= found.min()
    assert found.max() <= rgb.max() + 1e-3
    flat = encode_jpeg(np.full((height, width, 3), 90, np.uint8))
    assert np.abs(thumbnail(decode_jpeg(flat), size) - 90).max() <= 1
