"""Files of records: a JSONL file, or a folder of videos with a JSON file beside each.

A folder that holds `records.jsonl` is that file. In any other folder every `NAME.json` is the
record of the video `NAME.*` beside it, and may leave out `video`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import DataError, RecordInvalid
from edge_vlm.json_text import parse_json
from edge_vlm_training.data.schema import REMEDY, Record, parse_record

INDEX = "records.jsonl"


@dataclass(frozen=True)
class Located:
    """A record, the place that errors name (`train.jsonl:3`) and its video file."""

    record: Record
    where: str
    video: Path


def read_records(path: Path) -> list[Located]:
    """All records of a file or folder; the first wrong one is a RecordInvalid.

    Raises DataError if there is no such file or no record in it.
    """
    found = []
    for item in scan_records(path):
        if isinstance(item, RecordInvalid):
            raise item
        found.append(item)
    return found


def scan_records(path: Path) -> Iterator[Located | RecordInvalid]:
    """Every record, or what is wrong with it. Raises DataError as `read_records` does."""
    if not path.exists():
        raise DataError("no such file or folder of records", where=path)
    index = path / INDEX if path.is_dir() else path
    empty = True
    for item in _lines(index) if index.is_file() else _sidecars(path):
        empty = False
        yield item
    if empty:
        raise DataError("there is no record in it", where=path, remedy=REMEDY)


def _lines(index: Path) -> Iterator[Located | RecordInvalid]:
    # As bytes: a line that is not UTF-8 is that record's fault, not the file's.
    data = index.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            yield _parsed(line, f"{index}:{number}", index.parent)


def _sidecars(folder: Path) -> Iterator[Located | RecordInvalid]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for sidecar in (path for path in files if path.suffix == ".json"):
        where = str(sidecar)
        videos = [path for path in files if path.stem == sidecar.stem and path != sidecar]
        try:
            fields = parse_json(sidecar.read_bytes())
        except ValueError as error:
            yield RecordInvalid(f"not JSON: {error}", where=where, remedy=REMEDY)
            continue
        if isinstance(fields, dict) and "video" not in fields:
            if len(videos) != 1:
                yield RecordInvalid(
                    f"{len(videos)} files named {sidecar.stem}.* beside it, expected one video",
                    where=where,
                    field="$.video",
                    remedy="name the file in `video`, or put one video beside the record",
                )
                continue
            fields["video"] = videos[0].name
        yield _parsed(json.dumps(fields), where, folder)


def _parsed(line: str | bytes, where: str, folder: Path) -> Located | RecordInvalid:
    try:
        record = parse_record(line, where)
    except RecordInvalid as error:
        return error
    return Located(record, where, folder / record.video)
