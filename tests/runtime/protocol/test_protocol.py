from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs import build_protocol as protocol_docs
from edge_vlm.errors import NoFrameYet, ProtocolError, UnknownMessageType
from edge_vlm.formats import usage
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.base import MAX_PARTS
from edge_vlm_runtime.protocol.settings import SessionSettings

ROOT = Path(__file__).parents[3]


def test_the_page_about_the_protocol_is_current() -> None:
    committed = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    assert committed == protocol_docs.render(), (
        "run: python -m docs.build_protocol docs/protocol.md"
    )


def test_text_of_a_terminal_that_is_no_text_is_an_error_of_ours() -> None:
    question = b"pilz \xe4".decode("utf-8", "surrogateescape")  # as sys.argv has it
    with pytest.raises(ProtocolError, match=r"not text: .*UTF-8"):
        protocol.json_object({"text": question})


def test_a_bundle_may_be_given_what_a_runtime_reads() -> None:
    fields = {field.name for field in dataclasses.fields(SessionSettings)}
    assert fields | {"fps", "max_positions", "max_time_s"} == usage.DEFAULTS


def test_every_setting_can_be_patched() -> None:
    names = {field.name for field in dataclasses.fields(SessionSettings)}
    assert set(protocol.OwnSettings.__struct_fields__) == names


def test_the_header_is_what_the_page_says() -> None:
    """Version, type, flags, stream, reserved, sequence, length, time: written by hand here."""
    message = protocol.frame_message(7, 1_500_000, b"jpeg").encode()
    assert message == (
        b"\x01\x01"
        + b"\x00\x00"
        + b"\x00\x00"
        + b"\x00\x00"
        + (7).to_bytes(4, "little")
        + (4).to_bytes(4, "little")
        + (1_500_000).to_bytes(8, "little")
        + b"jpeg"
    )
    assert protocol.HEADER.size == 24


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, protocol.MAX_CAPTURE_TIME_US), st.binary())
def test_frames_come_through_unchanged(sequence: int, time_us: int, payload: bytes) -> None:
    message = protocol.frame_message(sequence, time_us, payload)
    assert protocol.decode_frame_message(message.encode()) == message


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_frame_or_a_typed_error(data: bytes) -> None:
    try:
        protocol.decode_frame_message(data)
    except ProtocolError as error:
        assert "\n" not in str(error)


@settings(deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["type", "text", "session", "event_id"]), inner)
            ),
            max_leaves=8,
        ).map(json.dumps),
    )
)
def test_any_text_gives_a_message_or_a_typed_error(text: str) -> None:
    try:
        protocol.decode_client_message(text)
    except ProtocolError as error:
        assert "\n" not in str(error)
    protocol.event_id_of(text)


def test_a_cut_payload_is_seen() -> None:
    data = protocol.frame_message(1, 2, b"0123456789").encode()[:-3]
    message = protocol.decode_frame_message(data)
    assert (message.payload_length, len(message.payload)) == (10, 7)


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        (b"", ProtocolError, "24-byte header"),
        (b"\x02" + bytes(23), ProtocolError, "version 2"),
        (b"\x01\x09" + bytes(22), UnknownMessageType, "type 9"),
        (b"\x01\x01" + bytes(14) + b"\xff" * 8, ProtocolError, "out of range"),
    ],
)
def test_bad_headers_are_told_apart(data: bytes, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        protocol.decode_frame_message(data)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{", ProtocolError, "not a message"),
        ("[]", ProtocolError, "not a message"),
        ('{"text": "hi"}', ProtocolError, "type"),
        ('{"type": "dance"}', UnknownMessageType, "'dance'"),
        ('{"type": "alert.create"}', ProtocolError, "question"),
        ('{"type": "response.create", "text": 3}', ProtocolError, "text"),
        ('{"type": "ping", "volume": 11}', ProtocolError, "volume"),
        (
            '{"type": "session.update", "session": {"keep_ratoi": 1}}',
            ProtocolError,
            "keep_ratoi",
        ),
    ],
)
def test_bad_messages_name_what_is_wrong(text: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        protocol.decode_client_message(text)


def test_events_come_through_unchanged() -> None:
    event = protocol.FrameAccepted(
        sequence=4,
        frame_sequence=2,
        time_s=0.5,
        cells_seen=9,
        cells_kept=2,
        kept_cells=[1, 5],
        stage_ms={"decode": 1.5},
        queue_ms=0.1,
        age_ms=9.0,
        kv_tokens=44,
        in_memory=True,
    )
    text = protocol.encode(event)
    assert json.loads(text)["type"] == "frame.accepted"
    assert protocol.decode_server_event(text) == event


def test_errors_carry_their_code() -> None:
    event = protocol.error_event(NoFrameYet("no frame", remedy="send one"), event_id="e7")
    assert json.loads(protocol.encode(event))["error"] == {
        "type": "session_error",
        "code": "E-NO-FRAME",
        "message": "no frame: send one",
        "param": None,
        "event_id": "e7",
    }


@pytest.mark.parametrize("piece", ["{},", "1,", "[],", '{"type":"message","content":[]},'])
def test_a_message_in_very_many_parts_is_not_read(
    piece: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = piece * 100
    many = piece * MAX_PARTS
    text = '{"type":"response.create","response":{"input":[%snull]}}'
    with pytest.raises(ProtocolError, match="not a message"):
        protocol.decode_client_message(text % few)
    monkeypatch.setattr("msgspec.json.decode", None)
    for whole in (text % many, (text % many).encode()):
        with pytest.raises(ProtocolError, match="more than 50000 parts"):
            protocol.decode_client_message(whole)


def test_a_large_picture_is_one_part() -> None:
    picture = protocol.InputImageBufferAppend(image=bytes(5 << 20))
    decoded = protocol.decode_client_message(protocol.encode(picture))
    assert isinstance(decoded, protocol.InputImageBufferAppend)
    assert len(decoded.image) == 5 << 20
