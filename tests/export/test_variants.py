"""Every precision, operator variant and cache form runs in the runtime, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_vlm.errors import NonFinite
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import KVLayout, Variant
from edge_vlm.memory import row_bytes
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import FrameTopK
from edge_vlm_export.quantize.plan import PrecisionPlan
from edge_vlm_export.verify.check_inputs import LARGEST_CHECK
from edge_vlm_export.verify.compare import cosine
from edge_vlm_export.verify.verify import verify_bundle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.tiny import VARIANTS, tiny_bundle, tiny_checkpoint, tiny_variant

EXACT = ("both",)


def _stream(folder: Path) -> tuple[list[np.ndarray], list[int], bool]:
    """Logits after each step of a stream with a question, an answer undone and frames evicted."""
    rng = np.random.default_rng(3)
    logits, kept = [], []
    with LoadedBundle.open(folder, threads=1) as engines:
        vision, lm, prompt = engines.vision, engines.language, engines.prompt
        arena, state, policy = lm.new_arena(160), vision.new_state(), FrameTopK(0.5)
        lm.prefill(arena, lm.embed(prompt.bos_ids))
        sizes = [arena.length]
        for i in range(4):
            rgb = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            tokens = vision.encode(Frame(rgb=rgb, pts_ns=i * 10**9, seq=i), state, policy)
            kept += tokens.cells.tolist()
            ids = prompt.frame_ids(float(i), len(tokens.cells), first=i == 0)
            blocks = np.where(prompt.vision_mask(ids), i, -1)
            logits.append(lm.prefill(arena, lm.embed(ids, tokens.embeds), blocks))
            sizes.append(arena.length)
            if i == 2:
                mark = arena.mark()
                logits.append(lm.prefill(arena, lm.embed(prompt.question_ids("is there a car ?"))))
                for _ in range(3):
                    logits.append(lm.decode_step(arena, int(logits[-1].argmax())))
                arena.truncate(mark)
        arena.evict(sizes[1], sizes[2])
        logits.append(lm.prefill(arena, lm.embed(prompt.question_ids("how many cars ?"))))
        logits.append(lm.decode_step(arena, 5))
        logits.append(lm.measure(arena, [lm.embed([5, 6]), lm.embed([7])]).ravel())
    return logits, kept, all(np.isfinite(row).all() for row in logits)


@pytest.fixture(scope="module")
def plain() -> tuple[list[np.ndarray], list[int], bool]:
    return _stream(tiny_bundle())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_runtime_streams_it_like_the_plain_bundle(
    name: str, plain: tuple[list[np.ndarray], list[int], bool]
) -> None:
    logits, kept, finite = _stream(tiny_variant(name))
    assert finite
    assert len(logits) == len(plain[0])
    if name in EXACT:
        assert kept == plain[1]
        for got, expected in zip(logits, plain[0], strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)
        return
    # Rounded vision may choose another cell here and there, depending on the processor.
    same = [mine == its for mine, its in zip(kept, plain[1], strict=True)]
    assert sum(same) > 0.8 * len(same)
    if all(same):
        # The steps feed on the words chosen so far, which quantisation may change: the first one
        # does not.
        assert cosine(logits[0], plain[0][0]) > 0.9


@pytest.mark.parametrize("name", VARIANTS)
def test_it_agrees_with_torch_at_every_size(name: str) -> None:
    from edge_vlm_export.graphs.weights import open_weights

    bundle = EngineBundle.open(tiny_variant(name))
    report = verify_bundle(bundle, open_weights(tiny_checkpoint()))
    report.require()
    for graph, spec in bundle.specs.items():
        sizes = [dict(result.sizes) for result in report.graphs if result.graph == graph]
        for which in ("min", "opt", "max"):
            wanted = {
                axis: min(size, LARGEST_CHECK.get(axis, size))
                for axis, size in spec.sizes(which).items()
                if axis != "C"
            }
            assert any(wanted.items() <= found.items() for found in sizes), (graph, which)
    verify_bundle(bundle).require()


def test_an_in_place_cache_and_two_forms_are_told_by_the_manifest() -> None:
    bundle = EngineBundle.open(tiny_variant("ort-int4"))
    assert (bundle.variant, bundle.kv_layout) == (Variant.ORT, KVLayout.HEAD_MAJOR)
    assert bundle.specs["llm"].outputs[1].name == "present_k_0"
    bundle = EngineBundle.open(tiny_variant("both"))
    assert set(bundle.specs) == {"vit_stem", "vit_trunk", "llm", "llm_decode"}
    assert bundle.specs["llm_decode"].sizes("max")["s"] == 1


@pytest.mark.parametrize("name", ["cache", "ort-cache"])
def test_a_cache_of_float16_is_half_as_large(name: str) -> None:
    bundle, other = (EngineBundle.open(tiny_variant(n)) for n in (name, "both"))
    spec, plain = bundle.specs["llm"], other.specs["llm"]
    kinds = {tensor.dtype for tensor in spec.tensors if tensor.name[-4:-1] in ("_k_", "_v_")}
    assert kinds == {"float16"}
    assert 2 * row_bytes(bundle.config.language, spec) == row_bytes(other.config.language, plain)
    assert bundle.specs["vit_stem"] == other.specs["vit_stem"]


@pytest.mark.parametrize("name", ["cache", "ort-cache"])
def test_a_key_that_float16_cannot_hold_is_no_answer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of minus infinity: its token would only be hidden."""
    with LoadedBundle.open(tiny_variant(name), threads=1) as engines:
        lm, prompt = engines.language, engines.prompt
        arena = lm.new_arena(16)
        lm.prefill(arena, lm.embed(prompt.bos_ids))
        length, engine = arena.length, lm._engine
        run = engine.run

        def overflow() -> None:
            run()
            in_place = engine.spec.outputs[1].name.startswith("present")
            keys = arena._buffer[-1, 0]
            (keys[:, length] if in_place else keys[length])[0, 0] = -np.inf

        monkeypatch.setattr(engine, "run", overflow)
        with pytest.raises(NonFinite, match=r"larger than its cache .*without cache=float16"):
            lm.prefill(arena, lm.embed([5, 6]))
        assert arena.length == length


def test_two_forms_share_one_file_of_weights() -> None:
    folder = tiny_variant("both") / "graphs"
    assert not (folder / "llm_decode.weights").exists()
    plain = (tiny_bundle() / "graphs" / "llm.weights").stat().st_size
    assert (folder / "llm.weights").stat().st_size == plain


def test_the_plan_names_every_product() -> None:
    folder = tiny_variant("edge")
    plan = PrecisionPlan.from_json((folder / "precision_plan.json").read_text())
    assert plan.footage == ("footage.mp4",)
    nodes = {node.module: node for node in plan.graphs["vit_trunk"] if node.weights}
    assert nodes["vit.blocks.4.fc1"].weights == nodes["vit.blocks.4.fc1"].activations == "int8"
    assert nodes["vit.blocks.4.fc1"].max_abs is not None
    assert "connector.pool.q" not in nodes
    llm = {node.module: node for node in plan.graphs["llm"] if node.weights}
    assert {module.rpartition(".")[2]: node.weights for module, node in llm.items()} == {
        **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "int4"),
        "head": "int8",
    }
    norms = {n.op: n.dtype for n in plan.graphs["llm"] if n.module == "llm.blocks.0.attn.q_norm"}
    assert set(norms.values()) == {"float32"}
    assert {"Pow", "Sqrt", "Mul"} <= norms.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_operators_and_opsets_are_those_of_the_variant(name: str) -> None:
    onnx = pytest.importorskip("onnx")
    bundle = EngineBundle.open(tiny_variant(name))
    for graph in bundle.specs:
        path = bundle.graph_path(graph)
        model = onnx.load(path, load_external_data=False)
        opsets = {item.domain: item.version for item in model.opset_import}
        int4 = bundle.precision.llm == "int4" and graph.startswith("llm")
        if bundle.variant is Variant.PORTABLE:
            onnx.checker.check_model(str(path))
            assert opsets == {"": 21 if int4 else 20}
        else:
            assert opsets[""] == 20
            used = {node.op_type for node in model.graph.node if node.domain}
            packed = bundle.precision.llm != "base"
            fast = {"GroupQueryAttention"} | ({"MatMulNBits"} if packed else set())
            integer = {"MatMulIntegerToFloat"} if bundle.precision.vit == "int8" else set()
            assert used == (fast if graph == "llm" else integer)
