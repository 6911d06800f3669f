"""A live stream that computes what changed: as torch does it, never with another scene's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from edge_vlm.errors import ConfigError, EngineError, NonFinite
from edge_vlm.model.evaluator import TorchEvaluator
from edge_vlm.model.reuse import new_state, reuse_step
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.frames import Frame
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.policies import KeepAll
from edge_vlm.pruning.reuse import CellsComputed, ReuseRule
from edge_vlm_runtime import protocol
from edge_vlm_runtime.evaluation.bundle import BundleEvaluator
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.stem_reuse import StemReuse
from edge_vlm_runtime.inference.vision import FrameTokens, VisionPipeline, VisionState
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.protocol.typed import Settings
from tests.runtime.cameras.pictures import picture, scene
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_reuse_bundle

WATCH: Settings = {"delivery": "wait", "policy": "keep_all", "keep_ratio": 1.0}
REUSE: Settings = {**WATCH, "reuse": 4.0}
RULE = ReuseRule(threshold=4.0)
SIZE = 36


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_reuse_bundle(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return TorchEvaluator(tiny_checkpoint())._model.model


def still(seed: int, count: int, size: int = SIZE) -> list[np.ndarray]:
    return [picture(seed, size)] * count


def spot(rgb: np.ndarray, top: int, left: int, size: int = 6) -> np.ndarray:
    """The same picture with a square in it."""
    other = rgb.copy()
    other[top : top + size, left : left + size] = 255 - other[top : top + size, left : left + size]
    return other


def encode(
    engines: LoadedBundle,
    pictures: Sequence[np.ndarray],
    rule: ReuseRule | None,
    state: VisionState | None = None,
) -> list[FrameTokens]:
    """Every cell is kept, so that features can be compared."""
    vision = engines.vision
    state = vision.new_state() if state is None else state
    vision.set_reuse(state, rule)
    return [
        vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, KeepAll())
        for i, rgb in enumerate(pictures)
    ]


def close(got: FrameTokens, wanted: FrameTokens) -> None:
    np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-5)
    np.testing.assert_allclose(got.embeds, wanted.embeds, atol=1e-4)


def shares(events: Sequence[object]) -> list[float]:
    return [e.share_recomputed for e in events if isinstance(e, protocol.FrameAccepted)]


def watch(engines: LoadedBundle, pictures: Sequence[np.ndarray], settings: Settings) -> list[float]:
    """Shares recomputed, of every frame of a session."""
    with engines.session(settings) as session:
        return shares([session.send_frame(rgb, i * 500_000) for i, rgb in enumerate(pictures)])


# ---- what is computed ------------------------------------------------------------------------


def test_threshold_0_is_the_stream_without_reuse(engines: LoadedBundle) -> None:
    wide = [np.repeat(each, 2, axis=1) for each in scene("slow", 2)]
    pictures = [*scene("fast", 3), *scene("static", 2), *wide]
    anew = encode(engines, pictures, ReuseRule(threshold=0.0))
    for got, wanted in zip(anew, encode(engines, pictures, None), strict=True):
        assert got.share_computed == 1.0
        close(got, wanted)


def test_a_stream_is_what_torch_makes_of_the_same_cells(
    engines: LoadedBundle, model: VideoLM
) -> None:
    ground = scene("static", 1)[0]
    pictures = [ground, spot(ground, 8, 8), spot(ground, 8, 8), spot(ground, 50, 8), ground]
    pictures += [picture(3), picture(3)]
    vision = model.cfg.vision
    rule = ReuseRule(threshold=4.0, refresh_frames=3)
    cells, state, seen = CellsComputed(vision.num_cells, rule), new_state(model.cfg), []
    for i, tokens in enumerate(encode(engines, pictures, rule)):
        pixels = to_pixel_values(pictures[i], vision)
        size = (pictures[i].shape[0], pictures[i].shape[1])
        chosen = cells.next(pixels, size)
        with torch.no_grad():
            if len(chosen):
                index = torch.from_numpy(chosen.astype(np.int64))
                changed = torch.from_numpy(pixels)[model.vit.cell_patches_C9[index]]
                scores, state = reuse_step(model, changed, index, torch.tensor([i == 0]), state)
            else:
                scores = state.resting_1C
            everything = torch.arange(vision.num_cells)
            features = model.vit_trunk(state.hidden_1ND, everything, everything * 0)
        cells.computed(pixels, size, chosen)
        assert scores is not None
        np.testing.assert_allclose(tokens.scores, scores[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(tokens.embeds, features.numpy(), atol=1e-4)
        seen.append(tokens.share_computed)
        assert tokens.share_computed == len(chosen) / vision.num_cells
    assert seen[0] == seen[5] == 1.0
    assert min(seen) < 0.5


def test_streams_that_take_turns_are_as_if_alone(engines: LoadedBundle) -> None:
    ground = scene("static", 1)[0]
    first = [ground, spot(ground, 8, 8), ground, spot(ground, 50, 50)]
    second = [picture(1, 96), picture(1, 96), spot(picture(1, 96), 70, 8), picture(2, 96)]
    states = [engines.vision.new_state() for _ in range(2)]
    turns = [
        encode(engines, [pictures[i]], RULE, state)[0]
        for i in range(4)
        for pictures, state in zip((first, second), states, strict=True)
    ]
    for alone, mine in (
        (encode(engines, first, RULE), turns[::2]),
        (encode(engines, second, RULE), turns[1::2]),
    ):
        for got, wanted in zip(mine, alone, strict=True):
            np.testing.assert_array_equal(got.embeds, wanted.embeds)
            assert got.share_computed == wanted.share_computed


class HostMemory:
    """Stands for a device's memory; graphs on the CPU can read it, too."""

    def __init__(self) -> None:
        self.held: dict[int, np.ndarray] = {}

    def alloc(self, num_bytes: int) -> int:
        array = np.full(num_bytes, 255, np.uint8)  # NaN, as any number may be there
        self.held[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, pointer: int) -> None:
        del self.held[pointer]

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        raise AssertionError("states are not copied")

    to_host = copy

    def synchronize(self) -> None: ...


def test_keys_and_values_may_lie_in_the_memory_of_a_device(engines: LoadedBundle) -> None:
    memory, vision = HostMemory(), engines.vision
    assert vision._reuse is not None
    reuse = StemReuse(vision._reuse._engine, vision.num_cells, memory)
    assert not memory.held  # before a stream asks for it
    there = VisionPipeline(vision._stem, vision._trunk, vision._cfg, reuse)
    ground = scene("static", 1)[0]
    pictures = [ground, spot(ground, 8, 8), spot(ground, 50, 8), picture(3)]
    state = there.new_state()
    there.set_reuse(state, RULE)
    found = [
        there.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, KeepAll())
        for i, rgb in enumerate(pictures)
    ]
    blocks = engines.bundle.config.whole_blocks
    assert len(memory.held) == 2 * 2 * blocks
    for got, wanted in zip(found, encode(engines, pictures, RULE), strict=True):
        np.testing.assert_array_equal(got.embeds, wanted.embeds)
    there.set_reuse(state, None)
    assert len(memory.held) == 2 * blocks  # the stream's are free
    vision._stem.bind_array("hidden", vision._hidden)  # as the module's pipeline has it
    vision._stem.bind_array("is_first", vision._is_first)


# ---- bad input -------------------------------------------------------------------------------


def test_after_a_cut_nothing_is_left_of_the_other_scene(engines: LoadedBundle) -> None:
    half = picture(2, SIZE)
    half[:18] = picture(1, SIZE)[:18]
    for after in (still(2, 2), [half, half]):
        pictures = [*still(1, 4), *after]
        got, wanted = encode(engines, pictures, RULE), encode(engines, pictures, None)
        assert got[4].share_computed == 1.0
        close(got[4], wanted[4])
        assert got[5].share_computed < 1.0


def test_another_size_is_computed_whole(engines: LoadedBundle) -> None:
    """The second half shows the same grey, only larger: no pixel of the model's picture changes."""
    grey = [np.full((size, size, 3), 90, np.uint8) for size in (36, 36, 72, 72)]
    seen = watch(engines, grey, {**REUSE, "drop_duplicates": False})
    assert [share == 1.0 for share in seen] == [True, False, True, False]


def test_a_camera_that_stalls_costs_nothing_and_is_seen_when_it_goes_on(
    engines: LoadedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    engine = engines.vision._reuse._engine  # type: ignore[union-attr]
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda: runs.append(run()))
    stalled = [*still(1, 3), picture(5, SIZE)]
    seen = watch(engines, stalled, {**REUSE, "reuse_refresh": 1_000_000})
    assert seen == [1.0, round(1 / 9, 4), 0.0, 1.0]
    assert len(runs) == 3
    # Live, what looks like the last picture is dropped before it comes here.
    with engines.session({**REUSE, "delivery": "live", "fps_cap": 1000.0}) as session:
        outcomes = [session.send_frame(rgb, i * 500_000) for i, rgb in enumerate(stalled)]
    assert [type(outcome) for outcome in outcomes] == [
        *(protocol.FrameAccepted, protocol.FrameDropped, protocol.FrameDropped),
        protocol.FrameAccepted,
    ]
    assert shares(outcomes) == [1.0, 1.0]


def test_a_setting_that_changes_in_mid_stream_holds_from_the_next_frame_on(
    engines: LoadedBundle,
) -> None:
    rgb = still(1, 1)[0]
    dim = np.clip(rgb.astype(int) - 6, 0, 255).astype(np.uint8)
    with engines.session(WATCH) as session:
        seen: list[float] = []

        def show(each: np.ndarray) -> None:
            seen.extend(shares([session.send_frame(each, len(seen) * 500_000)]))

        show(rgb)
        session.update({"reuse": 4.0})
        show(rgb)  # nothing was kept before
        show(rgb)
        session.update({"reuse": 20.0})
        show(dim)  # what is kept stays
        session.update({"reuse": 4.0})
        show(dim)
        session.update({"reuse": 0.0})
        show(dim)
        session.update({"reuse": 4.0})
        show(dim)  # nothing is kept from before the pause
        show(dim)
    whole = [share == 1.0 for share in seen]
    assert whole == [True, True, False, False, True, True, True, False]


def test_features_are_right_after_every_change_of_the_setting(engines: LoadedBundle) -> None:
    pictures = [*still(1, 3), *still(2, 3)]
    wanted = encode(engines, pictures, None)
    state, vision = engines.vision.new_state(), engines.vision
    for i, rgb in enumerate(pictures):
        vision.set_reuse(state, RULE if i in (1, 2, 4) else None)
        got = vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, KeepAll())
        if i != 2:  # the frame that keeps states
            close(got, wanted[i])


@pytest.mark.parametrize("graph", ["trunk", "reuse"])
def test_after_a_frame_that_failed_the_next_is_computed_whole(
    engines: LoadedBundle, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    state = engines.vision.new_state()
    encode(engines, still(1, 2), RULE, state)
    changed = spot(picture(1, SIZE), 8, 8)
    engine = engines.vision._trunk if graph == "trunk" else engines.vision._reuse._engine  # type: ignore[union-attr]

    def fail() -> None:
        raise NonFinite("the features of a frame are not finite", where="vit_trunk")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", fail)
        with pytest.raises(EngineError):
            encode(engines, [changed], RULE, state)
    got = encode(engines, [changed], RULE, state)[0]
    assert got.share_computed == 1.0
    close(got, encode(engines, [*still(1, 2), changed], None)[-1])


def test_what_is_computed_does_not_depend_on_when_frames_join_the_memory(
    engines: LoadedBundle,
) -> None:
    """Rebases come with a prefill, and how many frames share one is a matter of the machine's
    load: what is kept of pictures does not speak of positions, and stays."""
    events: list[protocol.ServerEvent] = []
    rgb = still(1, 1)[0]
    shown = [spot(rgb, i % 5, 3 + i % 3, 3) for i in range(60)]
    with engines.session(REUSE, on_event=events.append) as session:
        seen = shares([session.send_frame(each, i * 500_000) for i, each in enumerate(shown)])
    assert any(isinstance(event, protocol.MemoryRebased) for event in events)
    alone = [round(tokens.share_computed, 4) for tokens in encode(engines, shown, RULE)]
    assert seen == alone
    assert min(seen) < 1.0


def test_a_clip_that_is_chosen_when_asked_is_looked_at_with_reuse(engines: LoadedBundle) -> None:
    clip: Settings = {"delivery": "wait", "policy": "clip", "reuse": 4.0, "max_answer_tokens": 4}
    with engines.session(clip) as session:
        outcomes = [session.send_frame(rgb, i * 500_000) for i, rgb in enumerate(still(1, 3))]
        assert session.ask("is there a red ball ?").status == "completed"
    assert [share == 1.0 for share in shares(outcomes)] == [True, False, False]


def test_a_bundle_without_the_graph_says_so() -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as plain:
        assert ModelLimits.from_bundle(plain.bundle).reuse_bytes == 0
        with pytest.raises(ConfigError, match=r"bundle has none.*--reuse"):
            plain.session(REUSE)
        with plain.session(WATCH) as session:
            with pytest.raises(ConfigError, match="bundle has none"):
                session.update({"reuse": 4.0})
            assert session.settings.reuse == 0.0
            assert shares([session.send_frame(still(1, 1)[0], 0)]) == [1.0]


def test_a_session_whose_memory_is_taken_by_the_cache_says_so(engines: LoadedBundle) -> None:
    model = ModelLimits.from_bundle(engines.bundle)
    limits = ServerLimits(max_session_bytes=model.token_bytes * 300, kv_capacity_tokens=300)
    with pytest.raises(ConfigError, match=r"reuse keeps .* bytes.*--session-memory"):
        engines.session(REUSE, limits=limits)
    with engines.session(WATCH, limits=limits) as session:
        assert shares([session.send_frame(still(1, 1)[0], 0)]) == [1.0]


# ---- evaluation ------------------------------------------------------------------------------


def test_evaluations_look_at_clips_as_a_stream_does(engines: LoadedBundle) -> None:
    ground = scene("static", 1)[0]
    pictures = [ground, spot(ground, 8, 8), spot(ground, 50, 8), *still(3, 2)]
    model = TorchEvaluator(tiny_checkpoint(), reuse=4.0)._model
    in_torch = model.look(pictures)
    offline = BundleEvaluator(tiny_reuse_bundle(), 1, reuse=4.0)
    try:
        in_bundle = offline.model.look(pictures)
        everything = [np.arange(9, dtype=np.int32)] * len(pictures)
        for mine, other in zip(
            offline.model.features(everything), model.features(everything), strict=True
        ):
            np.testing.assert_allclose(mine, other, atol=1e-4)
    finally:
        offline.close()
    np.testing.assert_allclose(in_bundle, in_torch, atol=1e-5)
    live = encode(engines, pictures, RULE)
    np.testing.assert_allclose(np.stack([tokens.scores for tokens in live]), in_torch, atol=1e-5)
    assert np.abs(in_torch - TorchEvaluator(tiny_checkpoint())._model.look(pictures)).max() > 1e-4


def test_an_evaluation_of_a_bundle_without_the_graph_says_so() -> None:
    with pytest.raises(ConfigError, match="bundle has none"):
        BundleEvaluator(tiny_bundle(), 1, reuse=4.0)
