"""Several sessions on one engine set, each with settings of its own: whatever the order of their
turns, each says and remembers exactly what it does alone. Not nearly: bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.alerts import AlertCreate
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer
from tests.tiny import tiny_bundle, tiny_config

SETTINGS: list[dict[str, Any]] = [
    {"keep_ratio": 0.4, "max_answer_tokens": 6, "history_turns": 1},
    {"attention": "exact", "policy": "frame_topk", "keep_ratio": 0.6, "max_answer_tokens": 8},
    {"attention": "last_n", "last_n": 2, "policy": "difference", "max_answer_tokens": 5},
    {"vision_tokens_per_s": 7.0, "window_tokens": 60, "max_answer_tokens": 7},
    {"temperature": 1.5, "seed": 1, "max_answer_tokens": 6, "history_turns": 1},
    {"temperature": 1.5, "seed": 2, "top_p": 0.9, "max_answer_tokens": 6},
]


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


def new_viewer(engines: LoadedBundle, number: int) -> Viewer:
    return Viewer(engines, FakeClock(), **SETTINGS[number])


def script(viewer: Viewer, number: int) -> Iterator[Callable[[], object]]:
    """What this viewer does, call by call; it does not depend on time."""
    if number == 3:
        alert = AlertCreate(question="is there a red ball ?")
        yield lambda: viewer.take(alert)
    for sequence in range(1, 10):
        yield partial(viewer.put, sequence, data=jpeg(sequence + 10 * number))
        if sequence % 4 != number:  # so that frames pile up and join together
            yield viewer.watch
            yield viewer.watch
        if sequence % 3 == 0:
            yield lambda: viewer.ask("how many cars are there now ?")
            for _ in range(12):
                yield viewer.answer
                yield viewer.watch
        if sequence == 6:
            yield lambda: viewer.update(keep_ratio=0.8, min_cells=1)
    yield viewer.run


def all_of(viewer: Viewer) -> list[bytes]:
    """Everything it said, but for durations of the vision graphs, which differ from run to run."""
    for event in viewer.of(protocol.FrameAccepted):
        event.stage_ms = {}
    return [protocol.encode(event).encode() for event in viewer.events]


def memory_of(viewer: Viewer) -> np.ndarray:
    arena = viewer.arena
    layers = range(tiny_config().language.num_layers)
    return np.stack([np.stack(arena.rows(layer)) for layer in layers])


@pytest.fixture(scope="module")
def alone(engines: LoadedBundle) -> list[tuple[list[bytes], np.ndarray]]:
    found = []
    for number in range(len(SETTINGS)):
        viewer = new_viewer(engines, number)
        for call in script(viewer, number):
            call()
        found.append((all_of(viewer), memory_of(viewer)))
    assert len({tuple(said) for said, _ in found}) == len(SETTINGS)
    assert all(b"response.done" in b"".join(said) for said, _ in found)
    return found


@settings(max_examples=12, deadline=None)
@given(order=st.lists(st.integers(0, len(SETTINGS) - 1), max_size=400))
def test_interleaved_sessions_give_exactly_what_each_gives_alone(
    engines: LoadedBundle, alone: list[tuple[list[bytes], np.ndarray]], order: list[int]
) -> None:
    viewers = [new_viewer(engines, number) for number in range(len(SETTINGS))]
    scripts = [script(viewer, number) for number, viewer in enumerate(viewers)]
    for number in [*order, *[n for _ in range(300) for n in range(len(SETTINGS))]]:
        call = next(scripts[number], None)
        if call is not None:
            call()
    for (said, memory), viewer in zip(alone, viewers, strict=True):
        assert all_of(viewer) == said
        assert np.array_equal(memory_of(viewer), memory)


@pytest.mark.parametrize("attention", ["frame", "exact", "last_n"])
def test_frames_that_come_during_an_answer_do_not_change_it(
    engines: LoadedBundle, attention: str
) -> None:
    texts = []
    for frames_meanwhile in (0, 5):  # as many as the shortest memory holds
        viewer = Viewer(engines, FakeClock(), attention=attention, max_answer_tokens=12)
        viewer.show(1, 2, 3)
        viewer.ask("how many cars are there now ?")
        viewer.answer()
        for sequence in range(4, 4 + frames_meanwhile):
            viewer.put(sequence)
            viewer.watch()
            viewer.answer()
        viewer.run()
        (done,) = viewer.of(protocol.ResponseDone)
        texts.append((done.text, done.usage, done.newest_frame.frame_sequence))
        expected = list(range(1, 4 + frames_meanwhile))
        assert viewer.context.frame_numbers() == expected
        assert viewer.outcomes() == expected
        assert not viewer.drop_reasons()
    assert texts[0] == texts[1]
