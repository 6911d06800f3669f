"""Graph contracts survive the manifest and refuse sizes outside their ranges."""

from __future__ import annotations

import json

import pytest

from edge_vlm.errors import BundleSchemaError, ShapeRange
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec


def _spec() -> GraphSpec:
    return GraphSpec(
        name="llm",
        inputs=(
            TensorSpec(name="x", dtype="float32", shape=("s", 4)),
            TensorSpec(name="bias", dtype="float32", shape=("s", "p+s")),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("s", 4)),),
        dims={"s": DynamicDim(min=1, opt=2, max=3), "p": DynamicDim(min=0, opt=1, max=8)},
    )


def test_specs_survive_json() -> None:
    spec = _spec()
    assert GraphSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_sums_of_dimensions_are_resolved() -> None:
    assert _spec().inputs[1].resolve({"s": 2, "p": 5}) == (2, 7)


@pytest.mark.parametrize("sizes", [{"s": 0, "p": 0}, {"s": 4, "p": 0}, {"s": 1, "p": 9}])
def test_sizes_outside_the_range_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ShapeRange, match=r"allowed are"):
        _spec().check_dims(sizes)


def test_dimensions_must_be_declared_and_used() -> None:
    tensor = TensorSpec(name="x", dtype="float32", shape=("s",))
    with pytest.raises(ValueError, match="its shapes use"):
        GraphSpec(name="g", inputs=(tensor,), outputs=(), dims={})


@pytest.mark.parametrize("limits", [(-1, 0, 1), (2, 1, 3), (1, 4, 3)])
def test_ranges_must_be_ordered(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="min <= opt <= max"):
        DynamicDim(min=limits[0], opt=limits[1], max=limits[2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("inputs"),
        lambda d: d["dims"].pop("p"),
        lambda d: d["dims"]["s"].update(max=0),
        lambda d: d["inputs"][0].update(dtype="text"),
        lambda d: d.update(outputs=7),
    ],
)
def test_malformed_specs_are_refused(damage: object) -> None:
    data = json.loads(json.dumps(_spec().to_dict()))
    damage(data)  # type: ignore[operator]
    with pytest.raises(BundleSchemaError):
        GraphSpec.from_dict(data)
