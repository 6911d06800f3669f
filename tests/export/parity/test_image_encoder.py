"""The graph of still pictures: equal to torch, shared weights, told by the manifest."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edge_vlm.cli import main
from edge_vlm.errors import BundleSchemaError, ConfigError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.model.images import encode_images
from edge_vlm.model.published.mapping import shapes
from edge_vlm.pixels.stills import ImageConfig, image_grid, prepare_image
from edge_vlm.presets import molmo2_4b
from edge_vlm.text.prompt import RELEASED
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.graphs.weights import open_weights, random_weights
from edge_vlm_export.preflight import estimate
from edge_vlm_export.quantize.plan import PrecisionPlan
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from edge_vlm_export.verify.compare import TOLERANCE
from edge_vlm_export.verify.ort_runner import Graphs
from edge_vlm_export.verify.verify import verify_bundle
from tests.published_folder import CUT, LIMITS, image_bundle, published_folder, published_model
from tests.tiny import kept, tiny_bundle, tiny_footage


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(image_bundle())


def test_it_equals_torch_at_its_smallest_usual_and_largest(bundle: EngineBundle) -> None:
    report = verify_bundle(bundle, open_weights(published_folder()))
    report.require()
    sizes = [dict(found.sizes) for found in report.graphs if found.graph == "image_encoder"]
    spec = bundle.specs["image_encoder"]
    assert sizes == [spec.sizes(which) for which in ("min", "opt", "max")]
    assert len({found["I"] for found in sizes}) == 3
    verify_bundle(bundle).require()


@pytest.mark.parametrize("size", [(1, 1), (40, 120), (11, 15), (200, 90), (480, 640)])
def test_a_picture_of_any_size_is_encoded_as_by_torch(
    bundle: EngineBundle, size: tuple[int, int]
) -> None:
    vision = bundle.config.vision
    rgb = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    still = prepare_image(rgb, vision, CUT)
    session = Graphs.of(bundle, 1).open("image_encoder")
    got = session.run({"pixels": still.pixels, "windows": still.windows})["features"]
    with torch.no_grad():
        expected = encode_images(
            published_model(), torch.from_numpy(still.pixels), torch.from_numpy(still.windows)
        )
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * float(expected.abs().max()))
    spec = bundle.specs["image_encoder"]
    spec.check_dims({"I": len(still.pixels), "T": len(still.windows)})


def test_the_manifest_says_how_pictures_are_cut_and_prompts_written(bundle: EngineBundle) -> None:
    assert bundle.images == CUT
    assert bundle.style == RELEASED
    plain = EngineBundle.open(tiny_bundle())
    assert plain.images is None
    assert "image_encoder" not in plain.specs


def test_its_weights_are_those_of_the_video_graphs(bundle: EngineBundle) -> None:
    assert not (bundle.path / "graphs" / "image_encoder.weights").exists()
    model = onnx.load(bundle.graph_path("image_encoder"), load_external_data=False)
    places = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"vit_stem.weights", "vit_trunk.weights"}


@pytest.mark.parametrize(
    ("precision", "variant"), [("fp16", Variant.ORT), ("edge", Variant.PORTABLE)]
)
def test_it_is_quantised_by_what_it_makes_of_the_footage(precision: str, variant: Variant) -> None:
    """Its activations are not those of the video graphs: other pictures, other windows."""
    options = ExportOptions(
        limits=LIMITS,
        precision=Precision.parse(precision),
        variant=variant,
        footage=(tiny_footage(),),
    )
    folder = kept(  # compares with torch
        f"tiny-molmo2-{precision}-{variant.value}",
        lambda to: export_bundle(published_folder(), to, options),
    )
    bundle = EngineBundle.open(folder)
    plan = PrecisionPlan.from_json((bundle.path / "precision_plan.json").read_text())
    nodes = plan.graphs["image_encoder"]
    assert any(node.dtype == "float16" for node in nodes)
    assert all(node.max_abs is not None for node in nodes if node.dtype == "float16")
    int8 = {node.module for node in nodes if node.activations == "int8"}
    assert ("vit.blocks.4.fc1" in int8) == (bundle.precision.vit == "int8")
    # Quantised weights are scaled by what a graph has seen and so are its own.
    places = [
        path.with_suffix(".weights")
        for path in map(bundle.graph_path, ("image_encoder", "vit_trunk"))
    ]
    own, trunk = (path.stat().st_size if path.exists() else 0 for path in places)
    assert (own > trunk / 2) == (bundle.precision.vit == "int8")


def test_the_room_it_needs_is_foreseen(tmp_path: Path) -> None:
    cfg = molmo2_4b()
    weights = shapes(cfg)
    vision = sum(
        math.prod(shape)
        for name, shape in weights.items()
        if name.startswith(("vit.", "connector"))
    )
    for label, lower, upper in (("fp32", 0, 0), ("fp16", 4, 4.3), ("edge", 5, 6)):
        precision = Precision.parse(label)
        without, with_images = (
            estimate(
                cfg,
                weights,
                graph_specs(cfg, precision=precision, images=images),
                precision,
                tmp_path,
                largest_check=False,
                measured=precision.needs_ranges,
            ).disk
            for images in (None, ImageConfig())
        )
        assert lower <= (with_images - without) / vision <= upper, label


def test_random_weights_may_read_pictures_too() -> None:
    published = published_folder() / "tokenizer.json"
    assert random_weights("molmo2_4b", 0, published).images is None
    assert random_weights("molmo2_4b", 0, published, with_images=True).images == ImageConfig()
    for shape, words in (
        ("tiny", published),
        ("molmo2_4b", tiny_bundle() / "tokenizer.json"),
    ):
        with pytest.raises(ConfigError, match="still pictures"):
            random_weights(shape, 0, words, with_images=True)


def test_inspect_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(image_bundle())]) == 0
    assert "up to 5 crops, 2x2 patches a token" in capsys.readouterr().out
    assert main(["inspect", str(tiny_bundle())]) == 0
    assert "the model reads video only" in capsys.readouterr().out


def test_a_manifest_with_half_an_image_path_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(image_bundle(), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "images": None}))
    with pytest.raises(BundleSchemaError, match="belong together"):
        EngineBundle.open(folder)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "images": {"max_crops": 0}}))
    with pytest.raises(BundleSchemaError, match="max_crops"):
        EngineBundle.open(folder)


def test_published_sizes() -> None:
    """Every tiling of the released settings has its place in the range."""
    cfg, images = molmo2_4b(), ImageConfig()
    dims = graph_specs(cfg, images=images)["image_encoder"].dims
    assert (dims["I"].min, dims["I"].opt, dims["I"].max) == (2, 5, 9)
    assert dims["T"].min == image_grid(1, 1, cfg.vision, images).num_tokens == 392
    assert dims["T"].max == image_grid(378, 9000, cfg.vision, images).num_tokens == 1316
    small = dataclasses.replace(images, max_crops=1)
    dims = graph_specs(cfg, images=small)["image_encoder"].dims
    assert dims["T"].min == dims["T"].max == 392
