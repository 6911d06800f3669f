"""Exported graphs against torch, at their smallest, usual and largest sizes, on ONNX Runtime.

Without a checkpoint the graphs are compared with the reference tensors in the bundle instead, which
shows that a copy or another runtime version still computes what torch computed at export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_vlm.bundle import EngineBundle, sha256_of_file
from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError, MissingExtraError, ParityError
from edge_vlm.rope import rope_table
from edge_vlm.specs import GraphSpec

if TYPE_CHECKING:
    from torch import nn

    from edge_vlm.model.video_lm import VideoLM

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-4
"""Largest |difference| allowed, in units of the largest |expected value| where that exceeds 1."""
MASKED = -30_000.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One graph at one size: the output that differs most."""

    graph: str
    sizes: Mapping[str, int]
    tensor: str
    difference: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def verify_bundle(
    bundle: EngineBundle, model: VideoLM | None = None, *, threads: int = 1
) -> list[Comparison]:
    """Compares every graph; with `model` at several sizes, else with the references."""
    results = []
    for name, spec in bundle.specs.items():
        path = bundle.graph_path(name)
        if model is None:
            session = _open_session(path, threads)
            results.append(_compare_reference(session, spec, bundle.reference(name)))
        else:
            results += compare_graph(path, spec, model, threads=threads)
    return results


def compare_graph(
    path: Path, spec: GraphSpec, model: VideoLM, *, threads: int = 1
) -> list[Comparison]:
    """One graph file against torch at `check_sizes`."""
    from edge_vlm_export.modules import GRAPH_MODULES

    module = GRAPH_MODULES[spec.name](model.float().cpu().eval())
    session = _open_session(path, threads)
    results = []
    for i, sizes in enumerate(check_sizes(spec)):
        inputs = sample_inputs(spec, sizes, model.cfg, seed=i + 1)
        results.append(_compare(spec, sizes, session, inputs, run_torch(module, spec, inputs)))
    return results


def require_source(bundle: EngineBundle, checkpoint: Path) -> None:
    """Raises CheckpointError unless the bundle was made from exactly these files."""
    for name, digest in bundle.source.get("sha256", {}).items():
        file = checkpoint / name
        if not file.is_file() or sha256_of_file(file) != digest:
            raise CheckpointError(
                f"the bundle was not made from this checkpoint: {name} is not the same",
                where=checkpoint,
                remedy="name the checkpoint it was made from, or export again",
            )


def require_parity(results: list[Comparison]) -> None:
    """Raises ParityError naming the worst tensor unless every comparison is within tolerance."""
    bad = [result for result in results if not result.ok]
    if bad:
        worst = max(bad, key=lambda r: r.difference if r.difference == r.difference else np.inf)
        raise ParityError(
            f"{len(bad)} of {len(results)} comparisons differ, most {worst.tensor} of graph "
            f"{worst.graph} at {dict(worst.sizes)}: {worst.difference:.2e} > {worst.allowed:.2e}"
        )


def format_table(results: list[Comparison]) -> str:
    """One line per comparison, columns aligned."""
    head = ("graph", "sizes", "worst output", "max |diff|", "allowed", "")
    rows = [
        (
            r.graph,
            " ".join(f"{name}={size}" for name, size in r.sizes.items()),
            r.tensor,
            f"{r.difference:.2e}",
            f"{r.allowed:.2e}",
            "ok" if r.ok else "DIFFERS",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def check_sizes(spec: GraphSpec) -> list[dict[str, int]]:
    """Smallest, usual and largest; for the llm also one token behind the longest past."""
    least, usual, most = (spec.sizes(which) for which in ("min", "opt", "max"))
    if usual == least:
        usual = {name: (least[name] + most[name]) // 2 for name in least}
    cases = [least, usual, most]
    if spec.name == "llm":
        cases.append({**spec.sizes("min"), "p": spec.dims["p"].max})
    return cases


def sample_inputs(
    spec: GraphSpec, sizes: Mapping[str, int], cfg: ModelConfig, *, seed: int
) -> Arrays:
    """Random inputs that obey the graph's rules: real indices, rotations and masks."""
    rng = np.random.default_rng(seed)
    num_cells = cfg.vision.num_cells
    arrays: Arrays = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        if tensor.name == "pixels":
            arrays[tensor.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        elif tensor.dtype == "float32":
            arrays[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    if spec.name == "vit_stem":
        arrays["is_first"] = np.arange(sizes["F"]) % 3 == 1
    elif spec.name == "vit_trunk":
        cells = np.sort(rng.permutation(sizes["F"] * num_cells)[: sizes["G"]])
        arrays["cell_idx"] = cells.astype(np.int32)
        arrays["frame_id"] = (cells // num_cells).astype(np.int32)
    elif spec.name == "llm":
        s, p = sizes["s"], sizes["p"]
        arrays["cos"], arrays["sin"] = (t[p:] for t in rope_table(cfg.language, p + s))
        rows, columns = np.arange(s)[:, None], np.arange(-p, s)[None, :]
        frame = (np.maximum(rows, columns) < s // 2) & (columns >= 0)
        arrays["attn_bias"] = np.where((columns <= rows) | frame, 0.0, MASKED)
        arrays["last_idx"] = np.sort(rng.permutation(s)[: sizes["n"]])
    return {t.name: np.ascontiguousarray(arrays[t.name], dtype=t.dtype) for t in spec.inputs}


def run_torch(module: nn.Module, spec: GraphSpec, inputs: Arrays) -> Arrays:
    """The outputs of the torch module that the graph was made from."""
    import torch

    with torch.no_grad():
        result = module(*(torch.from_numpy(inputs[t.name]) for t in spec.inputs))
    tensors = result if isinstance(result, tuple) else (result,)
    return {t.name: out.numpy() for t, out in zip(spec.outputs, tensors, strict=True)}


def _compare_reference(session: Any, spec: GraphSpec, arrays: Arrays) -> Comparison:
    inputs = {t.name: arrays[f"inputs/{t.name}"] for t in spec.inputs}
    expected = {t.name: arrays[f"outputs/{t.name}"] for t in spec.outputs}
    sizes = {
        str(axis): size
        for t in spec.inputs
        for axis, size in zip(t.shape, inputs[t.name].shape, strict=True)
        if axis in spec.dims
    }
    return _compare(spec, {name: sizes[name] for name in spec.dims}, session, inputs, expected)


def _compare(
    spec: GraphSpec, sizes: Mapping[str, int], session: Any, inputs: Arrays, expected: Arrays
) -> Comparison:
    outputs = session.run(list(expected), inputs)
    differences, shares = {}, {}
    for name, got in zip(expected, outputs, strict=True):
        allowed = TOLERANCE * max(1.0, float(np.abs(expected[name]).max()))
        difference = float(np.abs(got.astype(np.float64) - expected[name]).max())
        differences[name] = (difference, allowed)
        # NaN compares false with everything: rank it above all.
        shares[name] = difference / allowed if difference == difference else np.inf
    worst = max(shares, key=lambda name: shares[name])
    difference, allowed = differences[worst]
    return Comparison(
        graph=spec.name, sizes=dict(sizes), tensor=worst, difference=difference, allowed=allowed
    )


def _open_session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("onnxruntime", "export") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
