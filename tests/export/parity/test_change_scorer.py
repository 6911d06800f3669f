"""Weights exported with the scorer that has none: bundle, torch and a live stream choose alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.offline import choose
from edge_vlm.evaluation.runs import Run
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.inspect_bundle import describe_bundle, serving_facts
from edge_vlm.model.evaluator import TorchEvaluator, TorchModel
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import Cells, OverThreshold, make_policy
from edge_vlm_export.commands import verify
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import open_weights, scored_by_change
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.evaluation.bundle import OfflineBundle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.session.budget import default_settings, notes_on, video_window
from tests.runtime.cameras.pictures import picture, scene
from tests.runtime.command_line import command_line
from tests.tiny import TINY_LIMITS, kept, tiny_checkpoint

RUNS = [Run.parse(text) for text in ("stream:0.5", "frame_topk:0.3", "clip:0.5", "keep_all")]


def tiny_change_bundle() -> Path:
    options = ExportOptions(limits=GraphLimits(**TINY_LIMITS))
    source = scored_by_change(open_weights(tiny_checkpoint()))
    return kept("tiny-change", lambda to: export_source(source, to, options))


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(tiny_change_bundle())


@pytest.fixture(scope="module")
def torch_model() -> TorchModel:
    return TorchEvaluator(tiny_checkpoint(), by_change=True)._model


@pytest.fixture(scope="module")
def clip() -> list[np.ndarray]:
    """Movement, a standstill, and a cut to pictures of another shape."""
    wide = [np.repeat(each, 2, axis=1) for each in scene("slow", 3)]
    return [*scene("fast", 6), *scene("static", 4), *wide]


@pytest.fixture(scope="module")
def offline(bundle: EngineBundle) -> Iterator[OfflineBundle]:
    graphs = {name: OrtEngine(bundle, name, threads=1) for name in bundle.specs}
    opened = OfflineBundle(bundle, graphs)
    yield opened
    opened.close()


def chosen(model: TorchModel | OfflineBundle, run: Run, clip: list[np.ndarray]) -> list[Cells]:
    scores = model.look(clip)
    return [c for c in choose(run, scores, clip, 0, "first_whole", model.scored) if c is not None]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_torch_and_bundle_keep_the_same_cells_with_the_same_features(
    offline: OfflineBundle, torch_model: TorchModel, clip: list[np.ndarray], run: Run
) -> None:
    ours, theirs = chosen(offline, run, clip), chosen(torch_model, run, clip)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert len(ours[0]) == 9
    for got, wanted in zip(offline.features(ours), torch_model.features(ours), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_live_stream_keeps_them_too(
    bundle: EngineBundle, torch_model: TorchModel, clip: list[np.ndarray]
) -> None:
    expected = chosen(torch_model, RUNS[0], clip)
    with LoadedBundle.open(bundle.path, threads=1) as engines:
        state, policy = engines.vision.new_state(), make_policy("stream", 0.5)
        tokens = [
            engines.vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, policy)
            for i, rgb in enumerate(clip)
        ]
        for frame, cells in zip(tokens, expected, strict=True):
            np.testing.assert_array_equal(frame.cells, cells)
        assert tokens[0].scores.tolist() == [1.0] * 9  # nothing was kept before
        assert tokens[10].scores.min() > 3 * tokens[9].scores.max()  # the cut
        # Another stream does not see what this one kept.
        other = engines.vision.encode(
            Frame(rgb=clip[-1], pts_ns=0, seq=0), engines.vision.new_state(), policy
        )
        assert other.scores.tolist() == [1.0] * 9


def test_the_share_follows_the_scene_under_a_threshold(bundle: EngineBundle) -> None:
    still = [picture(1)] * 6
    cut = [picture(2)]
    with LoadedBundle.open(bundle.path, threads=1) as engines:
        state, policy = engines.vision.new_state(), OverThreshold(1e-6, min_cells=1)
        counts = [
            len(engines.vision.encode(Frame(rgb=rgb, pts_ns=0, seq=0), state, policy).cells)
            for rgb in [*still, *cut, *cut]
        ]
    assert counts == [9, 1, 1, 1, 1, 1, 9, 1]


def test_the_manifest_says_it_and_so_does_inspect(bundle: EngineBundle) -> None:
    assert bundle.config.scorer is None
    assert bundle.config.change is not None
    assert [t.name for t in bundle.specs["vit_stem"].tensors] == ["pixels", "hidden", "scored"]
    assert "policy" not in bundle.defaults  # it is pruned like any model with scores
    facts = serving_facts(bundle)
    assert facts["scorer"].startswith("change since a cell was last kept, behind block 1")
    assert facts.items() <= describe_bundle(bundle.path).facts.items()
    assert bundle.config.attention is VisionAttention.FRAME or "frames" in facts["attention"]


def test_it_is_verified_against_the_checkpoint(
    bundle: EngineBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundle.path), "--checkpoint", str(tiny_checkpoint()), "--quick"]
    assert command_line(verify, arguments) == 0
    assert "every graph agrees" in capsys.readouterr().out


def test_every_budget_works_and_a_threshold_only_here(bundle: EngineBundle) -> None:
    limits, model = ServerLimits(max_question_tokens=32), ModelLimits.from_bundle(bundle)
    settings = default_settings(bundle, limits)
    assert (settings.policy, settings.keep_ratio) == ("stream", 0.5)
    followed = settings.changed({"change_threshold": 0.02})
    assert video_window(followed, model, limits) > 0
    assert any("keep_ratio has no say" in note for note in notes_on(followed, model))
    for also in ({"policy": "random"}, {"policy": "keep_all"}, {"vision_tokens_per_s": 20.0}):
        with pytest.raises(ConfigError, match="change_threshold"):
            video_window(followed.changed(also), model, limits)


def test_a_block_behind_the_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="after_block"):
        scored_by_change(open_weights(tiny_checkpoint()), 3)
