"""The file that holds a calibration: whole, of one model, put together from parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibrated import BudgetSection, ChangeSection, session_settings
from edge_vlm.formats.calibration import (
    Calibration,
    CalibrationTable,
    ClipRecord,
    ModelIdentity,
    Provenance,
)

MODEL = ModelIdentity(
    name="door", weights={"model.safetensors": "aa"}, scorer="learned", image_size=96, num_cells=16
)
BUDGET = BudgetSection(
    wanted={"keep_ratio": 0.5},
    fps=2.0,
    settings={"policy": "stream", "keep_ratio": 0.48, "payback_frames": 32, "fps_cap": 2.0},
    share=0.5,
    per_s=16.0,
    clips=(),
    score_mean=0.1,
    score_std=0.2,
    curve=(),
    ratios=(),
)
CHANGE = ChangeSection(
    settings={"drop_duplicates": True, "duplicate_threshold": 2.5},
    still=None,
    noise=1.2,
    duplicate_share=0.1,
    duplicate_share_before=0.2,
    pixel_floor=0.5,
    score_floor=0.01,
    scorer="learned",
    moving_share=0.3,
)
PROVENANCE = Provenance(
    clips=(ClipRecord(name="door.mp4", sha256="bb", frames=20, seconds=10.0, size=(640, 480)),),
    skipped={"bad.mp4": "not a video"},
    settings={"fps": 2.0},
    opened="checkpoint",
    tool_version="0.1",
)


def with_budget() -> Calibration:
    return Calibration(model=MODEL).with_section(BUDGET, PROVENANCE, ["a note"])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = with_budget().with_section(CHANGE, PROVENANCE)
    made.write(tmp_path / "c.json")
    read = Calibration.read(tmp_path / "c.json")
    assert read.to_json() == made.to_json()
    assert read.find(BudgetSection) == BUDGET
    assert read.find(ChangeSection) == CHANGE
    assert read.find(CalibrationTable) is None
    assert read.sections["budget"].provenance == PROVENANCE
    assert read.sections["budget"].notes == ("a note",)
    assert session_settings(read) == {**BUDGET.settings, **CHANGE.settings}
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_parts_are_merged_and_the_later_one_wins() -> None:
    later = dataclasses.replace(BUDGET, share=0.4)
    other = Calibration(model=MODEL).with_section(CHANGE, PROVENANCE)
    merged = with_budget().merged(other.with_section(later, PROVENANCE))
    assert set(merged.sections) == {"budget", "change"}
    assert merged.find(BudgetSection) == later


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"model.safetensors": "cc"}, "name": "yard"}, "'door', not of this 'yard'"),
        ({"scorer": "change"}, "scorer 'learned', not of 'change'"),
    ],
)
def test_another_model_is_refused(change: dict[str, object], said: str) -> None:
    other = Calibration(model=dataclasses.replace(MODEL, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said):
        with_budget().require_model(other.model, "c.json")
    with pytest.raises(ConfigError):
        with_budget().merged(other, "other.json")


def test_a_checkpoint_and_its_bundle_are_one_model() -> None:
    source = {"checkpoint": "door", "sha256": {"config.json": "1", "model.safetensors": "aa"}}
    for files in (source, {**source, "sha256": {**source["sha256"], "config.json": "2"}}):  # type: ignore[dict-item]
        found = ModelIdentity.from_source(files, scorer="learned", image_size=96, num_cells=16)
        assert found.is_same(MODEL)
    with pytest.raises(ValueError, match="no hash of any weights"):
        ModelIdentity.from_source({}, scorer="learned", image_size=96, num_cells=16)


def test_damage_and_other_versions_are_named() -> None:
    text = with_budget().to_json()
    data = json.loads(text)
    for broken, said in (
        (text.replace("0.48", "0.58"), "changed or damaged"),
        (json.dumps(data | {"schema_version": 3}), "schema_version 3, this program reads 1 and 2"),
        (text[:-30], "not a calibration"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "not a calibration"),
    ):
        with pytest.raises(ConfigError, match=said):
            Calibration.from_json(broken, "c.json")
    layout = json.dumps(data, sort_keys=True)  # the same in another order
    assert Calibration.from_json(layout).find(BudgetSection) == BUDGET


def test_a_section_of_another_version_or_without_sense_is_named() -> None:
    made = with_budget()
    for change, said in (
        ({"version": 9}, "of version 9, this program reads 1"),
        ({"data": {**BUDGET.to_data(), "share": "much"}}, "makes no sense"),
        ({"data": {**BUDGET.to_data(), "settings": {"api_key": 1}}}, "no say in: api_key"),
        ({"data": {**BUDGET.to_data(), "settings": {"keep_ratio": "1"}}}, "keep_ratio is '1'"),
        ({"data": {**BUDGET.to_data(), "per_s": float("nan")}}, "not a finite number"),
    ):
        section = dataclasses.replace(made.sections["budget"], **change)
        broken = dataclasses.replace(made, sections={"budget": section})
        with pytest.raises(ConfigError, match=said):
            broken.find(BudgetSection)
    stranger = dataclasses.replace(made, sections={**made.sections, "new": made.sections["budget"]})
    assert Calibration.from_json(stranger.to_json()).merged(made).sections.keys() == {
        "budget",
        "new",
    }
