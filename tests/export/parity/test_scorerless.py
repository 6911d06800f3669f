"""A model without a token scorer becomes a bundle that keeps every cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Frame
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.policies import KeepAll
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import WeightSource, open_weights, streamed_model
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.session.budget import default_settings, video_window
from tests.tiny import TINY_LIMITS, kept, tiny_checkpoint


@pytest.fixture(scope="module")
def source() -> WeightSource:
    whole = open_weights(tiny_checkpoint())
    return replace(whole, cfg=replace(whole.cfg, scorer=None))


@pytest.fixture(scope="module")
def bundle(source: WeightSource) -> EngineBundle:
    options = ExportOptions(limits=GraphLimits(**TINY_LIMITS))
    folder = kept("tiny-scorerless", lambda to: export_source(source, to, options))
    return EngineBundle.open(folder)


def test_its_stem_only_embeds(bundle: EngineBundle) -> None:
    spec = bundle.specs["vit_stem"]
    assert [t.name for t in spec.tensors] == ["pixels", "hidden"]
    assert bundle.defaults["policy"] == "keep_all"


def test_frames_equal_torch(bundle: EngineBundle, source: WeightSource) -> None:
    torch = pytest.importorskip("torch")
    model, vision = streamed_model(source), source.cfg.vision
    rng = np.random.default_rng(4)
    with LoadedBundle.open(bundle.path, threads=1) as engines:
        state = engines.vision.new_state()
        for i in range(3):
            rgb = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
            tokens = engines.vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, KeepAll())
            cells = torch.arange(vision.num_cells)
            with torch.no_grad():
                hidden = model.vit.embed(torch.from_numpy(to_pixel_values(rgb, vision))[None])
                expected = model.vit_trunk(hidden, cells, cells * 0)
            np.testing.assert_allclose(tokens.embeds, expected, atol=1e-5, rtol=1e-4)


def test_policies_that_need_scores_are_refused(bundle: EngineBundle) -> None:
    limits, model = ServerLimits(max_question_tokens=32), ModelLimits.from_bundle(bundle)
    settings = default_settings(bundle, limits)
    assert (settings.policy, settings.keep_ratio) == ("keep_all", 1.0)
    assert video_window(settings, model, limits) > 0
    for policy in ("stream", "frame_topk"):
        with pytest.raises(ConfigError, match="no token scorer"):
            video_window(settings.changed({"policy": policy}), model, limits)
    for policy in ("random", "difference"):
        assert video_window(settings.changed({"policy": policy}), model, limits) > 0


@pytest.mark.parametrize(
    "ignored",
    [{"keep_ratio": 0.5}, {"vision_tokens_per_s": 40.0}, {"change_threshold": 0.1}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_would_have_no_effect_is_refused_with_the_way_out(
    bundle: EngineBundle, ignored: dict[str, float]
) -> None:
    limits, model = ServerLimits(max_question_tokens=32), ModelLimits.from_bundle(bundle)
    settings = default_settings(bundle, limits).changed(ignored)
    with pytest.raises(ConfigError, match=next(iter(ignored))) as caught:
        video_window(settings, model, limits)
    assert "--scorer change" in str(caught.value)
    if "change_threshold" not in ignored:
        assert "difference" in str(caught.value)
        assert video_window(settings.changed({"policy": "difference"}), model, limits) > 0


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"keep_ratio": 0.5}, "would be ignored"),
        ({"keep_ratio": 2.0}, r"must be in \(0, 1\]"),
        ({"change_threshold": 0.1}, "change_threshold .*--scorer change"),
        ({"policy": "stream"}, "policy=stream chooses by scores"),
    ],
)
def test_an_export_refuses_defaults_that_cannot_be(
    source: WeightSource, tmp_path: Path, defaults: dict[str, Any], message: str
) -> None:
    options = ExportOptions(defaults=defaults)
    with pytest.raises(ConfigError, match=message):
        export_source(source, tmp_path / "bundle", options)
    assert not list(tmp_path.iterdir())
