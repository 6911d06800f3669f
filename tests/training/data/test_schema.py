"""A record is taken as documented or refused by file, line and field."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import DataError, RecordInvalid
from edge_vlm.text.points import parse_points
from edge_vlm_training.data.answers import Place, count_text, points_text
from edge_vlm_training.data.records import read_records, scan_records
from edge_vlm_training.data.schema import CAPTION_QUESTION, KINDS, parse_record

QA = {"type": "qa", "question": "What is it?", "answer": "A cat."}
POINT = {"time_s": 0.5, "x": 0.25, "y": 0.031}


def record(*annotations: dict[str, Any], **fields: Any) -> str:
    return json.dumps({"video": "a.mp4", "annotations": [*annotations] or [QA], **fields})


def test_every_kind_of_annotation_becomes_a_question_and_an_answer() -> None:
    parsed = parse_record(
        record(
            QA,
            {"type": "caption", "caption": "A cat sits.", "style": "long_caption"},
            {"type": "count", "question": "How many cats?", "count": 2},
            {"type": "count", "question": "How many cats?", "count": 0},
            {
                "type": "count",
                "question": "How many cats?",
                "count": 2,
                "label": "cats",
                "points": [POINT | {"id": 2}, POINT | {"x": 0.5}],
            },
            {"type": "point", "question": "Point to the cat.", "label": "cat", "points": [POINT]},
        ),
        "a.jsonl:1",
    )
    assert [annotation.turn() for annotation in parsed.annotations] == [
        ("What is it?", "A cat."),
        (f"long_caption: {CAPTION_QUESTION}", "A cat sits."),
        ("How many cats?", "2"),
        ("How many cats?", "There are none."),
        (
            "How many cats?",
            'Counting the <points coords="0.5 2 250 031 1 500 031">cats</points> shows a total '
            "of 2.",
        ),
        ("Point to the cat.", '<points coords="0.5 1 250 031">cat</points>'),
    ]
    assert {annotation.kind for annotation in parsed.annotations} == set(KINDS)


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": record() + "\n" + record(), "b.json": record()}.items():
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    assert len(read_records(tmp_path / "a.jsonl")) == 2
    assert len(read_records(tmp_path)) == 1  # b.json


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


COUNT = {"type": "count", "question": "How many?", "count": 1, "points": [POINT]}


@pytest.mark.parametrize(
    ("line", "field", "what"),
    [
        ("{", "$", "not JSON"),
        ('"text"', "$", "Expected `object`"),
        (record(QA, extra=1), "$", "unknown field `extra`"),
        ('{"video": "a.mp4"}', "$", "missing required field `annotations`"),
        (record(video=""), "$.video", "length >= 1"),
        ('{"video": "a.mp4", "annotations": []}', "$.annotations", "length >= 1"),
        (record(QA, without(QA, "answer")), "$.annotations[1]", "field `answer`"),
        (record(QA | {"answer": 3}), "$.annotations[0].answer", "Expected `str`"),
        (record(QA | {"type": "quiz"}), "$.annotations[0].type", "Invalid value 'quiz'"),
        (record(QA | {"at_s": -1}), "$.annotations[0].at_s", ">= 0"),
        (record(QA, start_s=3, end_s=2), "$.end_s", "not behind start_s"),
        (record(QA | {"at_s": 5}, end_s=4), "$.annotations[0].at_s", "behind the clip's end"),
        (record(COUNT | {"count": 2}), "$.annotations[0]", "the points show 1 objects"),
        (record(COUNT | {"count": 1.5}), "$.annotations[0].count", "Expected `int`"),
        (
            record(COUNT | {"points": [POINT | {"x": 1.2}]}),
            "$.annotations[0].points[0].x",
            "<= 1.0",
        ),
        (
            record(COUNT | {"points": [POINT | {"time_s": 9}]}, end_s=4),
            "$.annotations[0].points[0].time_s",
            "behind the clip's end",
        ),
        (record(QA | {"answer": "a <|im_end|>"}), "$.annotations[0]", "<|im_end|>"),
        (record(QA | {"history": [["a", "<im_patch>"]]}), "$.annotations[0]", "<im_patch>"),
        (record(QA | {"history": [["a"]]}), "$.annotations[0].history[0]", "length 2"),
    ],
)
def test_a_wrong_record_names_its_place_and_field(line: str, field: str, what: str) -> None:
    with pytest.raises(RecordInvalid) as caught:
        parse_record(line, "train.jsonl:7")
    assert caught.value.field == field
    assert caught.value.where == "train.jsonl:7"
    assert what in caught.value.what
    assert field in str(caught.value)
    assert caught.value.remedy
    assert "docs/training-data.md" in caught.value.remedy


PLACES = st.lists(
    st.builds(
        Place,
        time_s=st.floats(0, 99),
        x=st.floats(0, 1),
        y=st.floats(0, 1),
        number=st.integers(1, 9),
    ),
    min_size=1,
    max_size=8,
)


@given(PLACES)
def test_points_are_read_back_as_written(places: list[Place]) -> None:
    found = parse_points(points_text(places, "red cats"))
    assert {point.label for point in found} == {"red cats"}
    written = sorted(
        (round(p.time_s, 1), round(1000 * p.x) / 1000, round(1000 * p.y) / 1000, p.number)
        for p in places
    )
    assert [(p.at, p.x, p.y, p.object_id) for p in found] == written
    shown = len({place.number for place in places})
    counted = count_text(shown, places, "cats")
    assert counted.endswith(f"shows a total of {shown}.")
    assert len(parse_points(counted)) == len(places)


def test_a_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"{record()}\n\n{record(extra=1)}\n".encode() + b"\xff\xfe\n")
    with pytest.raises(RecordInvalid, match=r"train\.jsonl:3"):
        read_records(path)
    scanned = list(scan_records(path))
    assert [isinstance(item, RecordInvalid) for item in scanned] == [False, True, True]
    assert isinstance(scanned[2], RecordInvalid)
    assert str(scanned[2].where).endswith(":4")
    path.write_text(record(video="clips/b.mp4") + "\n")
    (found,) = read_records(path)
    assert found.video == tmp_path / "clips/b.mp4"
    assert found.where == f"{path}:1"


def test_a_folder_is_its_index_or_a_record_beside_every_video(tmp_path: Path) -> None:
    body = json.dumps({"annotations": [QA]})
    (tmp_path / "b.json").write_text(body)
    with pytest.raises(RecordInvalid, match="0 files named b"):
        read_records(tmp_path)
    (tmp_path / "b.mp4").write_bytes(b"")
    (tmp_path / "a.json").write_text(record(video="b.mp4"))
    assert [item.video.name for item in read_records(tmp_path)] == ["b.mp4", "b.mp4"]
    assert [Path(item.where).name for item in read_records(tmp_path)] == ["a.json", "b.json"]
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(RecordInvalid, match=r"c\.json"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text(record() + "\n")
    assert [item.video.name for item in read_records(tmp_path)] == ["a.mp4"]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no record"):
        read_records(tmp_path / "empty.jsonl")
