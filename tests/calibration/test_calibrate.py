"""What the calibration writes down equals what a direct computation gives."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from edge_vlm import errors
from edge_vlm.formats.alert_set import Footage, LabelledAlert, write_event_set
from edge_vlm.formats.calibration import FP16_LIMIT, Calibration, CalibrationTable
from edge_vlm.formats.footage import read_footage
from edge_vlm.formats.qa_set import ClipQuestions, write_question_set
from edge_vlm.model.checkpoint import load_checkpoint, save_checkpoint
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.frames import decode_jpeg, encode_jpeg
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.presets import tiny
from edge_vlm_calibration.collect import KEEP_RATIOS, VISION_PARTS, calibrate, threshold
from edge_vlm_calibration.commands import calibrate as command
from edge_vlm_calibration.precision.commands import make as plan
from edge_vlm_calibration.provenance import identity_of, provenance_of
from edge_vlm_training.world.vocabulary import build_tokenizer

CLIP_LENGTHS = (4, 1, 3)


def make_checkpoint(folder: Path, *, scorer: bool = True, loud: str | None = None) -> Path:
    """A tiny random model; the weight `loud` is a million times larger."""
    folder.mkdir()
    config = tiny(*build_tokenizer(["is there a red ball ?"], folder / "tokenizer.json"))
    if not scorer:
        config = dataclasses.replace(config, scorer=None)
    weights = VideoLM(config).init_weights(torch.Generator().manual_seed(0)).state_dict()
    if loud is not None:
        weights[loud] = weights[loud] * 1e6
    save_checkpoint(folder, config, weights, folder / "tokenizer.json")
    return folder


def make_video(path: Path, frames: Sequence[np.ndarray], fps: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return path


def as_file(checkpoint: Path, table: CalibrationTable, *footage: Path) -> Calibration:
    provenance = provenance_of(footage, {"fps": 2})
    return Calibration(model=identity_of(checkpoint)).with_section(table, provenance)


def run(checkpoint: Path, footage: Path, out: Path) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    line = [str(checkpoint), str(footage), "-o", str(out), "--sections", "ranges"]
    return command.run(parser.parse_args(line))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("calibrate") / "checkpoint")


@pytest.fixture(scope="module")
def clips() -> list[list[bytes]]:
    rng = np.random.default_rng(0)
    shape = (48, 48, 3)
    return [
        [encode_jpeg(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(length)]
        for length in CLIP_LENGTHS
    ]


@pytest.fixture(scope="module")
def question_set(tmp_path_factory: pytest.TempPathFactory, clips: list[list[bytes]]) -> Path:
    folder = tmp_path_factory.mktemp("calibrate") / "footage"
    write_question_set(
        folder,
        [
            ClipQuestions(name=str(i), jpegs=jpegs, times_s=range(len(jpegs)), questions=[])
            for i, jpegs in enumerate(clips)
        ],
    )
    return folder


@pytest.fixture(scope="module")
def table(checkpoint: Path, question_set: Path) -> CalibrationTable:
    return calibrate(checkpoint, [question_set])


def test_the_table_equals_a_direct_computation(
    checkpoint: Path, table: CalibrationTable, clips: list[list[bytes]]
) -> None:
    model = load_checkpoint(checkpoint)
    vision = model.cfg.vision
    rgb = [decode_jpeg(jpeg) for jpegs in clips for jpeg in jpegs]
    pixels = torch.from_numpy(np.stack([to_pixel_values(picture, vision) for picture in rgb]))
    is_first = torch.tensor([i == 0 for length in CLIP_LENGTHS for i in range(length)])
    cells = torch.arange(len(rgb) * vision.num_cells)
    with torch.inference_mode():
        embedded = model.vit.embed(pixels)
        prev = torch.zeros(1, vision.num_cells, vision.width)
        hidden, _, scores = model.vit_stem(pixels, prev, is_first)
        features = model.vit_trunk(hidden, cells, cells // vision.num_cells)

    def largest(x: torch.Tensor) -> object:
        return pytest.approx(float(x.abs().max()), rel=1e-4)

    assert table.input_ranges["vit.patch_embed"] == largest(pixels)
    assert table.input_ranges["vit.blocks.0.norm1"] == largest(embedded)
    assert table.input_ranges[f"vit.blocks.{model.trunk_start}.norm1"] == largest(hidden)
    assert table.output_ranges["connector.project.down"] == largest(features)
    assert set(table.output_ranges) == {
        name.removesuffix(".weight")
        for name in model.state_dict()
        if name.startswith(VISION_PARTS) and name.endswith(".weight")
    }
    assert table.fp16_unsafe == ()

    followers = scores[~is_first].double().numpy()
    assert (table.num_frames, table.num_scores) == (len(rgb), followers.size)
    assert table.score_mean == pytest.approx(followers.mean(), rel=1e-4)
    assert table.score_std == pytest.approx(followers.std(), rel=1e-3)
    assert table.score_quantiles[50] == pytest.approx(np.median(followers), rel=1e-4)
    assert [t.keep_ratio for t in table.thresholds] == list(KEEP_RATIOS)
    for found in table.thresholds:
        kept = (followers >= found.score - 1e-6).mean()
        assert found.keep_ratio <= kept < found.keep_ratio + 1.5 / followers.size
        assert found.kept_share == pytest.approx(kept)
    assert (table.footage, table.image_size) == (("footage",), vision.image_size)


@pytest.mark.parametrize("keep_ratio", KEEP_RATIOS)
def test_a_threshold_keeps_its_share(keep_ratio: float) -> None:
    distinct = np.random.default_rng(1).permutation(1000) / 1000
    found = threshold(distinct, keep_ratio)
    assert (distinct >= found.score).mean() == keep_ratio == found.kept_share
    assert threshold(np.full(10, 0.5), keep_ratio).kept_share == 1.0  # ties cannot be told apart


def test_a_module_past_half_of_fp16_is_named(tmp_path: Path, question_set: Path) -> None:
    loud = make_checkpoint(tmp_path / "loud", loud="connector.project.down.weight")
    table = calibrate(loud, [question_set], max_frames=2)
    assert table.fp16_unsafe == ("connector.project.down",)
    assert table.output_ranges["connector.project.down"] > FP16_LIMIT
    endless = make_checkpoint(tmp_path / "endless", loud="vit.blocks.0.fc2.weight")
    model = load_checkpoint(endless)
    weights = model.state_dict()
    weights["vit.blocks.0.fc2.bias"].fill_(float("inf"))
    save_checkpoint(endless, model.cfg, weights, endless / "tokenizer.json")
    with pytest.raises(errors.NonFinite, match=r"vit\.blocks\.0\.fc2"):
        calibrate(endless, [question_set])


def test_a_video_is_sampled_at_its_rate(tmp_path: Path) -> None:
    grey = [np.full((48, 48, 3), 10 * i, np.uint8) for i in range(20)]
    video = make_video(tmp_path / "clip.mp4", grey, fps=8)
    shots = list(read_footage(video, 2.0, 64))
    assert [first for first, _ in shots] == [True, False, False, False, False]
    assert [round(rgb.mean() / 10) for _, rgb in shots] == [0, 4, 8, 12, 16]
    assert len(list(read_footage(video, 2.0, 3))) == 3
    assert len(list(read_footage(video, 100.0, 64))) == 20


def test_the_command_writes_what_it_prints(
    checkpoint: Path,
    question_set: Path,
    table: CalibrationTable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "calibration.json"
    assert run(checkpoint, question_set, out) == 0
    assert CalibrationTable.read(out) == table
    printed = capsys.readouterr().out
    assert f"mean {table.score_mean:.4f}" in printed
    assert all(f"score >= {t.score:.4f}" in printed for t in table.thresholds)
    assert "fp16 (vision side, limit 32752): safe" in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_bad_file_is_a_config_error(
    checkpoint: Path, question_set: Path, table: CalibrationTable, tmp_path: Path
) -> None:
    text = as_file(checkpoint, table, question_set).to_json()
    found = Calibration.from_json(text)
    assert found.to_json() == text
    assert found.find(CalibrationTable) == table
    good = json.loads(text)
    bad = ["", "[]", "{}", text[:-20], json.dumps(good | {"schema_version": 3})]
    bad += [json.dumps(good | {"extra": 1}), text.replace('"fps": 2', '"fps": 3')]
    assert bad[-1] != text
    for broken in bad:
        with pytest.raises(errors.ConfigError):
            Calibration.from_json(broken)
    with pytest.raises(errors.ConfigError):
        CalibrationTable.read(tmp_path / "absent.json")


def test_ranges_that_make_no_sense_are_refused(table: CalibrationTable) -> None:
    good = json.loads(json.dumps(table.to_data()))
    bad = [
        good | {"fp16_unsafe": ["vit"]},
        good | {"output_ranges": {}},
        good | {"thresholds": [1]},
    ]
    bad += [good | {"score_mean": x} for x in (None, "0.1", float("nan"), True)]
    for broken in bad:
        with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
            CalibrationTable.from_data(broken)


def test_a_file_of_version_1_is_read(
    checkpoint: Path, table: CalibrationTable, tmp_path: Path
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema_version": 1, **table.to_data()}))
    assert CalibrationTable.read(old) == table
    Calibration.read(old).require_model(identity_of(checkpoint))


def test_errors_are_typed(checkpoint: Path, question_set: Path, tmp_path: Path) -> None:
    text, picture = tmp_path / "notes.txt", np.zeros((48, 48, 3), np.uint8)
    text.write_text("not a video\n" * 100)
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 20)
    empty = tmp_path / "empty"
    write_question_set(empty, [])
    single = make_video(tmp_path / "single.mp4", [picture], fps=8)
    for footage, expected in (
        (tmp_path / "absent.mp4", errors.VideoNotFound),
        (text, errors.VideoUnreadable),
        (noise, errors.VideoUnreadable),
        (empty, errors.VideoEmpty),
        (tmp_path, errors.ConfigError),  # a folder that is no question set
        (single, errors.ConfigError),  # no frame with a predecessor
    ):
        with pytest.raises(expected):
            run(checkpoint, footage, tmp_path / "out.json")
    with pytest.raises(errors.CheckpointError):
        run(tmp_path / "absent", question_set, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_clips_that_cannot_be_read_are_left_out_and_said(
    checkpoint: Path, question_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ranges and precisions alike; no section says that it comes of them."""
    noise, out = tmp_path / "noise.mp4", tmp_path / "out.json"
    noise.write_bytes(bytes(range(256)) * 20)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    line = [str(checkpoint), str(question_set), str(noise), "-o", str(out), "--max-frames", "4"]
    assert command.run(parser.parse_args([*line, "--sections", "ranges,precision"])) == 0
    assert capsys.readouterr().err.count("noise.mp4 is left out") == 2
    for section in Calibration.read(out).sections.values():
        assert [clip.name for clip in section.provenance.clips] == [question_set.name]
        assert list(section.provenance.skipped) == ["noise.mp4"]
    other = tmp_path / "other.mp4"
    other.write_bytes(bytes(range(256)) * 21)
    with pytest.raises(errors.ConfigError, match="only 1 of 3 clips can be read"):
        calibrate(checkpoint, [question_set, noise, other])


def test_footage_of_one_colour_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    grey = np.full((48, 48, 3), 77, np.uint8)
    blank = make_video(tmp_path / "blank.mp4", [grey] * 6, fps=2)
    with pytest.raises(errors.ConfigError, match="of one colour"):
        calibrate(checkpoint, [blank])
    with pytest.raises(errors.ConfigError, match="of one colour"):
        plan(checkpoint, [blank], 2.0, 4, tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["blank.mp4"]


def test_event_sets_are_footage_too(
    checkpoint: Path, clips: list[list[bytes]], tmp_path: Path
) -> None:
    watches = [LabelledAlert(question="Is there a ball?")]
    parts = [
        Footage(name=str(i), times_s=range(len(jpegs)), jpegs=jpegs, watches=watches)
        for i, jpegs in enumerate(clips)
    ]
    write_event_set(tmp_path / "set", parts)
    table = calibrate(checkpoint, [tmp_path / "set"])
    assert (table.num_frames, table.num_scores) == (8, 5 * 9)


def test_a_model_without_a_scorer_has_ranges_and_no_scores(
    question_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the published Molmo2. The ranges are those of the whole vision side."""
    plain = make_checkpoint(tmp_path / "plain", scorer=False)
    assert run(plain, question_set, tmp_path / "out.json") == 0
    assert "score      none: the model has no token scorer" in capsys.readouterr().out
    table = CalibrationTable.read(tmp_path / "out.json")
    assert (table.num_frames, table.num_scores, table.thresholds) == (sum(CLIP_LENGTHS), 0, ())
    parts = {name.partition(".")[0] for name in table.input_ranges}
    assert parts == set(VISION_PARTS) - {"scorer"}
    assert all(value > 0 for value in table.output_ranges.values())
