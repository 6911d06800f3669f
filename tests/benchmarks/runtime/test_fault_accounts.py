"""What the fault harness counts: a loss is seen, and what is excused is no more than a moment."""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import Any

from benchmarks.runtime.fault_parts.accounts import (
    MOMENT_S,
    Account,
    Told,
    bugs_in,
    differing,
    out_of_order,
    viewers_trouble,
)
from benchmarks.runtime.fault_parts.mqtt_tap import _Connection, packets


def account(told: dict[str, Told], kept: list[str], arrived: list[str]) -> Account:
    """The first two servers were killed, the third was not."""
    return Account(
        told=told, kept=kept, arrived=Counter(arrived), server_kills={1: 100.0, 2: 200.0}
    )


def test_nothing_is_lost() -> None:
    found = account({"a": Told(50.0, 1), "b": Told(150.0, 2)}, ["b"], ["a", "b", "b"])
    assert not found.lost
    assert not found.kept_and_lost
    assert found.report()["arrived_more_than_once"] == 1


def test_what_was_kept_and_did_not_arrive_is_a_loss() -> None:
    found = account({"a": Told(99.9, 1)}, ["a"], [])
    assert found.kept_and_lost == ["a"]


def test_what_was_told_long_before_a_kill_is_a_loss() -> None:
    moment = 200.0 - MOMENT_S / 2
    told = {
        "early": Told(150.0, 2),
        "late": Told(moment, 2),
        "on the line": Told(100.5, 1),
        "of one that lives": Told(199.9, 3),
    }
    found = account(told, [], [])
    assert found.lost_without_excuse == ["early", "of one that lives"]
    report = found.report()
    assert report["told_a_moment_before_a_kill_and_lost"] == 2
    assert report["of_these_read_behind_the_kill"] == 1
    assert report["longest_such_moment_ms"] == 1e3 * MOMENT_S / 2


def test_twice_must_be_the_same() -> None:
    same = {"id": "a", "key": "a", "digest": "1"}
    assert differing([same, same]) == []
    assert differing([same, {**same, "digest": "2"}]) == ["a"]
    assert differing([{**same, "key": "b"}]) == ["a"]


def test_an_end_before_its_begin_is_seen() -> None:
    assert out_of_order(["s/1/1/alert.triggered", "s/1/1/alert.cleared"]) == []
    assert out_of_order(["s/1/1/alert.cleared", "s/1/1/alert.triggered"]) == ["s/1/1"]


def lines(*events: dict[str, Any]) -> list[dict[str, Any]]:
    begin = {"session": "s", "token": "t", "event": 1}
    return [begin, *({"session": "s", **event} for event in events)]


def test_a_viewers_gaps_and_repetitions_are_seen() -> None:
    whole = lines({"event": 2, "frame": 1}, {"event": 3, "frame": 2}, {"over": "closed"})
    assert viewers_trouble(whole) == []
    assert "event 4 behind 2" in viewers_trouble(lines({"event": 2}, {"event": 4}))[0]
    assert "event 2 behind 2" in viewers_trouble(lines({"event": 2}, {"event": 2}))[0]
    twice = lines({"event": 2, "frame": 1}, {"event": 3, "frame": 1})
    assert "two outcomes" in viewers_trouble(twice)[0]
    missing = lines({"event": 2, "frame": 1}, {"event": 3, "frame": 3}, {"over": "closed"})
    assert "[2] without an outcome" in viewers_trouble(missing)[0]
    assert viewers_trouble(missing[:-1]) == []  # the session may go on


def publish(number: int, body: bytes, properties: bytes) -> bytes:
    rest = struct.pack(">H", 2) + b"al" + struct.pack(">H", number) + properties + body
    return bytes([0x32]) + length(len(rest)) + rest


def length(value: int) -> bytes:
    data = bytearray()
    while True:
        value, low = divmod(value, 128)
        data.append(low | (128 if value else 0))
        if not value:
            return bytes(data)


def test_what_a_broker_acknowledged_is_read_off_the_line() -> None:
    for version, properties in ((4, b""), (5, b"\x00")):
        acknowledged: Counter[str] = Counter()
        connection = _Connection(acknowledged)
        body = json.dumps({"id": "a", "long": "x" * 300}).encode()
        line = b"\x10\x0a" + b"\x00\x04MQTT" + bytes([version, 2, 0, 60])
        line += publish(7, body, properties) + publish(8, b"\xff\xd8 a picture", properties)
        buffer = bytearray()
        for byte in line:  # however it is cut
            buffer.append(byte)
            for head, rest in packets(buffer):
                connection.from_client(head, rest)
        assert not buffer
        assert not acknowledged
        for number in (8, 7):
            connection.from_broker(0x40, struct.pack(">H", number))
        assert acknowledged == {"a": 1}


def test_a_traceback_is_told_by_its_end() -> None:
    log = 'INFO fine\nTraceback (most recent call last):\n  File "a.py", line 3, in f\n    x()\n'
    assert bugs_in(log + "ValueError: no\nWARNING go on\n") == [
        'File "a.py", line 3, in f: ValueError: no'
    ]
    assert bugs_in(log) == ["a traceback without an end"]
    assert bugs_in("ERROR E-INTERNAL: this is a bug\nINFO fine") == [
        "ERROR E-INTERNAL: this is a bug"
    ]
