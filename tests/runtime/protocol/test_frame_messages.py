"""Raw pictures: what is sent is what is seen, if it was agreed on and has the length it says."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.frames import (
    Rgb,
    decode_jpeg,
    decode_picture,
    encode_jpeg,
    raw_picture,
    shrink_jpeg,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.frames import Encoding
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.client.seen import Seen
from tests.runtime.server.live import open_server, run
from tests.runtime.session.viewer import Viewer

SETTINGS: Settings = {"delivery": "wait", "max_answer_tokens": 6}
QUESTION = "how many cars are there now ?"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(max_message_bytes=100_000) as opened:
        opened.start()
        yield opened


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@given(height=st.integers(1, 9), width=st.integers(1, 9), sequence=st.integers(0, 2**32 - 1))
def test_a_raw_picture_arrives_as_it_was(height: int, width: int, sequence: int) -> None:
    rgb = noise(height, width)
    message = protocol.raw_frame_message(sequence, 5, rgb)
    data = message.encode()
    assert data[:2] == b"\x01\x02"
    assert data[24:28] == struct.pack("<HH", width, height)
    decoded = protocol.decode_frame_message(data)
    assert decoded == message
    assert np.array_equal(decode_picture(decoded.picture()), rgb)


@given(payload=st.binary(max_size=40))
def test_any_other_length_is_refused(payload: bytes) -> None:
    message = protocol.FrameMessage(
        sequence=1, capture_time_us=0, payload=payload, payload_length=len(payload), kind=2
    )
    sides = struct.unpack_from("<HH", payload) if len(payload) >= 4 else (0, 0)
    if len(payload) - 4 == 3 * sides[0] * sides[1] > 0:
        return
    with pytest.raises(FrameDecodeError):
        message.picture()


def test_wrong_lengths_say_what_is_right() -> None:
    whole = protocol.raw_frame_message(1, 0, noise(2, 3))
    samples = bytes(whole.payload)
    assert len(samples) == 4 + 18
    for payload, words in (
        (samples[:-1], "3x2 has 18 bytes, not 17"),
        (samples + b"x", "3x2 has 18 bytes, not 19"),
        (samples[:3], "without width"),
        (struct.pack("<HH", 0, 7), "0x7"),
        (struct.pack("<HH", 65535, 65535), "65535x65535"),
    ):
        message = protocol.FrameMessage(
            sequence=1, capture_time_us=0, payload=payload, payload_length=len(payload), kind=2
        )
        with pytest.raises(FrameDecodeError, match=words):
            message.picture()
    with pytest.raises(FrameDecodeError, match="announces"):
        protocol.decode_frame_message(whole.encode()[:-5]).picture()
    with pytest.raises(FrameDecodeError, match="not 17"):  # as in a damaged recording
        decode_picture(raw_picture(bytes(18), 3, 2)[:-1])


def test_raw_is_read_only_where_it_was_agreed_on() -> None:
    viewer = Viewer()
    raw = raw_picture(noise(8, 8).tobytes(), 8, 8)
    viewer.put(1, data=raw, encoding=Encoding.RAW)
    viewer.run()
    viewer.update(raw_frames=True)
    viewer.put(2, data=raw, encoding=Encoding.RAW)
    viewer.put(3)  # a JPEG still is one
    viewer.run()
    assert viewer.drop_reasons() == {1: "decode_error"}
    assert viewer.outcomes() == [1, 2, 3]


def test_evidence_of_a_raw_picture_is_a_jpeg() -> None:
    rgb = noise(64, 64)
    small = shrink_jpeg(raw_picture(rgb.tobytes(), 64, 64), 1 << 20)
    assert decode_jpeg(small).shape == rgb.shape


def test_a_raw_stream_gives_what_the_same_pictures_as_jpeg_give(server: Server) -> None:
    async def session(raw: bool) -> tuple[list[list[int]], str]:
        seen = Seen()
        settings: Settings = {**SETTINGS, "raw_frames": raw}
        async with await Client.connect(server.url, settings, on_event=seen) as client:
            for number in range(3):
                data = jpeg(number)
                await client.send_frame(decode_jpeg(data) if raw else data, number * 500_000)
            await client.wait_processed()
            kept = [seen.accepted[number].kept_cells for number in sorted(seen.accepted)]
            return kept, (await client.ask(QUESTION)).text

    assert run(session(True)) == run(session(False))


def test_over_the_wire_each_wrong_one_gets_its_outcome(server: Server) -> None:
    async def send_raw(client: Client, number: int, rgb: Rgb) -> None:
        """As a client of somebody else's might."""
        client._unacknowledged.add(number)
        message = protocol.raw_frame_message(number, number * 500_000, rgb)
        await client._send(message.encode(), f"frame {number}")

    async def session() -> None:
        seen = Seen()
        async with await Client.connect(server.url, SETTINGS, on_event=seen) as client:
            await send_raw(client, 1, noise(8, 8))
            await client.wait_processed()
            assert seen.dropped[1].reason == "decode_error"
            await client.update({"raw_frames": True})
            await send_raw(client, 2, noise(8, 8))
            await send_raw(client, 3, noise(8, 0))
            await client.wait_processed()
            assert set(seen.accepted) == {2}
            assert seen.dropped[3].code == "E-FRAME-DECODE"

    run(session())


def test_pixels_go_as_the_session_takes_them(server: Server) -> None:
    async def session() -> list[bool]:
        seen, sizes = Seen(), []
        rgb = noise(64, 48)
        async with await Client.connect(server.url, SETTINGS, on_event=seen) as client:
            send = client._send

            async def weigh(data: str | bytes, key: str) -> None:
                sizes.append(len(data))
                await send(data, key)

            client._send = weigh  # type: ignore[method-assign]
            await client.send_frame(rgb, 0)
            await client.update({"raw_frames": True})
            await client.send_frame(rgb, 500_000)
            await client.send_frame(encode_jpeg(rgb), 1_000_000)
            await client.wait_processed()
            assert set(seen.accepted) | set(seen.dropped) == {1, 2, 3}
            assert all(event.reason == "duplicate" for event in seen.dropped.values())
        return [size > rgb.nbytes for size in sizes if size > 500]  # not those of the update

    assert run(session()) == [False, True, False]


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), r"u8 \[H, W, 3\], got float32 \[8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), r"got uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"got uint8 \[8, 8, 4\]"),
        (np.zeros((8, 0, 3), np.uint8), "at least one row"),
        ("clip.jpg", "must be an array, u8 .*, got str"),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_sent(
    server: Server, picture: Any, words: str
) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, SETTINGS) as client:
            with pytest.raises(ValueError, match=words):
                await client.send_frame(picture, 0)
            await client.send_frame(jpeg(1), 0)  # no number was used up
            await client.wait_processed()
            assert client.frames.processed == 1

    run(session())
