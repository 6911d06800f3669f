"""A session without a server: what is done wrong is an error, and the session goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError, SessionError, SessionGone
from edge_vlm_runtime import InProcessSession, LoadedBundle, protocol
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.server.live import TIMEOUT_S
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def bundle() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), 1) as opened:
        yield opened


@pytest.fixture
def session(bundle: LoadedBundle) -> Iterator[InProcessSession]:
    with bundle.session() as opened:
        yield opened


@pytest.mark.parametrize(
    "wrong",
    [{"keep_ratio": "x"}, {"min_cells": 1.5}, {"keep_ratio": float("nan")}, {"policy": None}],
    ids=str,
)
def test_values_of_the_wrong_type(
    bundle: LoadedBundle, session: InProcessSession, wrong: Any
) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        bundle.session(wrong)
    with pytest.raises(ConfigError, match="Expected"):
        session.update(wrong)


@pytest.mark.parametrize(
    "call",
    [
        lambda session: session.ask(5),
        lambda session: session.ask("\ud800"),
        lambda session: session.ask(QUESTION, "vidoe"),
        lambda session: session.create_alert(None),
        lambda session: session.create_alert(QUESTION, hold_s="long"),
        lambda session: session.delete_alert(None),
    ],
    ids=range(6),
)
def test_a_wrong_argument_does_not_end_the_session(session: InProcessSession, call: Any) -> None:
    with pytest.raises(ConfigError):
        call(session)
    session.send_frame(jpeg(1), 0)
    assert session.ask(QUESTION).status == "completed"


def test_arrays_are_taken_whatever_the_settings_say(session: InProcessSession) -> None:
    session.update({"raw_frames": False, "keep_ratio": np.float32(0.5)})  # type: ignore[typeddict-item]
    taken = session.send_frame(np.zeros((8, 8, 3), np.uint8)[::-1])
    assert isinstance(taken, protocol.FrameAccepted)
    assert session.settings.keep_ratio == 0.5


def test_another_thread_in_a_call_is_an_error_and_harms_nothing(bundle: LoadedBundle) -> None:
    outcomes: list[BaseException | None] = []

    def meddle() -> None:
        try:
            watched.ask(QUESTION)
            outcomes.append(None)
        except SessionError as error:
            outcomes.append(error)

    def on_event(event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.ResponseCreated):
            other = threading.Thread(target=meddle)
            other.start()
            other.join(TIMEOUT_S)

    with bundle.session(on_event=on_event) as watched:
        watched.send_frame(jpeg(1), 0)
        assert watched.ask(QUESTION).status == "completed"
    (outcome,) = outcomes
    assert "another thread" in str(outcome)


def test_after_the_end(bundle: LoadedBundle) -> None:
    ended = bundle.session()
    ended.close()
    with pytest.raises(SessionGone, match="the session has ended"):
        ended.ask(QUESTION)
    with pytest.raises(SessionGone, match="the session has ended"):
        ended.send_frame(jpeg(1), 0)
    own = LoadedBundle.open(tiny_bundle(), 1)
    left = own.session()
    own.close()
    with pytest.raises(SessionGone, match="the bundle was closed"):
        left.ask(QUESTION)
    with pytest.raises(SessionGone, match="the bundle was closed"):
        own.session()
    left.close()
