"""`calibration.json`: what a model does on someone's own footage, and the settings that follow.

Written by `edge-vlm calibrate`, read by export and runtime without torch. One file holds sections
that know nothing of each other::

    {"schema_version": 2, "model": {...}, "content_sha256": "...",
     "sections": {"budget": {"version": 1, "provenance": {...}, "notes": [...], "data": {...}}}}

A section is made by itself and put into a file that may hold others already; all must be of one
model. Its numbers are a class with `SECTION`, `VERSION`, `to_data` and `from_data`
(`edge_vlm.formats.calibrated`; activation ranges are `CalibrationTable` below).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, fault_of, parse_json

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 was a `CalibrationTable` alone, with the hash of one file of weights."""
MOST_BYTES = 64 << 20
"""Of the file: ranges of a full-size model take some hundred kB."""
FP16_LIMIT = 0.5 * 65_504
"""Largest |x| that is still called safe in fp16: half of its range, as other footage may exceed
what was seen."""
REMEDY = "write it anew with `edge-vlm calibrate`"


class SectionData(Protocol):
    """What a section's numbers are as a class."""

    SECTION: ClassVar[str]
    VERSION: ClassVar[int]

    def to_data(self) -> dict[str, Any]:
        """As JSON has it."""

    @classmethod
    def from_data(cls, data: Any) -> Any:
        """Inverse of `to_data`. Raises AttributeError, KeyError, TypeError or ValueError."""


Data = TypeVar("Data", bound=SectionData)


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which weights a calibration is of. A checkpoint and all bundles made from it are one model,
    in whatever precision."""

    name: str
    weights: Mapping[str, str]
    """sha256 of each file of weights, by its name; of made-up weights their shape and seed."""
    scorer: str = ""
    """learned, change or none; "" where the file does not say (version 1)."""
    image_size: int = 0
    """Side of the square, in pixels, that the model sees."""
    num_cells: int = 0
    is_partial: bool = False
    """The hash of one file of several is known (version 1)."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("there is no hash of any weights")

    @classmethod
    def from_source(
        cls, source: Mapping[str, Any], *, scorer: str, image_size: int, num_cells: int
    ) -> ModelIdentity:
        """From what a bundle's manifest says of its `source`, or what the exporter would write
        there. Raises ValueError when that names no weights."""
        if "random_weights" in source:
            name = f"random-{source['random_weights']}"
            weights = {"random_weights": f"{source['random_weights']} {source.get('seed')}"}
        else:
            name = str(source.get("checkpoint", "?"))
            hashes = source.get("sha256", {})
            weights = {k: str(v) for k, v in hashes.items() if not str(k).endswith(".json")}
        return cls(
            name=name, weights=weights, scorer=scorer, image_size=image_size, num_cells=num_cells
        )

    def has_weights_of(self, other: ModelIdentity) -> bool:
        """The same weights, as far as both say, however they are scored."""
        mine, others = set(self.weights.values()), set(other.weights.values())
        if self.is_partial or other.is_partial:
            return mine <= others or others <= mine
        return mine == others

    def is_same(self, other: ModelIdentity) -> bool:
        """The same weights, scored the same way."""
        unknown = self.is_partial or other.is_partial
        return self.has_weights_of(other) and (unknown or self.scorer == other.scorer)


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """A clip that was watched."""

    name: str
    sha256: str
    """Of the file; of a folder, of its index."""
    frames: int = 0
    """Frames looked at."""
    seconds: float = 0.0
    size: tuple[int, int] = (0, 0)
    """Width and height of its pictures."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a section's numbers come from."""

    clips: tuple[ClipRecord, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Clips that could not be read, and why."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, as options: fps, keep_ratio, ..."""
    opened: str = ""
    """What ran: checkpoint, or bundle with its precision."""
    tool_version: str = ""
    """Of edge-vlm."""

    @classmethod
    def from_data(cls, data: Any) -> Provenance:
        clips = [{**clip, "size": tuple(clip["size"])} for clip in data["clips"]]
        return cls(**{**data, "clips": tuple(ClipRecord(**clip) for clip in clips)})


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the file, as it stands there."""

    version: int
    provenance: Provenance
    data: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """What to tell whoever reads it, one line each."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The file. Sections of names that this version does not know are kept as they are."""

    model: ModelIdentity
    sections: Mapping[str, Section] = field(default_factory=dict)

    def with_section(
        self, data: SectionData, provenance: Provenance, notes: Iterable[str] = ()
    ) -> Calibration:
        """A copy with this section, in place of one that was there."""
        section = Section(
            version=data.VERSION,
            provenance=provenance,
            data=data.to_data(),
            notes=tuple(notes),
        )
        return dataclasses.replace(self, sections={**self.sections, data.SECTION: section})

    def find(self, kind: type[Data], where: object = None) -> Data | None:
        """The section as its class; None where there is none. Raises ConfigError."""
        section = self.sections.get(kind.SECTION)
        if section is None:
            return None
        if section.version != kind.VERSION:
            raise ConfigError(
                f"the section {kind.SECTION!r} is of version {section.version}, this program reads "
                f"{kind.VERSION}",
                where=where,
                remedy=f"{REMEDY} --sections {kind.SECTION}",
            )
        try:
            found: Data = kind.from_data(section.data)
            return found
        except MALFORMED as error:
            raise ConfigError(
                f"the section {kind.SECTION!r} makes no sense: {fault_of(error)}",
                where=where,
                remedy=REMEDY,
            ) from error

    def merged(self, other: Calibration, where: object = None) -> Calibration:
        """Both's sections; where both have one it is `other`'s. Raises ConfigError for another
        model, naming `where` `other` lies."""
        other.require_model(self.model, where)
        model = other.model if self.model.is_partial else self.model
        return Calibration(model=model, sections={**self.sections, **other.sections})

    def require_model(
        self, model: ModelIdentity, where: object = None, *, any_scorer: bool = False
    ) -> None:
        """Raises ConfigError when this is the calibration of another model, naming both.
        `any_scorer`: what is read of it does not depend on scores."""
        if self.model.is_same(model) or (any_scorer and self.model.has_weights_of(model)):
            return
        what = f"the calibration is that of other weights: of {self.model.name!r}, not of this "
        what += f"{model.name!r}"
        if self.model.has_weights_of(model):
            what = (
                f"the calibration is that of scorer {self.model.scorer!r}, not of {model.scorer!r}"
            )
        raise ConfigError(what, where=where, remedy="run `edge-vlm calibrate` on this model")

    # ---- on disk -----------------------------------------------------------------------------

    def to_json(self) -> str:
        data = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps({**data, "content_sha256": _content_hash(data)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object = None) -> Calibration:
        """Inverse of `to_json`; reads version 1, too. Raises ConfigError, naming `where`, for what
        is no calibration, is of a later version, or was changed since it was written."""
        try:
            data = parse_json(text)
            version = data["schema_version"]
            if type(version) is not int or version not in READABLE_VERSIONS:
                raise ConfigError(
                    f"the calibration has schema_version {version!r}, this program reads "
                    f"{' and '.join(map(str, READABLE_VERSIONS))}",
                    where=where,
                    remedy=f"{REMEDY}, or update edge-vlm",
                )
            if version == 1:
                return _from_version_1(data)
            written = data.pop("content_sha256")
            if written != _content_hash(data):
                raise ConfigError(
                    "the calibration is not what was written: it was changed or damaged",
                    where=where,
                    remedy=f"copy it again, or {REMEDY}",
                )
            sections = {
                str(name): Section(
                    version=int(section["version"]),
                    provenance=Provenance.from_data(section["provenance"]),
                    data=dict(section["data"]),
                    notes=tuple(section["notes"]),
                )
                for name, section in data["sections"].items()
            }
            return cls(model=ModelIdentity(**data["model"]), sections=sections)
        except MALFORMED as error:
            raise ConfigError(
                f"not a calibration: {fault_of(error)}", where=where, remedy=REMEDY
            ) from error

    def write(self, path: Path) -> None:
        """The file appears whole or not at all. Raises ConfigError."""
        temporary = path.with_name(f"{path.name}.partial")
        try:
            temporary.write_text(self.to_json())
            os.replace(temporary, path)
        except OSError as error:
            raise ConfigError(
                f"cannot write the calibration: {error.strerror}", where=path
            ) from error

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Raises ConfigError for a file that is missing, unreadable or no calibration."""
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ConfigError("too large for a calibration", where=path, remedy=REMEDY)
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the calibration: {error}", where=path, remedy=REMEDY
            ) from error
        return cls.from_json(text, where=path)


def _content_hash(data: Mapping[str, Any]) -> str:
    """Of everything but the hash itself, however it is laid out."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _from_version_1(data: dict[str, Any]) -> Calibration:
    del data["schema_version"]
    table = CalibrationTable.from_data(data)
    model = ModelIdentity(
        name="?",
        weights={"model.safetensors": table.checkpoint_sha256},
        image_size=table.image_size,
        is_partial=True,
    )
    clips = tuple(ClipRecord(name=name, sha256="") for name in table.footage)
    return Calibration(model=model).with_section(table, Provenance(clips=clips))


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Cells that score `score` or more are `kept_share` of all cells seen.

    That is `keep_ratio` rounded up to a whole cell, or more where equal scores meet the threshold.
    """

    keep_ratio: float
    score: float
    kept_share: float


@dataclass(frozen=True, kw_only=True)
class CalibrationTable:
    """Raises ValueError when made from numbers that are not finite.

    Scores are those of frames that have a predecessor in their clip: a first frame is kept whole.
    Of a model without a token scorer there are none, and nothing is made of them.
    """

    SECTION: ClassVar[str] = "ranges"
    VERSION: ClassVar[int] = 1

    checkpoint_sha256: str
    """Of the checkpoint's `model.safetensors`."""
    footage: tuple[str, ...]
    """File or folder names, without their paths."""
    num_frames: int
    image_size: int
    """Side of the square, in pixels, that the model saw."""
    num_scores: int
    score_mean: float
    score_std: float
    score_quantiles: Mapping[int, float]
    """Percent -> the score that this share of scores does not exceed."""
    thresholds: tuple[Threshold, ...]
    input_ranges: Mapping[str, float]
    """Largest |x| that entered each leaf module; a norm's input is the residual stream."""
    output_ranges: Mapping[str, float]
    """Largest |x| that left each leaf module."""

    def __post_init__(self) -> None:
        numbers = [self.num_frames, self.image_size, self.num_scores, self.score_mean]
        numbers += [self.score_std, *self.score_quantiles.values()]
        numbers += [number for t in self.thresholds for number in asdict(t).values()]
        numbers += [*self.input_ranges.values(), *self.output_ranges.values()]
        for number in numbers:
            if type(number) not in (int, float) or not math.isfinite(number):
                raise ValueError(f"{number!r} is not a finite number")
        if self.input_ranges.keys() != self.output_ranges.keys():
            raise ValueError("input_ranges and output_ranges must name the same modules")

    @property
    def fp16_unsafe(self) -> tuple[str, ...]:
        """Modules whose input or output went past FP16_LIMIT, by name."""
        largest = {n: max(x, self.output_ranges[n]) for n, x in self.input_ranges.items()}
        return tuple(sorted(name for name, value in largest.items() if value > FP16_LIMIT))

    def to_data(self) -> dict[str, Any]:
        """`fp16_unsafe` is written too, for readers that are not this class."""
        data = {**asdict(self), "fp16_unsafe": list(self.fp16_unsafe)}
        return {**data, "score_quantiles": {str(p): x for p, x in self.score_quantiles.items()}}

    @classmethod
    def from_data(cls, data: Any) -> CalibrationTable:
        """Inverse of `to_data`. Raises AttributeError, KeyError, TypeError or ValueError."""
        data = dict(data)
        unsafe = data.pop("fp16_unsafe")
        data["footage"] = tuple(data["footage"])
        data["thresholds"] = tuple(Threshold(**t) for t in data["thresholds"])
        data["score_quantiles"] = {int(p): x for p, x in data["score_quantiles"].items()}
        table = cls(**data)
        if list(unsafe) != list(table.fp16_unsafe):
            raise ValueError("fp16_unsafe contradicts the ranges")
        return table

    @classmethod
    def read(cls, path: Path) -> CalibrationTable:
        """The ranges of a calibration. Raises ConfigError for a file that is missing, unreadable,
        no calibration or without ranges."""
        table = Calibration.read(path).find(cls, path)
        if table is None:
            raise ConfigError(
                "the calibration has no ranges",
                where=path,
                remedy="add them with `edge-vlm calibrate --sections ranges -o` this file",
            )
        return table
