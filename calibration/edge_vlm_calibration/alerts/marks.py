"""When the answer to a question is yes: a file that a person wrote while watching.

    alert,question,clip,start,end
    visitor,Is there a person at the door now?,door.mp4,0:12,0:31
    visitor,,door.mp4,1:05.5,1:20

CSV with that first line, or JSON with a list of objects of these fields. Times are seconds or
[hours:]minutes:seconds from the clip's first picture. `question` may be left out where it was said
before, `clip` where there is one clip only. A line without times says that the alert is watched for
in that clip and nothing of it happens there.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.alert_set import INDEX as EVENT_INDEX
from edge_vlm.formats.alert_set import LabelledAlert, read_event_set
from edge_vlm.json_text import parse_json

FIELDS = ("alert", "question", "clip", "start", "end")
EXAMPLE = "alert,question,clip,start,end"
MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class Mark:
    """One line."""

    where: str
    alert: str
    question: str
    clip: str
    span: tuple[float, float] | None
    """Begin and end in seconds; None: nothing happens."""


@dataclass(frozen=True)
class Watch:
    """One question over one stream of one clip."""

    alert: str
    question: str
    clip: str
    stream: int
    events: tuple[tuple[float, float], ...]


def read_marks(path: Path, clips: Sequence[str]) -> list[Mark]:
    """Raises ConfigError naming the line that is wrong."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError("too large for marks", where=path)
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the marks: {error}", where=path) from error
    lines = _json_lines(path, text) if text.lstrip()[:1] in ("[", "{") else _csv_lines(path, text)
    questions: dict[str, str] = {}
    marks = []
    for where, line in lines:
        marks.append(_mark(where, line, clips, questions))
    if not marks:
        raise ConfigError("there are no marks in it", where=path, remedy=f"such as {EXAMPLE}")
    return marks


def _csv_lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    names = [str(name).strip() for name in reader.fieldnames or ()]
    if not {"alert", "start", "end"} <= set(names) or set(names) - set(FIELDS):
        raise ConfigError(
            f"the first line must name the columns, it is {', '.join(names)!r:.100}",
            where=path,
            remedy=f"write {EXAMPLE}",
        )
    reader.fieldnames = names
    found = []
    for line in reader:
        if None in line:
            raise ConfigError("more fields than columns", where=f"{path}:{reader.line_num}")
        found.append((f"{path}:{reader.line_num}", dict(line)))
    return found


def _json_lines(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        data = parse_json(text)
        if not isinstance(data, list) or not all(isinstance(each, dict) for each in data):
            raise ValueError("it must be a list of objects")
    except ValueError as error:
        raise ConfigError(f"cannot read the marks: {error}", where=path) from error
    for number, each in enumerate(data, 1):
        if unknown := set(each) - set(FIELDS):
            raise ConfigError(
                f"unknown field {sorted(unknown)[0]!r}",
                where=f"{path}, mark {number}",
                remedy=f"fields are {', '.join(FIELDS)}",
            )
    return [(f"{path}, mark {number}", each) for number, each in enumerate(data, 1)]


def _mark(
    where: str, line: Mapping[str, Any], clips: Sequence[str], questions: dict[str, str]
) -> Mark:
    for name in ("alert", "question", "clip"):
        if not isinstance(line.get(name), str | None):
            raise ConfigError(f"{name} is {line[name]!r:.60}, no text", where=where)
    alert = str(line.get("alert") or "").strip()
    if not alert:
        raise ConfigError("alert is missing", where=where, remedy="give the alert a name")
    question = str(line.get("question") or "").strip()
    if question and questions.setdefault(alert, question) != question:
        raise ConfigError(
            f"the alert {alert!r} has two questions: {questions[alert]!r} and {question!r}",
            where=where,
            remedy="give each question an alert of its own",
        )
    if alert not in questions:
        raise ConfigError(f"the question of {alert!r} is missing", where=where)
    clip = str(line.get("clip") or "").strip() or (clips[0] if len(clips) == 1 else "")
    matches = [name for name in clips if name == clip or Path(clip).name == name]
    if not matches:
        raise ConfigError(
            f"there is no clip {clip!r}", where=where, remedy=f"there are: {', '.join(clips)}"
        )
    given = line.get("start"), line.get("end")
    span = None
    if any(value not in (None, "") for value in given):
        begin_s, end_s = (_seconds(value, where) for value in given)
        if not begin_s < end_s:
            raise ConfigError(f"start must be before end: {begin_s:g} and {end_s:g} s", where=where)
        span = begin_s, end_s
    return Mark(where, alert, questions[alert], matches[0], span)


def _seconds(value: object, where: str) -> float:
    """Raises ConfigError."""
    try:
        if isinstance(value, bool) or value is None:
            raise ValueError
        parts = [float(part) for part in str(value).strip().split(":")]
        if not 1 <= len(parts) <= 3 or any(not 0 <= part < 1e9 for part in parts):
            raise ValueError
        if len(parts) > 1 and any(part >= 60 for part in parts[1:]):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{value!r} is no time",
            where=where,
            remedy="seconds, or minutes:seconds such as 1:05.5",
        ) from None
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + part
    return seconds


def watches_of(marks: Sequence[Mark], lengths_s: Mapping[str, float]) -> list[Watch]:
    """Of marks in clips of one stream each. Every alert is watched for in the clips that name it.

    Raises ConfigError for marks outside their clip, and for such that overlap."""
    groups: dict[tuple[str, str], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.alert, mark.clip), []).append(mark)
    watches = []
    for (alert, clip), group in groups.items():
        spans = sorted(
            ((mark.span, mark.where) for mark in group if mark.span is not None),
            key=lambda each: each[0],
        )
        nothing = [mark.where for mark in group if mark.span is None]
        if nothing and spans:
            raise ConfigError(
                f"{alert!r} has a line without times, which says that nothing of it happens in "
                f"{clip}, and one with times",
                where=f"{nothing[0]} and {spans[0][1]}",
                remedy="delete one of the two",
            )
        length_s = lengths_s[clip]
        for (begin_s, end_s), where in spans:
            if begin_s >= length_s or end_s > length_s + 1.0:
                raise ConfigError(
                    f"the mark {begin_s:g}..{end_s:g} s lies outside {clip}, which is "
                    f"{length_s:.1f} s long",
                    where=where,
                    remedy="times count from the clip's first picture",
                )
        for ((_, end_s), one), ((begin_s, _), other) in itertools.pairwise(spans):
            if begin_s < end_s:
                raise ConfigError(
                    f"marks of {alert!r} overlap: one ends at {end_s:g} s, the next begins at "
                    f"{begin_s:g} s",
                    where=f"{one} and {other}",
                    remedy="join them, or end the first before the second",
                )
        events = tuple(span for span, _ in spans)
        watches.append(Watch(alert, group[0].question, clip, 0, events))
    return watches


def watches_of_set(name: str, folder: Path) -> list[Watch]:
    """Of a folder that has its events with it (`edge_vlm.formats.alert_set`)."""
    found: list[Watch] = []
    for stream, part in enumerate(read_event_set(folder)):
        first_s = float(part.times_s[0])
        found += [_shifted(watch, name, stream, first_s) for watch in part.watches]
    return found


def _shifted(watch: LabelledAlert, clip: str, stream: int, first_s: float) -> Watch:
    events = tuple((begin_s - first_s, end_s - first_s) for begin_s, end_s in watch.events)
    return Watch(slug(watch.question), watch.question, clip, stream, events)


def is_event_set(path: Path) -> bool:
    return path.is_dir() and (path / EVENT_INDEX).is_file()


def slug(text: str) -> str:
    """As a name in `[[alert]]`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-_.")[:64] or "alert"
