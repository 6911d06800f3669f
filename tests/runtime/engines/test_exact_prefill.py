"""Frames that all see each other: prefilled in chunks of queries, once for all who ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from edge_vlm.cli import main
from edge_vlm.errors import NonFinite
from edge_vlm.pixels.frames import Frame, decode_jpeg, encode_jpeg
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm_export.trace.chunks import CHUNK
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.alerts import AlertChecked, AlertCreate
from edge_vlm_runtime.protocol.settings import ServerLimits
from tests.model.peers import Prompt, load_peer, peer_logits
from tests.published_folder import image_bundle, published_folder, published_model
from tests.runtime.engines.torch_snapshots import answer, prompt_format, video_part
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer
from tests.tiny import tiny_footage

LIMITS = ServerLimits(max_question_tokens=64)
STEPS = 12
QUESTION = "what colour is the cube ?"
OTHER = "is there a red ball ?"


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return encode_jpeg(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8))


class Watcher(Viewer):
    """A viewer who counts the tokens that the language model is given."""

    def __init__(self, engines: LoadedBundle, **changes: Any) -> None:
        changes = {"attention": "exact", "max_answer_tokens": STEPS, **changes}
        super().__init__(engines, FakeClock(), limits=LIMITS, **changes)

    def see(self, *jpegs: bytes) -> None:
        for data in jpegs:
            self.put(len(self.put_frames), data=data)
            self.run()

    def answered(self, text: str = QUESTION, detail: str = "video") -> protocol.ResponseDone:
        self.ask(text, detail=detail)
        self.run()
        return self.of(protocol.ResponseDone)[-1]


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(image_bundle(), threads=1) as opened:
        yield opened


Run = tuple[int, np.ndarray]


@pytest.fixture
def runs(engines: LoadedBundle, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Tokens and last logits of each run of the language graph with more than one token."""
    noted: list[Run] = []
    infer = engines.language._infer

    def noting(arena: object, embeds: np.ndarray, *rest: object) -> np.ndarray:
        logits = infer(arena, embeds, *rest)  # type: ignore[arg-type]
        if len(embeds) > 1:
            noted.append((len(embeds), logits[-1]))
        return logits

    monkeypatch.setattr(engines.language, "_infer", noting)
    return noted


def lengths(runs: list[Run]) -> list[int]:
    return [length for length, _ in runs]


FRAMES = [picture(seed) for seed in range(9)]


def test_several_chunks_are_torchs_and_transformers_answer(
    engines: LoadedBundle, runs: list[Run]
) -> None:
    viewer = Watcher(engines)
    viewer.see(*FRAMES)
    said = viewer.answered().text
    assert runs[0][0] > 2 * CHUNK  # the last chunk is not a whole one
    assert runs[0][0] % CHUNK
    with torch.no_grad():
        parts = video_part(published_model(), [(0.5 * i, jpeg) for i, jpeg in enumerate(FRAMES)])
        assert said == answer(published_model(), parts, QUESTION, STEPS, one_block=True)
    prompt, model = prompt_format(), published_model()
    peer = load_peer(published_folder())
    pixels = [to_pixel_values(decode_jpeg(jpeg), model.cfg.vision) for jpeg in FRAMES]
    ids = np.concatenate(
        [prompt.bos_ids, *(part for part, _ in parts), prompt.question_ids(QUESTION)]
    )
    tokens: list[int] = []
    logits: list[np.ndarray] = []
    for _ in range(STEPS):
        whole = torch.from_numpy(np.concatenate([ids, tokens]).astype(np.int64))
        shown = Prompt(model.cfg, whole, torch.from_numpy(np.stack(pixels)))
        logits.append(peer_logits(peer, shown)[-1].numpy())
        tokens.append(int(logits[-1].argmax()))
    assert said == prompt.tokenizer.decode(tokens)
    scale = np.abs(logits[0]).max()
    np.testing.assert_allclose(runs[1][1], logits[0], atol=1e-4 * scale)
    by_frame = Watcher(engines, attention="frame")
    by_frame.see(*FRAMES)
    by_frame.answered()
    assert np.abs(runs[-1][1] - logits[0]).max() > 1e-2 * scale  # another mask is seen


def test_a_second_question_costs_only_its_own_tokens(
    engines: LoadedBundle, runs: list[Run]
) -> None:
    viewer, anew = Watcher(engines), Watcher(engines)
    viewer.see(*FRAMES)
    first = viewer.answered()
    paid = lengths(runs)
    runs.clear()
    again, other = viewer.answered(), viewer.answered(OTHER)
    asked = [len(prompt_format().question_ids(text)) for text in (QUESTION, OTHER)]
    assert paid == [first.usage.vision_tokens, asked[0]]
    assert lengths(runs) == asked
    assert (again.text, again.usage, again.kv_tokens) == (first.text, first.usage, first.kv_tokens)
    anew.see(*FRAMES)
    assert anew.answered(OTHER).text == other.text


@pytest.mark.parametrize("attention", ["exact", "last_n"])
def test_a_frame_a_snapshot_and_other_settings_between(
    engines: LoadedBundle, runs: list[Run], attention: str
) -> None:
    """Whatever comes between two questions, the second is answered as by a new session."""
    viewer = Watcher(engines, attention=attention, last_n=3)
    viewer.see(*FRAMES[:4])
    viewer.answered()
    viewer.see(*FRAMES[4:6])
    runs.clear()
    found = viewer.answered()
    assert runs[0][0] == found.usage.vision_tokens  # the frames see the new ones too
    fresh = Watcher(engines, attention=attention, last_n=3)
    fresh.see(*FRAMES[:6])
    expected = fresh.answered()
    assert found.text == expected.text
    for detail in ("snapshot", "both"):
        viewer.answered(detail=detail)
        assert viewer.answered().text == expected.text
    viewer.ask(OTHER)
    viewer.step()
    viewer.cancel(None)
    viewer.run()
    assert viewer.answered().text == expected.text
    viewer.update(attention="last_n", last_n=2)
    last_two = Watcher(engines, attention="last_n", last_n=2)
    last_two.see(*FRAMES[:6])
    assert viewer.answered().text == last_two.answered().text
    viewer.update(attention="frame")
    viewer.update(attention=attention, last_n=3)
    assert viewer.answered().text == expected.text


def test_a_snapshot_alone_leaves_the_prefill_in_place(
    engines: LoadedBundle, runs: list[Run]
) -> None:
    viewer = Watcher(engines)
    viewer.see(*FRAMES)
    first = viewer.answered()
    viewer.answered(detail="snapshot")
    runs.clear()
    assert viewer.answered().text == first.text
    assert max(lengths(runs)) < first.usage.vision_tokens


def test_alerts_and_questions_share_one_prefill(engines: LoadedBundle, runs: list[Run]) -> None:
    viewer = Watcher(engines)
    viewer.see(*FRAMES[:3])
    for text in (QUESTION, OTHER):
        viewer.take(AlertCreate(question=text, report_checks=True))
    viewer.run()
    runs.clear()
    viewer.events.clear()
    viewer.see(FRAMES[3])
    checks = viewer.of(AlertChecked)
    assert len(checks) == 2
    viewer.answered()
    video = viewer.context.shown_tokens
    assert lengths(runs).count(video) == 1
    assert len(runs) == 3  # the video, both alerts together, the question
    for text, check in zip((QUESTION, OTHER), checks, strict=True):
        alone = Watcher(engines)
        alone.take(AlertCreate(question=text, report_checks=True))
        alone.see(*FRAMES[:4])
        alone.run()
        assert alone.of(AlertChecked)[-1].probability == pytest.approx(check.probability, rel=1e-4)


def test_as_many_frames_fit_as_is_said(engines: LoadedBundle) -> None:
    viewer = Watcher(engines)
    viewer.update(max_answer_tokens=STEPS)
    room = viewer.of(protocol.SessionUpdated)[-1].video
    assert room is not None
    assert (room.limited_by, room.frames_that_fit > 5) == ("bundle", True)
    viewer.see(*[picture(seed) for seed in range(room.frames_that_fit)])
    assert not viewer.of(protocol.MemoryEvicted)
    viewer.see(picture(50), picture(51), picture(52))
    assert viewer.of(protocol.MemoryEvicted)
    viewer.update(attention="last_n", last_n=2)
    room = viewer.of(protocol.SessionUpdated)[-1].video
    assert room is not None
    assert (room.frames_that_fit, room.limited_by) == (2, "last_n")


def test_frames_that_nobody_looks_at_are_not_encoded(
    engines: LoadedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = engines.vision.encode

    def noting(frame: Frame, *rest: Any) -> FrameTokens:
        encoded.append(frame.seq)
        return encode(frame, *rest)

    monkeypatch.setattr(engines.vision, "encode", noting)
    viewer, live = Watcher(engines), Watcher(engines, delivery="live", drop_duplicates=False)
    pictures = [picture(seed) for seed in range(20)]
    viewer.see(*pictures)
    assert not encoded
    accepted = viewer.of(protocol.FrameAccepted)
    assert [event.frame_sequence for event in accepted] == list(range(20))  # each has its outcome
    assert not any(event.encoded for event in accepted)
    done = viewer.answered()
    evicted = sum(event.frames for event in viewer.of(protocol.MemoryEvicted))
    assert (done.frames_shown, done.frames_accepted) == (20 - evicted, 20)
    assert encoded == viewer.context.frame_numbers()
    assert len(encoded) == done.frames_shown
    encoded.clear()
    viewer.answered(OTHER)
    assert not encoded
    for seq, jpeg in enumerate(pictures):  # a camera's are, as they come
        live.put(seq, data=jpeg)
        live.run()
    assert encoded == list(range(20))
    assert live.answered().text == done.text


def test_a_postponed_frame_is_encoded_before_anything_else_needs_it(engines: LoadedBundle) -> None:
    """Another mode, an alert, a picture after the video."""
    fresh = Watcher(engines, attention="frame")
    fresh.see(*FRAMES)
    by_frame = fresh.answered().text
    viewer = Watcher(engines)
    viewer.see(*FRAMES)
    viewer.update(attention="frame")
    assert viewer.answered().text == by_frame
    both, eager = Watcher(engines), Watcher(engines)
    eager.take(AlertCreate(question=OTHER))
    for watcher in (both, eager):
        watcher.see(*FRAMES[:3])
    assert all(event.encoded for event in eager.of(protocol.FrameAccepted))
    assert both.answered(detail="both").text == eager.answered(detail="both").text
    late = Watcher(engines)
    late.see(*FRAMES[:3])
    late.take(AlertCreate(question=OTHER, report_checks=True))
    late.run()
    assert late.of(AlertChecked)


def test_a_postponed_frame_that_fails_is_lost_with_an_error(
    engines: LoadedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = engines.vision.encode

    def failing(frame: Frame, *rest: Any) -> FrameTokens:
        if frame.seq == 0:
            raise NonFinite("the features of a frame are not finite", where="vit_trunk")
        return encode(frame, *rest)

    monkeypatch.setattr(engines.vision, "encode", failing)
    viewer, without = Watcher(engines), Watcher(engines)
    viewer.see(*FRAMES[:4])
    done = viewer.answered()
    assert [event.error.code for event in viewer.of(protocol.Error)] == ["E-NONFINITE"]
    assert [event.frames for event in viewer.of(protocol.MemoryEvicted)] == [1]
    assert (done.frames_shown, done.frames_accepted) == (3, 4)
    assert viewer.context.shown_tokens == done.usage.vision_tokens
    monkeypatch.undo()
    without.see(*FRAMES[:4])
    without.context.lose(without.context.postponed()[0])
    assert without.answered().text == done.text
    only = Watcher(engines)
    monkeypatch.setattr(engines.vision, "encode", failing)
    only.see(FRAMES[0])
    only.ask()
    only.run()
    codes = [event.error.code for event in only.of(protocol.Error)]
    assert codes == ["E-NONFINITE", "E-NO-FRAME"]


def test_ask_says_what_was_looked_at_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> str:
        command = ["ask", str(tiny_footage()), QUESTION, "--bundle", str(image_bundle())]
        command += ["--max-answer-tokens", "4", "--threads", "1", "--fps", "4", *options]
        assert main(command) == 0
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if not line.startswith("note: "))

    assert said().startswith(
        "10 frames, evenly over 2.8 s (12 at 4 a second; no more fit (the bundle): "
        "export it again with a larger --frames)"
    )
    assert said("--kv-tokens", "310").startswith(
        "9 frames, evenly over 2.8 s (12 at 4 a second; no more fit (kv_tokens): serve "
        "with a larger --kv-tokens)"
    )
    assert said("--attention", "frame").startswith("12 frames (")  # all of them
