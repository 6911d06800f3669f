"""The graph of changed cells in bundles of every precision, and where there can be none."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import VIT_STEM_REUSE, EngineBundle
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import KeepAll
from edge_vlm.pruning.reuse import ReuseRule
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import open_weights, scored_by_change
from edge_vlm_export.quantize.plan import PrecisionPlan
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_export.verify.verify import verify_bundle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.export.trt_lint import lint
from tests.runtime.cameras.pictures import picture, scene
from tests.tiny import TINY_LIMITS, kept, tiny_checkpoint, tiny_footage, tiny_reuse_bundle

PRECISIONS = {
    "edge": {"precision": "base=float16,vit=int8"},
    "ort": {"precision": "base=float16,vit=int8", "variant": "ort"},
}


def _export(wanted: dict[str, str], target: Path) -> None:
    options = ExportOptions(
        limits=GraphLimits(**TINY_LIMITS),
        precision=Precision.parse(wanted.get("precision", "fp32")),
        variant=Variant(wanted.get("variant", "portable")),
        reuse=True,
        footage=(tiny_footage(),) if "precision" in wanted else (),
        max_frames=4,
    )
    source = open_weights(tiny_checkpoint())
    export_source(scored_by_change(source) if "change" in wanted else source, target, options)


def reuse_bundle(name: str) -> EngineBundle:
    if name == "plain":
        return EngineBundle.open(tiny_reuse_bundle())
    wanted = {"change": "yes"} if name == "change" else PRECISIONS[name]
    return EngineBundle.open(kept(f"tiny-reuse-{name}", partial(_export, wanted)))


@pytest.mark.parametrize("name", ["plain", "change", *PRECISIONS])
def test_a_bundle_agrees_with_itself(name: str) -> None:
    report = verify_bundle(reuse_bundle(name))
    report.require()
    assert [result.graph for result in report.graphs].count(VIT_STEM_REUSE) == 1
    assert "every cell as a changed one" in str(report)


def test_weights_lie_in_the_stems_file_and_no_scatter_is_larger_than_a_frame() -> None:
    onnx = pytest.importorskip("onnx")
    bundle = reuse_bundle("plain")
    model = onnx.load(bundle.graph_path(VIT_STEM_REUSE), load_external_data=False)
    places = {
        entry.value: tensor.dims
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert "vit_stem.weights" in places
    own = bundle.graph_path(VIT_STEM_REUSE).with_suffix(".weights")
    assert not own.is_file() or own.stat().st_size < 4096  # tables, no weights
    # Each writes into a tensor of the frame that comes in, so none can be larger than that.
    scatters = [node for node in model.graph.node if node.op_type.startswith("Scatter")]
    into = [node.input[0] for node in scatters]
    names = [tensor.name for tensor in bundle.specs[VIT_STEM_REUSE].inputs]
    of_blocks = {name for name in names if name.startswith("kept_")}
    assert of_blocks < set(into)
    assert len(scatters) == len(of_blocks) + 4  # hidden states, cells, and scores twice
    assert lint(model).problems == ()


def test_a_rounded_bundle_has_a_rounded_graph_and_a_small_memory() -> None:
    bundle = reuse_bundle("edge")
    spec = bundle.specs[VIT_STEM_REUSE]
    kept_dtypes = {t.dtype for t in spec.tensors if t.name.startswith(("kept_", "next_"))}
    assert kept_dtypes == {"float16"}
    text = (bundle.path / "precision_plan.json").read_text()
    plan = PrecisionPlan.from_json(text)
    of_stem, of_reuse = (
        [node.module for node in plan.graphs[name] if node.activations == "int8"]
        for name in ("vit_stem", VIT_STEM_REUSE)
    )
    assert sorted(of_reuse) == sorted(of_stem)
    assert of_reuse


@pytest.mark.parametrize(("name", "tolerance"), [("change", 1e-4), ("edge", 0.1), ("ort", 0.1)])
def test_served_it_is_the_stream_without_reuse_where_everything_changes(
    name: str, tolerance: float
) -> None:
    pictures = [*scene("fast", 2), picture(3), picture(3)]
    with LoadedBundle.open(reuse_bundle(name).path, threads=1) as engines:
        seen = []
        for rule in (None, ReuseRule(threshold=0.0)):
            state = engines.vision.new_state()
            engines.vision.set_reuse(state, rule)
            seen.append(
                [
                    engines.vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, KeepAll())
                    for i, rgb in enumerate(pictures)
                ]
            )
        for plain, reused in zip(*seen, strict=True):
            np.testing.assert_allclose(reused.scores, plain.scores, atol=tolerance)
            np.testing.assert_allclose(reused.embeds, plain.embeds, atol=tolerance)
        state = engines.vision.new_state()
        engines.vision.set_reuse(state, ReuseRule(threshold=8.0))
        still = [
            engines.vision.encode(Frame(rgb=picture(3), pts_ns=i, seq=i), state, KeepAll())
            for i in range(3)
        ]
        assert [tokens.share_computed for tokens in still] == [1.0, pytest.approx(1 / 9), 0.0]
        if name == "change":
            assert still[2].scores.max() == 0.0


def test_what_cannot_be_reused_is_refused(tmp_path: Path) -> None:
    source = open_weights(tiny_checkpoint())
    limits = GraphLimits(**TINY_LIMITS)
    without = ExportOptions(limits=limits, defaults={"reuse": 4.0})
    with pytest.raises(ConfigError, match=r"graph of its own.*add --reuse"):
        export_source(source, tmp_path / "bundle", without)
    scorerless = replace(source, cfg=replace(source.cfg, scorer=None))
    with pytest.raises(ConfigError, match="in front of the scorer"):
        export_source(scorerless, tmp_path / "bundle", ExportOptions(limits=limits, reuse=True))
    assert not (tmp_path / "bundle").exists()
