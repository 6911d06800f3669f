"""Snapshot questions on the real engines: torch's own answers, and a stream that never notices."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import NoFrameYet, SnapshotsUnsupported
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.stills import image_grid
from edge_vlm.text.prompt import RELEASED, image_length
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.session.budget import default_settings
from tests.published_folder import CUT, image_bundle, published_model
from tests.runtime.engines.torch_snapshots import answer, image_part, video_part
from tests.runtime.session.fake_engines import FakeBundle, FakeClock
from tests.runtime.session.viewer import Viewer

LIMITS = ServerLimits(max_question_tokens=64)
STEPS = 12
QUESTION = "what colour is the cube ?"


def picture(seed: int, height: int = 90, width: int = 120) -> bytes:
    rng = np.random.default_rng(seed)
    return encode_jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


class Looker(Viewer):
    """A viewer who shows pictures of its own and asks about them."""

    def __init__(self, engines: Any, limits: ServerLimits = LIMITS, **changes: Any) -> None:
        super().__init__(
            engines, FakeClock(), limits=limits, **{"max_answer_tokens": STEPS, **changes}
        )

    def see(self, *jpegs: bytes) -> None:
        for data in jpegs:
            self.put(len(self.put_frames), data=data)
            self.run()

    def begin(self, detail: Any) -> None:
        self.ask(QUESTION, event_id="mine", detail=detail)

    def end_of(self, detail: Any) -> protocol.ServerEvent:
        self.begin(detail)
        self.run()
        (end,) = (
            event
            for event in self.events[-3 * STEPS :]
            if isinstance(event, (protocol.ResponseDone, protocol.Error))
        )
        self.events.clear()
        return end

    def answered(self, detail: Any) -> protocol.ResponseDone:
        done = self.end_of(detail)
        assert isinstance(done, protocol.ResponseDone)
        assert done.status == "completed"
        return done

    def memory(self) -> list[bytes]:
        arena = self.arena
        layers = range(self.engines.bundle.config.language.num_layers)
        return [rows.tobytes() for layer in layers for rows in arena.rows(layer)]


@pytest.fixture(scope="module")
def engines() -> Any:
    with LoadedBundle.open(image_bundle(), threads=1) as opened:
        yield opened


FRAMES = [picture(seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("attention", ["frame", "exact", "last_n"])
@pytest.mark.parametrize("detail", ["snapshot", "both"])
def test_the_answer_is_that_of_torchs_own_image_forward(
    engines: LoadedBundle, detail: str, attention: str
) -> None:
    model = published_model()
    viewer = Looker(engines, attention=attention, last_n=2)
    viewer.see(*FRAMES)
    done = viewer.answered(detail)
    with torch.no_grad():
        stamped = [(0.5 * i, jpeg) for i, jpeg in enumerate(FRAMES)]
        video = video_part(model, stamped[-2:] if attention == "last_n" else stamped)
        image = image_part(model, FRAMES[-1], CUT)
        shown = [image] if detail == "snapshot" else [*video, image]
        expected = answer(model, shown, QUESTION, STEPS, one_block=attention != "frame")
    assert done.text == expected
    assert len(done.text) > STEPS
    assert done.usage.vision_tokens == 1 + sum(len(ids) for ids, _ in shown)
    assert done.snapshot is not None
    assert (done.snapshot.frame_sequence, done.snapshot.time_s) == (2, 1.0)
    assert (done.snapshot.width, done.snapshot.height) == (120, 90)
    assert done.snapshot.tokens == len(image[0])


def test_another_picture_order_or_mask_would_be_another_answer() -> None:
    """What the test above can tell apart."""
    model = published_model()
    with torch.no_grad():
        video = video_part(model, [(0.5 * i, jpeg) for i, jpeg in enumerate(FRAMES)])
        ids, features = image_part(model, FRAMES[-1], CUT)
        _, other = image_part(model, FRAMES[0], CUT)
    assert features is not None
    reversed_ = features.flip(0)
    for before in ([], video):
        for one_block in (False, True):
            answers = [
                answer(model, [*before, (ids, shown)], QUESTION, STEPS, one_block=one_block)
                for shown in (features, reversed_, other)
            ]
            assert len(set(answers)) == 3
    masks = [
        answer(model, [*video, (ids, features)], QUESTION, STEPS, one_block=one_block)
        for one_block in (False, True)
    ]
    assert masks[0] != masks[1]


@pytest.mark.parametrize("detail", ["snapshot", "both"])
def test_the_stream_goes_on_as_if_nobody_had_asked(engines: LoadedBundle, detail: str) -> None:
    asked, silent = (Looker(engines, attention="frame") for _ in range(2))
    for viewer in (asked, silent):
        viewer.see(*FRAMES)
    before = asked.memory()
    asked.answered(detail)
    assert asked.memory() == before
    for viewer in (asked, silent):
        viewer.see(picture(4))
    assert asked.memory() == silent.memory()
    assert asked.answered("video").text == silent.answered("video").text
    # A cancelled one leaves no more behind, and frames that came meanwhile join.
    asked.begin(detail)
    asked.step()
    asked.step()
    asked.cancel(None)
    asked.see(picture(5))
    silent.see(picture(5))
    assert asked.memory() == silent.memory()


ASKED = st.tuples(st.sampled_from(["snapshot", "both"]), st.integers(0, 2 * STEPS))
"""A question, and after how many steps it is cancelled, or the number of a frame."""


@given(st.lists(st.one_of(st.integers(1, 5), ASKED), max_size=8))
@hypothesis.settings(max_examples=20, deadline=None)
def test_no_schedule_of_questions_leaves_a_trace(
    engines: LoadedBundle, schedule: list[int | tuple[str, int]]
) -> None:
    asked, silent = (Looker(engines, attention="frame") for _ in range(2))
    for viewer in (asked, silent):
        viewer.see(picture(0))
    for item in schedule:
        if isinstance(item, int):
            asked.see(picture(item))
            silent.see(picture(item))
        else:
            detail, steps = item
            asked.begin(detail)
            for _ in range(steps):
                asked.step()
            asked.cancel(None)
            asked.run()
        assert asked.memory() == silent.memory()
    asked.events.clear()
    assert asked.answered("video").text == silent.answered("video").text


@pytest.mark.parametrize("detail", ["snapshot", "both"])
def test_an_exact_stream_answers_the_same_before_and_after(
    engines: LoadedBundle, detail: str
) -> None:
    viewer = Looker(engines, attention="exact")
    viewer.see(*FRAMES)
    first = viewer.answered("video")
    assert first.snapshot is None
    viewer.answered(detail)
    again = viewer.answered("video")
    assert (again.text, again.usage, again.kv_tokens) == (first.text, first.usage, first.kv_tokens)


@pytest.mark.parametrize("size", [(1, 1), (4320, 7680), (3, 5000)])
def test_pictures_of_odd_sizes_are_looked_at(engines: LoadedBundle, size: tuple[int, int]) -> None:
    jpeg = encode_jpeg(np.full((*size, 3), 128, np.uint8))
    viewer = Looker(engines, attention="frame")
    viewer.see(jpeg)
    done = viewer.answered("snapshot")
    assert done.snapshot is not None
    assert (done.snapshot.height, done.snapshot.width) == size
    assert 1 <= done.snapshot.crops <= CUT.max_crops


def test_near_duplicates_are_the_newest_picture_too(engines: LoadedBundle) -> None:
    viewer = Looker(engines, delivery="live")
    grey = [np.full((40, 40, 3), level, np.uint8) for level in (100, 101)]
    viewer.see(*map(encode_jpeg, grey))
    dropped = [e.reason for e in viewer.events if isinstance(e, protocol.FrameDropped)]
    assert dropped == ["duplicate"]
    done = viewer.answered("snapshot")
    assert done.snapshot is not None
    assert done.snapshot.frame_sequence == 1


def test_a_picture_has_as_many_crops_as_there_is_room_for(engines: LoadedBundle) -> None:
    vision = engines.bundle.config.vision
    viewer = Looker(engines, attention="exact")
    room = engines.language.max_tokens
    viewer.see(FRAMES[0])
    crops = []
    for seed in range(2, 12):
        viewer.see(picture(seed))
        left = room - viewer.context.shown_tokens
        fitting = [
            cut
            for cut in (dataclasses.replace(CUT, max_crops=n) for n in range(CUT.max_crops, 0, -1))
            if image_length(image_grid(90, 120, vision, cut), RELEASED) <= left
        ]
        end = viewer.end_of("both")
        if not fitting:
            assert isinstance(end, protocol.Error)
            assert end.error.code == "E-SNAPSHOT-ROOM"
            assert "window_tokens" in end.error.message
            assert end.error.event_id == "mine"
            break
        assert isinstance(end, protocol.ResponseDone)
        assert end.snapshot is not None
        crops.append(end.snapshot.crops)
    else:
        pytest.fail("the video never became too long")
    assert crops == sorted(crops, reverse=True)
    assert len(set(crops)) > 1
    assert viewer.answered("snapshot").snapshot is not None
    assert viewer.answered("video").snapshot is None


def test_a_full_window_leaves_room_for_a_picture(engines: LoadedBundle) -> None:
    viewer = Looker(engines, attention="frame")
    for seed in range(70):
        viewer.see(picture(seed % 5, 40, 40))
    evicted = [e for e in viewer.events if isinstance(e, protocol.MemoryEvicted)]
    assert evicted
    before = viewer.memory()
    done = viewer.answered("both")
    assert done.snapshot is not None
    assert done.snapshot.crops >= 4
    assert viewer.memory() == before


@pytest.mark.parametrize("attention", ["frame", "exact"])
def test_a_small_cache_has_fewer_crops(engines: LoadedBundle, attention: str) -> None:
    crops = []
    for capacity in (150, 116, 111):
        limits = ServerLimits(max_question_tokens=20, kv_capacity_tokens=capacity)
        viewer = Looker(engines, limits, attention=attention)
        viewer.see(FRAMES[0])
        done = viewer.answered("snapshot")
        assert done.snapshot is not None
        assert done.kv_tokens <= capacity
        crops.append(done.snapshot.crops)
    assert crops == sorted(crops, reverse=True)
    assert len(set(crops)) > 1


def test_no_picture_and_no_image_path_are_typed_errors(engines: LoadedBundle) -> None:
    viewer = Looker(engines)
    with pytest.raises(NoFrameYet):
        viewer.begin("snapshot")
    viewer.put(0, data=b"\xff\xd8\xff nothing")
    end = viewer.end_of("snapshot")
    assert isinstance(end, protocol.Error)
    assert end.error.code == "E-NO-FRAME"

    clock = FakeClock()
    plain = Looker(FakeBundle(clock))
    plain.see(picture(1))
    for detail in ("snapshot", "both"):
        with pytest.raises(SnapshotsUnsupported, match=r"fake reads video only.*Molmo2"):
            plain.begin(detail)
    assert plain.answered("video").snapshot is None
    assert default_settings(engines.bundle, LIMITS).attention.value == "exact"
