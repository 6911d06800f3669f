"""A plan of precisions: GPTQ against brute force and plain rounding, outliers, and what export
makes of the file."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.calibrated.precision import PlannedArrays, PrecisionSection, carry_arrays
from edge_vlm.formats.calibration import Calibration
from edge_vlm.formats.precision import PRESETS, Precision, Variant
from edge_vlm_calibration.precision import gptq
from edge_vlm_calibration.precision.commands import make
from edge_vlm_calibration.precision.smoothing import choose, output_error
from edge_vlm_calibration.precision.states import States, lost_share
from edge_vlm_calibration.provenance import identity_of, provenance_of
from edge_vlm_export.calibrated import CalibrationOf
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.quantize.convert import Calibrated, convert
from edge_vlm_export.quantize.plan import exceptions, plan_graph
from edge_vlm_export.quantize.rounding import quantize_blocks
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from edge_vlm_export.trace.graph_files import load_graph, save_graph
from edge_vlm_export.verify.check_inputs import sample_inputs
from edge_vlm_export.verify.compare import cosine
from edge_vlm_export.verify.ort_runner import OrtRunner
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_footage


def _correlated(states: int, inputs: int, seed: int = 0) -> Tensor:
    """As activations are: a few directions carry most of it."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=random) * torch.arange(1, inputs + 1) ** -0.75
    return torch.randn(states, inputs, generator=random) @ mixed.T


def _weight(inputs: int, outputs: int, seed: int = 1) -> Tensor:
    return torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))


def test_gptq_is_near_the_best_rounding_there_is() -> None:
    """Of all roundings up to four steps from the nearest, on the grid that GPTQ chose."""
    states, weight = _correlated(400, 4), _weight(4, 20)
    moments = states.T @ states
    numbers, scale = gptq.round_weight(weight, gptq.inverse_factor(moments, 1e-6), 4)
    got = ((states @ (gptq.restored(numbers, scale) - weight)) ** 2).sum(0)
    near = (weight / scale).round().clamp(-8, 7)
    steps = torch.tensor(list(itertools.product(range(-4, 5), repeat=4)))
    tried = (near + steps[:, :, None]).clamp(-8, 7) * scale - weight
    best = torch.einsum("cin,ij,cjn->cn", tried, moments, tried).amin(0)
    assert (got >= best * 0.999).all()
    assert (got / best).mean() < 1.3


def test_gptq_loses_less_than_rounding_by_weights_alone() -> None:
    """Judged by states that it has not seen."""
    states, weight = _correlated(2000, 64), _weight(64, 20)
    seen, unseen = states[::2], states[1::2]
    rounded = gptq.restored(*gptq.round_weight(weight, gptq.inverse_factor(seen.T @ seen), 16))
    plain = gptq.restored(*gptq.round_nearest(weight, 16))
    exact = unseen @ weight
    assert lost_share(unseen @ rounded, exact) < 0.5 * lost_share(unseen @ plain, exact)


def test_gptq_without_correlation_rounds_to_the_nearest() -> None:
    weight = _weight(32, 7)
    numbers, scale = gptq.round_weight(weight, gptq.inverse_factor(torch.eye(32)), 16)
    expected = (weight / scale.repeat_interleave(16, 0)).round().clamp(-8, 7)
    assert (numbers.float() == expected).all()
    # The same grid as the exporter's own rounding.
    own, own_scale = quantize_blocks(weight.numpy(), 4, 16)
    np.testing.assert_array_equal(own, numbers.numpy())
    np.testing.assert_allclose(own_scale, scale.numpy(), rtol=1e-6)


def test_pieces_of_outputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight = _correlated(100, 32), _weight(32, 10)
    factor = gptq.inverse_factor(states.T @ states)
    numbers, scale = gptq.round_weight(weight, factor, 16)
    monkeypatch.setattr(gptq, "PIECE_OUTPUTS", 3)
    in_pieces, its_scale = gptq.round_weight(weight, factor, 16)
    # Products of other shapes are summed otherwise on some CPUs, and a number next to a half turns.
    torch.testing.assert_close(its_scale, scale)
    assert (in_pieces != numbers).float().mean() < 0.02


def test_dead_inputs_and_blocks_that_do_not_divide() -> None:
    states, weight = _correlated(100, 32), _weight(32, 4)
    states[:, 3] = 0
    numbers, scale = gptq.round_weight(weight, gptq.inverse_factor(states.T @ states), 16)
    assert torch.isfinite(gptq.restored(numbers, scale)).all()
    with pytest.raises(ValueError, match="do not divide"):
        gptq.round_weight(weight, gptq.inverse_factor(torch.eye(32)), 24)


def test_int8_survives_two_features_past_float16() -> None:
    """As in the published model's last vision blocks: two features of the residual stream past
    65,504. Behind the norm they are all that one scale sees, unless they move into the weights."""
    random = torch.Generator().manual_seed(0)
    stream = torch.randn(600, 64, generator=random)
    stream[:, [5, 40]] += torch.tensor([70_000.0, -70_000.0])
    assert stream.abs().max() > torch.finfo(torch.float16).max
    # Trained norms make the small features count again.
    gain = torch.full((64,), 3000.0)
    gain[[5, 40]] = 1.0
    normed = torch.nn.functional.layer_norm(stream, (64,), gain)
    normed[:, [5, 40]] *= 5
    seen = States(256)
    seen.add(normed)
    assert seen.channels is not None
    assert (seen.outliers, seen.max_abs > 25) == (2, True)
    weight = _weight(64, 32) / 8
    plain = output_error(seen.judged_by, weight, None, seen.max_abs)
    how = choose(seen.chosen_by, seen.channels, [weight], foldable=True)
    planned = output_error(seen.judged_by, weight, how.factor_K, how.range)
    assert how.strength > 0
    assert planned < plain / 5
    assert planned < 0.02


def test_states_are_a_fair_sample_and_split_in_two() -> None:
    seen = States(100)
    for start in range(0, 10_000, 37):
        rows = torch.arange(start, min(start + 37, 10_000), dtype=torch.float32)
        seen.add(rows[:, None])
    chosen, judged = seen.chosen_by, seen.judged_by
    assert (len(chosen), len(judged), seen.max_abs) == (100, 100, 9999.0)
    both = torch.cat([chosen, judged]).flatten()
    assert len(both.unique()) == 200
    assert abs(float(both.mean()) - 5000) < 4 * 2900 / 200**0.5


def test_what_all_states_share_does_not_hide_an_error() -> None:
    exact = torch.randn(50, 4) + 1000
    assert lost_share(exact.mean(0).expand(50, 4), exact) == pytest.approx(1.0, rel=1e-3)


# ---- the section and the exporter ----------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precision") / "calibration.json"
    checkpoint, clips = tiny_checkpoint(), [tiny_footage()]
    section, notes = make(checkpoint, clips, 2.0, 4, out)
    file = Calibration(model=identity_of(checkpoint))
    file.with_section(section, provenance_of(clips, {}), notes).write(out)
    return out


@pytest.fixture(scope="module")
def section(calibrated: Path) -> PrecisionSection:
    found = Calibration.read(calibrated).find(PrecisionSection)
    assert found is not None
    return found


def test_every_product_has_a_plan(calibrated: Path, section: PrecisionSection) -> None:
    plans = section.by_module()
    cfg = EngineBundle.open(tiny_bundle()).config
    assert sum(name.startswith("vit.blocks.") for name in plans) == 6 * cfg.vision.num_layers
    assert sum(name.startswith("llm.blocks.") for name in plans) == 7 * cfg.language.num_layers
    assert "llm.head" in plans
    assert plans["connector.project.down"].weights == "base"
    language = [plan for name, plan in plans.items() if name.startswith("llm.blocks.")]
    assert {plan.method for plan in language} == {"gptq"}
    lost = [sum(getattr(p, kind) for p in language) for kind in ("error", "error_nearest")]
    assert lost[0] < 0.7 * lost[1]
    arrays = PlannedArrays.of(section, calibrated)
    numbers, scale = arrays.weight("llm.blocks.0.mlp.down")
    assert numbers.shape == (cfg.language.mlp_width, cfg.language.width)
    assert numbers.min() >= -8
    assert numbers.max() <= 7
    assert len(numbers) % len(scale) == 0
    assert {path.name for path in calibrated.parent.iterdir()} == {
        calibrated.name,
        "calibration.rounded.npz",
    }
    notes = Calibration.read(calibrated).sections["precision"].notes
    assert any("products as int8" in line for line in notes)


def _converted(
    graph: str, precision: Precision, variant: Variant, plan: Calibrated, folder: Path
) -> tuple[ir.Model, Path]:
    spec = EngineBundle.open(tiny_bundle()).specs[graph]
    model = load_graph(tiny_bundle() / "graphs" / f"{graph}.onnx")
    nodes = plan_graph(model.graph, spec, precision, None, plan.products)
    convert(model, spec, nodes, None, variant, plan)
    path = folder / f"{variant.value}-{graph}.onnx"
    save_graph(model, path)
    return model, path


def test_graphs_follow_the_plan(
    calibrated: Path, section: PrecisionSection, tmp_path: Path
) -> None:
    """Both operator variants compute the same, near the float32 graph, without any footage."""
    plan = Calibrated(section.by_module(), PlannedArrays.of(section, calibrated))
    bundle = EngineBundle.open(tiny_bundle())
    for graph, precision, sizes, tensor in (
        ("vit_trunk", Precision(vit="int8"), {"F": 1, "G": 5}, "features"),
        ("llm", Precision(llm="int4", head="int4"), {"s": 9, "p": 3, "n": 1}, "logits"),
    ):
        spec = bundle.specs[graph]
        inputs = sample_inputs(spec, sizes, bundle.config, seed=1)
        exact = OrtRunner(bundle.path / "graphs" / f"{graph}.onnx", spec).run(inputs)[tensor]
        outputs = []
        for variant in (Variant.PORTABLE, Variant.ORT):
            model, path = _converted(graph, precision, variant, plan, tmp_path)
            outputs.append(OrtRunner(path, spec).run(inputs)[tensor])
            used = {node.op_type for node in model.graph}
            fast = {"MatMulIntegerToFloat" if graph == "vit_trunk" else "MatMulNBits"}
            assert (fast <= used) == (variant is Variant.ORT)
            assert cosine(outputs[-1], exact) > 0.97
        if graph == "vit_trunk":
            np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)


def test_the_rounded_weights_are_those_of_the_file(
    calibrated: Path, section: PrecisionSection, tmp_path: Path
) -> None:
    arrays = PlannedArrays.of(section, calibrated)
    plan = Calibrated(section.by_module(), arrays)
    model, _ = _converted("llm", Precision(llm="int4"), Variant.PORTABLE, plan, tmp_path)
    numbers, _ = arrays.weight("llm.blocks.1.attn.o")
    weight = model.graph.initializers["llm.blocks.1.attn.o.weight.int4"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy().astype(np.int8), numbers)


def test_what_stays_float_says_why(section: PrecisionSection) -> None:
    data = section.to_data()
    for plan in data["products"]:
        if plan["module"] == "vit.blocks.4.fc2":
            plan |= {"weights": "base", "activations": None, "reason": "stays float: loses 9.0%"}
        if plan["module"] == "llm.blocks.0.mlp.down":
            plan |= {"weights": "int8", "reason": "stays int8: int4 loses 9.0%"}
    products = PrecisionSection.from_data(data).by_module()
    precision, plans = PRESETS["int4-small"], {}
    bundle = EngineBundle.open(tiny_bundle())
    specs = graph_specs(bundle.config)
    for graph in ("vit_trunk", "llm"):
        model = load_graph(tiny_bundle() / "graphs" / f"{graph}.onnx")
        plans[graph] = plan_graph(model.graph, specs[graph], precision, None, products)
    lines = exceptions(plans, precision)
    assert len(lines) == 2
    assert "vit.blocks.4.fc2/MatMul" in lines[0]
    assert "is float32: " in lines[0]
    assert "loses 9.0%" in lines[0]
    assert "is int8: " in lines[1]


def _options(path: Path, precision: str = "int4-small") -> ExportOptions:
    return ExportOptions(precision=Precision.parse(precision), calibration=path)


def test_an_export_refuses_what_does_not_fit(calibrated: Path, tmp_path: Path) -> None:
    """All of it before anything is traced."""

    def refused(path: Path, match: str, precision: str = "int4-small") -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            export_bundle(tiny_checkpoint(), tmp_path / "bundle", _options(path, precision))
        assert caught.value.remedy
        assert not (tmp_path / "bundle").exists()

    refused(calibrated, "needs more than the calibration knows", "edge")
    alone = tmp_path / "alone.json"
    alone.write_bytes(calibrated.read_bytes())
    refused(alone, "rounded weights are missing")
    (tmp_path / "calibration.rounded.npz").write_bytes(b"other")
    refused(alone, "not the file that was written with the calibration")
    file = Calibration.read(calibrated)
    stranger = tmp_path / "stranger.json"
    whole = file.find(PrecisionSection)
    assert whole is not None
    for module, renamed, said in (
        ("llm.blocks.0.attn.q", "llm.blocks.99.attn.q", r"plans llm\.blocks\.99\.attn\.q, which"),
        ("llm.blocks.0.attn.q", None, r"does not plan llm\.blocks\.0\.attn\.q"),
    ):
        products = [plan for plan in whole.products if plan.module != module]
        if renamed is not None:
            products.append(replace(whole.by_module()[module], module=renamed))
        other_plan = replace(whole, products=tuple(products))
        file.with_section(other_plan, file.sections["precision"].provenance).write(stranger)
        refused(stranger, said)
    empty = tmp_path / "empty.json"
    Calibration(model=file.model).write(empty)
    refused(empty, "none of ranges, precision")
    other = tmp_path / "other.json"
    model = json.loads(json.dumps({"name": "other", "weights": {"a": "b"}}))
    Calibration(model=type(file.model)(**model), sections=file.sections).write(other)
    refused(other, "that of other weights")


def test_an_export_says_what_it_takes_of_a_calibration(calibrated: Path) -> None:
    source = open_weights(tiny_checkpoint())
    file = CalibrationOf(calibrated, source)
    for precision, followed, clips in (
        ("fp32", "is left out", ()),
        ("int8", "is followed by int8 vision products", (tiny_footage().name,)),
        ("llm=int4", "is followed by int4 language products", (tiny_footage().name,)),
    ):
        (said,) = file.notes(Precision.parse(precision), measures=False, reuse=False)
        assert followed in said
        assert file.footage(Precision.parse(precision)) == clips


def test_a_merge_leaves_the_weights_of_others_alone(calibrated: Path, tmp_path: Path) -> None:
    """In the folder lies another calibration, whose arrays have the name of those that come."""
    there = tmp_path / "calibration.rounded.npz"
    there.write_bytes(b"of another calibration")
    out = tmp_path / "merged.json"
    merged = carry_arrays(calibrated, Calibration.read(calibrated), out)
    assert there.read_bytes() == b"of another calibration"
    found = merged.find(PrecisionSection)
    assert found is not None
    assert PlannedArrays.of(found, out).has_weight("llm.head")
    assert {path.name for path in tmp_path.iterdir()} == {there.name, "merged.rounded.npz"}


def test_a_section_that_makes_no_sense_is_refused(section: PrecisionSection) -> None:
    data = section.to_data()
    assert PrecisionSection.from_data(json.loads(json.dumps(data))) == section
    first = data["products"][0]
    for change in (
        {"products": [first, first]},
        {"products": [first | {"weights": "int3"}]},
        {"products": [first | {"error": float("nan")}]},
        {"products": [first | {"range": None}]},
        {"products": [first | {"weights": "base"}]},
        {"products": [first | {"activations": "int4"}]},
        {"arrays": "../elsewhere.npz"},
    ):
        with pytest.raises(ValueError, match=r"."):
            PrecisionSection.from_data(data | change)
