from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import ProtocolError, ReplayLost
from edge_vlm_runtime import protocol
from edge_vlm_runtime.server.event_log import EventLog


def event(text: str) -> protocol.ServerEvent:
    return protocol.ResponseOutputTextDelta(response_id="r", delta=text)


@given(st.lists(st.text(max_size=30), max_size=40), st.integers(1, 12), st.integers(1, 900))
def test_it_keeps_the_newest_events_within_its_bounds(
    texts: list[str], max_events: int, max_bytes: int
) -> None:
    log = EventLog(max_events=max_events, max_bytes=max_bytes)
    for text in texts:
        log.append(event(text))
    kept = range(log.oldest, log.newest + 1)
    assert log.newest == len(texts)
    assert len(kept) == min(len(texts), max(len(kept), 1))
    assert len(kept) <= max_events
    assert len(kept) <= 1 or log.num_bytes <= max_bytes
    for sequence in kept:
        found = json.loads(log.text(sequence))
        assert (found["sequence"], found["delta"]) == (sequence, texts[sequence - 1])
    # nothing is forgotten without need
    if kept and log.oldest > 1 and len(kept) < max_events:
        dropped = EventLog(max_events=1, max_bytes=1)
        dropped.newest = log.oldest - 2
        dropped.append(event(texts[log.oldest - 2]))
        assert log.num_bytes + dropped.num_bytes > max_bytes


def test_who_can_go_on_from_where() -> None:
    log = EventLog(max_events=3, max_bytes=10_000)
    log.require(0)
    for number in range(5):
        log.append(event(str(number)))
    for last in (2, 3, 4, 5):
        log.require(last)
    for last in (0, 1):
        with pytest.raises(ReplayLost, match=f"events {last + 1} to 2 "):
            log.require(last)
    for last in (-1, 6):
        with pytest.raises(ProtocolError, match="number 5"):
            log.require(last)
    for sequence in (2, 6):
        with pytest.raises(ValueError, match=r"3\.\.5"):
            log.text(sequence)
