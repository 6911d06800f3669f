"""What quantised graphs are compared on: values that pictures bring, repeated as needed."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import FP32, PRESETS
from edge_vlm_export.graphs.weights import open_weights, streamed_model
from edge_vlm_export.verify.check_inputs import RealInputs, real_inputs, sample_inputs
from edge_vlm_export.verify.compare_pipelines import bundle_pipeline
from edge_vlm_export.verify.ort_runner import Graphs, torch_run
from edge_vlm_export.verify.pipeline import drawn_clip
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_variant


def _real(bundle: EngineBundle, preset: str) -> RealInputs:
    model = streamed_model(open_weights(tiny_checkpoint()))
    run = torch_run(model, Graphs.of(bundle, 1))
    clip = drawn_clip(bundle.config.vision.image_size)
    return real_inputs(
        model, clip, run, lambda run: bundle_pipeline(run, bundle, keep_ratio=0.5), PRESETS[preset]
    )


def test_only_rounded_language_weights_call_for_real_words() -> None:
    bundle = EngineBundle.open(tiny_bundle())
    assert _real(bundle, FP32.label).language is None
    assert _real(bundle, "int4").language is not None


@pytest.mark.parametrize("name", ["plain", "ort-int4"])
def test_the_past_is_that_of_a_prompt(name: str) -> None:
    bundle = EngineBundle.open(tiny_bundle() if name == "plain" else tiny_variant(name))
    real = _real(bundle, "int4")
    assert real.language is not None
    embeds, cache = real.language.embeds, real.language.cache
    rows = len(embeds)
    assert rows > 10
    assert all(array.shape == (rows, 2, 16) for array in cache.values())
    sizes = {"s": 3, "p": rows - 1, "n": 1, "C": rows + 9}
    inputs = sample_inputs(bundle.specs["llm"], sizes, bundle.config, seed=0, real=real)
    assert (inputs["inputs_embeds"] == embeds[[rows - 1, 0, 1]]).all()
    for kind, array in cache.items():
        past = inputs[f"past_{kind}"]
        kept = past if name == "plain" else past[0, :, : rows - 1].swapaxes(0, 1)
        assert (kept == array[: rows - 1]).all()


def test_a_prompt_s_past_gives_its_logits() -> None:
    """The recorded rows are a prompt's: its last word, given again, gives what it gave."""
    bundle = EngineBundle.open(tiny_bundle())
    real = _real(bundle, "int4")
    assert real.language is not None
    rows = len(real.language.embeds)
    model = streamed_model(open_weights(tiny_checkpoint()))
    graphs = Graphs.of(bundle, 1)
    inputs = sample_inputs(
        bundle.specs["llm"], {"s": 1, "p": rows - 1, "n": 1}, bundle.config, seed=0, real=real
    )
    got = torch_run(model, graphs)("llm", inputs)["logits"][0]
    pipeline = bundle_pipeline(torch_run(model, graphs), bundle, keep_ratio=0.5)
    expected = pipeline.whole(drawn_clip(bundle.config.vision.image_size), num_tokens=1).logits
    np.testing.assert_allclose(got, expected, atol=1e-4)
