"""The binding contract of every backend, on a backend that does nothing."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.errors import EngineError, ShapeRange
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec
from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime.engines.base import Engine, Shape
from edge_vlm_runtime.inference.language import chunks

SPEC = GraphSpec(
    name="g",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("s", 2)),
        TensorSpec(name="past", dtype="float32", shape=("p", 2)),
        TensorSpec(name="bias", dtype="float32", shape=("s", "p+s")),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("s", 2)),),
    dims={"s": DynamicDim(min=1, opt=2, max=4), "p": DynamicDim(min=0, opt=2, max=8)},
)


class _Idle(Engine):
    def __init__(self) -> None:
        super().__init__(SPEC)
        self.runs = 0

    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None: ...

    def _run(self) -> None:
        self.runs += 1

    def close(self) -> None: ...


def _bound(**shapes: Shape) -> _Idle:
    engine = _Idle()
    for name, shape in {"x": (3, 2), "past": (5, 2), "bias": (3, 8), "y": (3, 2), **shapes}.items():
        engine.bind_array(name, np.zeros(shape, np.float32))
    return engine


def test_fitting_shapes_run() -> None:
    engine = _bound()
    engine.run()
    engine.bind_array("past", np.zeros((0, 2), np.float32))
    engine.bind_array("bias", np.zeros((3, 3), np.float32))
    engine.run()
    assert engine.runs == 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [("y", (2, 2)), ("bias", (3, 7)), ("x", (3, 3)), ("past", (9, 2)), ("x", (3, 2, 1))],
)
def test_shapes_that_do_not_fit_never_run(name: str, shape: Shape) -> None:
    engine = _bound(**{name: shape})
    with pytest.raises(ShapeRange):
        engine.run()
    assert engine.runs == 0


def test_a_tensor_that_was_never_bound_is_named() -> None:
    engine = _Idle()
    engine.bind_array("x", np.zeros((3, 2), np.float32))
    with pytest.raises(EngineError, match="'bias', 'past', 'y'"):
        engine.run()


@pytest.mark.parametrize(
    "array", [np.zeros((3, 2)), np.zeros((2, 3), np.float32).T, np.zeros((3, 2), np.int32)]
)
def test_only_contiguous_memory_of_the_right_type_is_bound(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be contiguous float32"):
        _Idle().bind_array("x", array)


@pytest.mark.parametrize(
    ("ids", "most", "pieces"),
    [
        ("tttt", 4, [(0, 4)]),
        ("ttttt", 4, [(0, 4), (4, 5)]),
        ("t000t111t", 5, [(0, 5), (5, 9)]),
        ("t000t111t", 4, [(0, 4), (4, 8), (8, 9)]),
        ("t0t0t1", 4, [(0, 4), (4, 6)]),
        ("000111", 3, [(0, 3), (3, 6)]),
    ],
)
def test_long_prefills_are_cut_outside_blocks(
    ids: str, most: int, pieces: list[tuple[int, int]]
) -> None:
    blocks = np.array([CAUSAL if i == "t" else int(i) for i in ids])
    assert chunks(blocks, most) == pieces


@pytest.mark.parametrize("ids", ["t0000t", "t0tt0t", "ttt0000"])
def test_a_block_that_fits_no_piece_is_refused(ids: str) -> None:
    blocks = np.array([CAUSAL if i == "t" else int(i) for i in ids])
    with pytest.raises(ShapeRange):
        chunks(blocks, 3)
