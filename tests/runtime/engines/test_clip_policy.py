"""Policy `clip`: a file is chosen from as a whole, as torch and the published STTS code do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from edge_vlm.config import Rescale
from edge_vlm.errors import AlertsUnsupported, ClipTooLong, ConfigError
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.evaluator import TorchEvaluator, TorchModel
from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.clip_budget import context_of
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.budget import cache_capacity, clip_capacity
from tests.runtime.cameras.pictures import jpeg, write_video
from tests.runtime.client.seen import Seen
from tests.runtime.command_line import command_line
from tests.runtime.server.live import open_server, run
from tests.runtime.session.viewer import Viewer
from tests.tiny import TINY_LIMITS, kept, tiny_bundle, tiny_checkpoint

CLIP: Settings = {"delivery": "wait", "policy": "clip", "max_answer_tokens": 4}
QUESTION = "is there a red ball ?"
FRAMES = 7


def published_bundle() -> Path:
    """Tiny weights under the rules of the published STTS code."""
    whole = open_weights(tiny_checkpoint())
    assert whole.cfg.scorer is not None
    scorer = dataclasses.replace(whole.cfg.scorer, rescale=Rescale.ROW)
    source = dataclasses.replace(whole, cfg=dataclasses.replace(whole.cfg, scorer=scorer))
    options = ExportOptions(limits=GraphLimits(**TINY_LIMITS), thorough=False)
    return kept("tiny-published", lambda to: export_source(source, to, options))


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(published_bundle(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(published_bundle()) as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def model() -> TorchModel:
    model = TorchEvaluator(tiny_checkpoint())._model
    scorer = model.model.scorer
    assert scorer is not None
    scorer.cfg = dataclasses.replace(scorer.cfg, rescale=Rescale.ROW)
    model.model.cfg = model.config = dataclasses.replace(model.config, scorer=scorer.cfg)
    return model


def in_torch(model: TorchModel, count: int, keep_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Kept cells [F, C] and features [G, E] of `count` pictures as one finished clip."""
    pixels = [to_pixel_values(decode_jpeg(jpeg(i)), model.config.vision) for i in range(count)]
    with torch.inference_mode():
        found = encode_clips(
            model.model, torch.from_numpy(np.stack(pixels)), [count], keep_ratio=keep_ratio
        )
    return found.kept_FC.numpy(), found.features_GE.numpy()


class Chosen(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.clips: list[protocol.ClipChosen] = []

    def __call__(self, event: protocol.ServerEvent) -> None:
        super().__call__(event)
        if isinstance(event, protocol.ClipChosen):
            self.clips.append(event)

    def cells(self) -> list[list[int]]:
        return [frame.kept_cells for frame in self.clips[-1].frames]


async def send(client: Client, first: int, count: int) -> None:
    for number in range(first, first + count):
        await client.send_frame(jpeg(number), number * 500_000)
    await client.wait_processed()


@pytest.mark.parametrize("keep_ratio", [0.7, 0.5, 0.2])
def test_the_server_keeps_the_cells_that_torch_keeps(
    server: Server, model: TorchModel, keep_ratio: float
) -> None:
    async def session() -> tuple[Chosen, Client]:
        seen = Chosen()
        settings: Settings = {**CLIP, "keep_ratio": keep_ratio}
        async with await Client.connect(server.url, settings, on_event=seen) as client:
            await send(client, 0, FRAMES)
            assert all(event.gathered and not event.kept_cells for event in seen.accepted.values())
            assert client.frames.cells_kept == 0
            assert (await client.ask(QUESTION)).status == "completed"
            assert len(seen.clips) == 1
            assert (await client.ask(QUESTION)).status == "completed"
            assert len(seen.clips) == 1  # nothing came: nothing is chosen again
            return seen, client

    seen, client = run(session())
    expected, _ = in_torch(model, FRAMES, keep_ratio)
    assert seen.cells() == [np.flatnonzero(row).tolist() for row in expected]
    assert client.frames.cells_kept == seen.clips[0].cells_kept == int(expected.sum())
    assert client.frames.cells_seen == 9 * FRAMES


class Watched(Viewer):
    """A session in this process, with what its memory holds."""

    def __init__(self, engines: LoadedBundle, **changes: Any) -> None:
        super().__init__(engines, policy="clip", **changes)

    @property
    def remembered(self) -> list[FrameTokens]:
        return [known.frame for known in self.session._context._remembered]


@pytest.mark.parametrize("keep_ratio", [0.7, 0.4])
def test_its_features_are_those_of_the_published_code(
    engines: LoadedBundle, model: TorchModel, keep_ratio: float
) -> None:
    """Filled-up frames included: their kept cells see what was dropped of the frame."""
    viewer = Watched(engines, keep_ratio=keep_ratio)
    viewer.show(*range(FRAMES))
    assert not viewer.remembered
    viewer.ask(QUESTION)
    viewer.run()
    kept_FC, features = in_torch(model, FRAMES, keep_ratio)
    if keep_ratio == 0.7:
        assert context_of(kept_FC, variant="published").sum() > kept_FC.sum()
    got = np.concatenate([tokens.embeds for tokens in viewer.remembered])
    np.testing.assert_allclose(got, features, atol=1e-5, rtol=1e-4)


def test_a_longer_clip_is_chosen_from_anew(engines: LoadedBundle, model: TorchModel) -> None:
    viewer = Watched(engines, keep_ratio=0.5)
    for count in (3, FRAMES):
        viewer.show(*range(len(viewer.remembered), count))
        viewer.ask(QUESTION)
        viewer.run()
        expected, _ = in_torch(model, count, 0.5)
        got = [tokens.cells.tolist() for tokens in viewer.remembered]
        assert got == [np.flatnonzero(row).tolist() for row in expected]
    assert [event.cells_seen for event in viewer.of(protocol.ClipChosen)] == [27, 63]


def test_a_question_behind_a_cancelled_one_is_about_the_whole_clip(engines: LoadedBundle) -> None:
    viewer, fresh = Watched(engines), Watched(engines)
    viewer.show(*range(3))
    viewer.ask()
    viewer.step()  # the cells are chosen, one frame of three is encoded
    viewer.cancel(None)
    viewer.show(3, 4)
    fresh.show(*range(5))
    for asking in (viewer, fresh):
        asking.ask()
        asking.run()
    done, expected = (asking.of(protocol.ResponseDone)[-1] for asking in (viewer, fresh))
    assert [frame.seq for frame in viewer.remembered] == list(range(5))
    assert (done.text, done.usage) == (expected.text, expected.usage)


def test_another_share_is_chosen_by_at_the_next_question(engines: LoadedBundle) -> None:
    viewer = Watched(engines, keep_ratio=0.5)
    viewer.show(*range(FRAMES))
    viewer.ask(QUESTION)
    viewer.run()
    viewer.update(keep_ratio=0.2)
    viewer.ask(QUESTION)
    viewer.run()
    assert [event.cells_kept for event in viewer.of(protocol.ClipChosen)] == [32, 13]


def test_a_clip_that_does_not_fit_is_an_error_not_half_a_clip(engines: LoadedBundle) -> None:
    viewer = Watched(engines, keep_ratio=1.0, window_tokens=80)
    viewer.show(*range(12))
    reasons = viewer.drop_reasons()
    assert set(reasons.values()) == {"clip_full"}
    assert min(reasons) > 1
    viewer.ask(QUESTION)
    viewer.run()
    (error,) = viewer.of(protocol.Error)
    assert error.error.code == ClipTooLong.code
    assert "policy stream" in error.error.message
    assert not viewer.of(protocol.ResponseCreated)


def test_a_clip_that_grows_too_long_behind_an_answer_is_an_error(engines: LoadedBundle) -> None:
    viewer = Watched(engines, keep_ratio=1.0, window_tokens=80)
    number = 0
    while not viewer.drop_reasons():  # all that fits was asked about before
        answers = len(viewer.of(protocol.ResponseDone))
        assert answers == number < 12
        viewer.show(number)
        if not viewer.drop_reasons():
            viewer.ask(QUESTION)
            viewer.run()
        number += 1
    assert set(viewer.drop_reasons().values()) == {"clip_full"}
    viewer.ask(QUESTION)
    viewer.run()
    assert viewer.of(protocol.Error)[-1].error.code == ClipTooLong.code
    assert len(viewer.of(protocol.ResponseDone)) == answers


def test_memory_for_held_frames_is_bounded(engines: LoadedBundle) -> None:
    model = ModelLimits.from_bundle(engines.bundle)
    assert model.frame_bytes == 81 * 32 * 4
    cache = cache_capacity(model, ServerLimits()) * model.token_bytes
    limits = ServerLimits(max_session_bytes=cache + 3 * model.frame_bytes, max_question_tokens=32)
    assert clip_capacity(SessionSettings(), model, limits) == 3
    kept = dataclasses.replace(model, reuse_bytes=model.frame_bytes)
    assert clip_capacity(SessionSettings(reuse=4.0), kept, limits) == 2
    assert clip_capacity(SessionSettings(), kept, limits) == 3
    viewer = Watched(engines, limits=limits)
    viewer.show(*range(5))
    assert viewer.drop_reasons() == {3: "clip_full", 4: "clip_full"}
    with pytest.raises(ConfigError, match="no memory for it"):
        Watched(engines, limits=dataclasses.replace(limits, max_session_bytes=cache))


REFUSED: dict[str, tuple[Settings, str]] = {
    "live": ({"policy": "clip"}, "a live stream has no end"),
    "by time": ({**CLIP, "vision_tokens_per_s": 20.0}, "would be ignored"),
    "threshold": ({"delivery": "wait", "change_threshold": 0.1}, "--scorer change"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_it_cannot_work_it_is_refused_with_words(server: Server, case: str) -> None:
    settings, words = REFUSED[case]

    async def session() -> None:
        with pytest.raises(ConfigError, match=words):
            await Client.connect(server.url, settings)

    run(session())


def test_alerts_and_clips_exclude_each_other(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, CLIP) as client:
            with pytest.raises(AlertsUnsupported, match="when it is asked"):
                await client.create_alert(QUESTION)
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            await client.create_alert(QUESTION)
            with pytest.raises(ConfigError, match="delete the alerts"):
                await client.update({"policy": "clip"})

    run(session())


def test_a_stream_with_frames_cannot_become_a_clip(server: Server) -> None:
    async def session() -> None:
        both: list[Literal["stream", "clip"]] = ["stream", "clip"]
        for before, after in (both, both[::-1]):
            settings: Settings = {"delivery": "wait", "policy": before}
            async with await Client.connect(server.url, settings) as client:
                await send(client, 0, 1)
                with pytest.raises(ConfigError, match="begin another session"):
                    await client.update({"policy": after})
                assert client.settings.policy == before

    run(session())


def test_a_live_session_says_that_its_budget_is_another(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url) as client:
            assert any("finished clip" in note for note in client.notes)
            await client.update({"delivery": "wait", "policy": "clip"})
            assert not client.notes

    run(session())


def test_asking_about_a_file_takes_what_the_weights_were_published_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(write_video(tmp_path / "clip.mp4", num_frames=6))
    arguments = [video, QUESTION, "--threads", "1", "--max-answer-tokens", "3", "--bundle"]
    assert command_line(ask, [*arguments, str(published_bundle())]) == 0
    told = capsys.readouterr().err
    assert "27 of 54 cells kept, chosen over the whole clip" in told
    assert "note:" not in told
    assert command_line(ask, [*arguments, str(published_bundle()), "--policy", "stream"]) == 0
    told = capsys.readouterr().err
    assert "chosen over" not in told
    assert "note: the weights were published with a budget over the finished clip" in told
    assert command_line(ask, [*arguments, str(tiny_bundle())]) == 0
    assert "chosen over" not in capsys.readouterr().err
