"""A bundle against torch, or against what torch gave when the bundle was made.

Every graph is compared at its smallest, usual and largest sizes, then the whole chain on a clip:
kept cells, features and the first words of an answer, and the frames one by one against all at
once. Without a checkpoint the reference tensors in the bundle stand in for torch, at their own
sizes: that shows that a copy, or another version of a runtime, still computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.bundle import EngineBundle, sha256_of_file
from edge_vlm.errors import CheckpointError, ParityError
from edge_vlm.precision import FP32, KVLayout, Precision, Variant
from edge_vlm.prompt import PromptFormat
from edge_vlm.specs import GraphSpec
from edge_vlm.tokenizer import Tokenizer
from edge_vlm_export.chain import Arrays, Chain, ChainResult, Clip, Run
from edge_vlm_export.compare import Comparison, compare, cosine, format_table, require_parity
from edge_vlm_export.samples import check_sizes, sample_inputs
from edge_vlm_export.sessions import GraphSession

if TYPE_CHECKING:
    from torch import nn

    from edge_vlm.model.video_lm import VideoLM
    from edge_vlm_export.weights import WeightSource

CHAIN = "chain"
"""Name of the reference that holds a clip and what the whole model made of it."""
LEAST_COSINE = 0.9999
"""Of features and logits in a chain that must be the same."""


@dataclass(frozen=True, kw_only=True)
class ChainComparison:
    """Two runs of the whole model on one clip."""

    name: str
    frames: int
    same_cells: int
    """Frames of which the same cells were kept."""
    features: float
    """Cosine, or NaN where other cells were kept."""
    logits: float
    """Cosine."""
    tokens: int
    same_tokens: int
    """Tokens of the greedy answer up to the first that differs."""
    required: bool
    """Everything must be the same: nothing was quantised."""

    @property
    def ok(self) -> bool:
        if not self.required:
            return True
        return (
            self.same_cells == self.frames
            and self.same_tokens == self.tokens
            and self.features >= LEAST_COSINE
            and self.logits >= LEAST_COSINE
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: same cells kept in {self.same_cells} of {self.frames} frames, features "
            f"cosine {self.features:.6f}, logits cosine {self.logits:.6f}, first {self.tokens} "
            f"tokens: {self.same_tokens} the same"
            f"{'' if self.ok else '  DIFFERS'}"
        )


@dataclass
class Report:
    """What was compared, in order; what went wrong stops nothing but is required later."""

    against: str
    graphs: list[Comparison] = field(default_factory=list)
    chains: list[ChainComparison] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"ONNX Runtime against {self.against}:", format_table(self.graphs)]
        return "\n".join([*lines, *map(str, self.chains)])

    def require(self) -> None:
        """Raises NonFinite or ParityError naming the first tensor that differs."""
        require_parity(self.graphs)
        for chain in self.chains:
            if not chain.ok:
                raise ParityError(f"the chain differs: {chain}")


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Graph files and how to read them."""

    paths: Mapping[str, Path]
    specs: Mapping[str, GraphSpec]
    precision: Precision = FP32
    variant: Variant = Variant.PORTABLE
    layout: KVLayout = KVLayout.TOKEN_MAJOR
    threads: int = 1

    @classmethod
    def of(cls, bundle: EngineBundle, threads: int) -> Graphs:
        return cls(
            paths={name: bundle.graph_path(name) for name in bundle.specs},
            specs=bundle.specs,
            precision=bundle.precision,
            variant=bundle.variant,
            layout=bundle.kv_layout,
            threads=threads,
        )

    def open(self, name: str) -> GraphSession:
        half = self.precision.base == "float16"
        return GraphSession(
            self.paths[name], self.specs[name], threads=self.threads, as_written=half
        )


def verify_bundle(
    bundle: EngineBundle,
    source: WeightSource | None = None,
    *,
    threads: int = 1,
    thorough: bool = True,
) -> Report:
    """Compares with torch on `source`'s weights, else with the reference tensors.

    `thorough`: also at the largest sizes, which takes the most memory and time, and on a clip.
    """
    graphs = Graphs.of(bundle, threads)
    has_chain = thorough and bundle.has_reference(CHAIN)
    reference = bundle.reference(CHAIN) if has_chain else {}
    clip = read_clip(reference) if has_chain else None
    keep_ratio = float(reference["keep_ratio"]) if has_chain else 1.0
    if source is None:
        report = Report("the bundle's reference tensors")
        for name, spec in bundle.specs.items():
            arrays = bundle.reference(name)
            report.graphs.append(_compare_reference(graphs, spec, arrays))
        expected = ChainResult.from_arrays(reference) if has_chain else None
    else:
        from edge_vlm_export.weights import streamed_model

        model = streamed_model(source)
        report = Report("torch")
        report.graphs += compare_with_torch(graphs, model, clip, largest=thorough)
        run = torch_run(model, graphs)
        expected = chain_of(run, bundle, keep_ratio).stream(clip) if clip is not None else None
    if clip is not None and expected is not None:
        chain = chain_of(session_run(graphs), bundle, keep_ratio)
        report.chains += compare_chains(chain, clip, expected, report.against, graphs.precision)
    return report


def compare_with_torch(
    graphs: Graphs,
    model: VideoLM,
    clip: Clip | None,
    *,
    largest: bool = True,
    on_compared: Callable[[Comparison], None] = lambda result: None,
) -> list[Comparison]:
    """Each graph at `check_sizes`."""
    hidden = stem_states(model, clip) if clip is not None else None
    results = []
    for name, spec in graphs.specs.items():
        module, session = torch_module(name, model, graphs.variant), graphs.open(name)
        # Quantised by real footage, so compared on some.
        real = graphs.precision.vit == "int8"
        for i, sizes in enumerate(check_sizes(spec, largest=largest)):
            inputs = sample_inputs(
                spec,
                sizes,
                model.cfg,
                seed=i + 1,
                clip=clip if real else None,
                hidden=hidden if real else None,
            )
            expected = run_torch(module, spec, inputs)
            result = compare(spec, sizes, session.run(inputs), expected, graphs.precision)
            on_compared(result)
            results.append(result)
    return results


def stem_states(model: VideoLM, clip: Clip) -> np.ndarray:
    """What the stem makes of a clip's frames, f32 [n, N, D]."""
    from edge_vlm_export.graphs import graph_specs

    spec = graph_specs(model.cfg)["vit_stem"]
    sizes = {"F": len(clip.pictures)}
    inputs = sample_inputs(spec, sizes, model.cfg, seed=0, clip=clip)
    return run_torch(torch_module("vit_stem", model), spec, inputs)["hidden"]


# ---- chains --------------------------------------------------------------------------------------


def compare_chains(
    chain: Chain, clip: Clip, expected: ChainResult, against: str, precision: Precision
) -> list[ChainComparison]:
    streamed = chain.stream(clip)
    whole = chain.whole(clip)
    exact = precision == FP32
    return [
        _compare_results(f"clip against {against}", streamed, expected, exact),
        _compare_results("frame by frame against the whole clip", streamed, whole, exact),
    ]


def _compare_results(
    name: str, got: ChainResult, expected: ChainResult, required: bool
) -> ChainComparison:
    same = [np.array_equal(a, b) for a, b in zip(got.kept, expected.kept, strict=True)]
    differ = [a != b for a, b in zip(got.tokens, expected.tokens, strict=True)]
    return ChainComparison(
        name=name,
        frames=len(same),
        same_cells=sum(same),
        features=cosine(got.features, expected.features) if all(same) else float("nan"),
        logits=cosine(got.logits, expected.logits),
        tokens=len(expected.tokens),
        same_tokens=differ.index(True) if any(differ) else len(differ),
        required=required,
    )


def chain_of(run: Run, bundle: EngineBundle, keep_ratio: float) -> Chain:
    table = bundle.embed_table
    return Chain(
        run,
        cfg=bundle.config,
        specs=bundle.specs,
        prompt=PromptFormat(Tokenizer.from_file(bundle.tokenizer_path), bundle.style),
        embed=lambda ids: np.array(table[ids], np.float32),
        layout=bundle.kv_layout,
        keep_ratio=keep_ratio,
    )


def session_run(graphs: Graphs) -> Run:
    """Opens each graph once, when it is first run."""
    sessions: dict[str, GraphSession] = {}

    def run(name: str, inputs: Arrays) -> Arrays:
        if name not in sessions:
            sessions[name] = graphs.open(name)
        return sessions[name].run(inputs)

    return run


def torch_run(model: VideoLM, graphs: Graphs) -> Run:
    modules = {name: torch_module(name, model, graphs.variant) for name in graphs.specs}
    return lambda name, inputs: run_torch(modules[name], graphs.specs[name], inputs)


def read_clip(arrays: Mapping[str, np.ndarray]) -> Clip:
    return Clip(pictures=list(arrays["pictures"]), fps=float(arrays["fps"]))


# ---- one graph -----------------------------------------------------------------------------------


def torch_module(name: str, model: VideoLM, variant: Variant = Variant.PORTABLE) -> nn.Module:
    from edge_vlm_export.modules import graph_module

    return graph_module(name, model, variant=variant)


def run_torch(module: nn.Module, spec: GraphSpec, inputs: Arrays) -> Arrays:
    """The outputs of the torch module that the graph was made from, computed in float32."""
    import torch

    args = [torch.from_numpy(inputs[t.name]) for t in spec.inputs]
    with torch.no_grad():
        result = module(*(x.float() if x.dtype == torch.float16 else x for x in args))
    tensors = result if isinstance(result, tuple) else (result,)
    return {
        t.name: out.numpy().astype(t.dtype, copy=False)
        for t, out in zip(spec.outputs, tensors, strict=True)
    }


def _compare_reference(graphs: Graphs, spec: GraphSpec, arrays: Arrays) -> Comparison:
    inputs = {t.name: arrays[f"inputs/{t.name}"] for t in spec.inputs}
    expected = {t.name: arrays[f"outputs/{t.name}"] for t in spec.outputs}
    sizes = sizes_of(spec, inputs)
    got = graphs.open(spec.name).run(inputs)
    return compare(spec, sizes, got, expected, graphs.precision)


def sizes_of(spec: GraphSpec, inputs: Arrays) -> dict[str, int]:
    """The free dimensions of these inputs."""
    found: dict[str, int] = {}
    sums: list[tuple[str, int]] = []
    for t in spec.inputs:
        for axis, size in zip(t.shape, inputs[t.name].shape, strict=True):
            if isinstance(axis, str) and axis in spec.dims:
                found[axis] = size
            elif isinstance(axis, str):
                sums.append((axis, size))
    for axis, size in sums:
        unknown = [name for name in axis.split("+") if name not in found]
        if len(unknown) == 1:
            found[unknown[0]] = size - sum(found.get(name, 0) for name in axis.split("+"))
    return {name: found[name] for name in spec.dims}


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


def chain_arrays(clip: Clip, keep_ratio: float, result: ChainResult) -> Arrays:
    """The reference that `verify_bundle` reads."""
    sizes: Sequence[tuple[int, ...]] = [picture.shape for picture in clip.pictures]
    if len(set(sizes)) != 1:
        raise ValueError(f"pictures of one clip must have one size, got {sizes}")
    return {
        "pictures": np.stack(clip.pictures),
        "fps": np.array(clip.fps),
        "keep_ratio": np.array(keep_ratio),
        **result.to_arrays(),
    }
