"""`calibration.json`: what a checkpoint's scores and activations look like on real footage.

Written by `edge-vlm calibrate`. Plain numbers with their provenance, readable without torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED, parse_json

SCHEMA_VERSION = 1
FP16_LIMIT = 0.5 * 65_504
"""Largest |x| that is still called safe in fp16: half of its range, as other footage may exceed
what was seen."""


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

    def to_json(self) -> str:
        """`fp16_unsafe` is written too, for readers that are not this class."""
        data = {"schema_version": SCHEMA_VERSION, **asdict(self), "fp16_unsafe": self.fp16_unsafe}
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object = None) -> CalibrationTable:
        """Inverse of `to_json`. Raises ConfigError for anything else, naming `where`."""
        try:
            data = parse_json(text)
            if (version := data.pop("schema_version")) != SCHEMA_VERSION:
                raise ValueError(f"schema_version is {version!r}, not {SCHEMA_VERSION}")
            unsafe = data.pop("fp16_unsafe")
            data["footage"] = tuple(data["footage"])
            data["thresholds"] = tuple(Threshold(**t) for t in data["thresholds"])
            data["score_quantiles"] = {int(p): x for p, x in data["score_quantiles"].items()}
            table = cls(**data)
            if unsafe != list(table.fp16_unsafe):
                raise ValueError("fp16_unsafe contradicts the ranges")
            return table
        except MALFORMED as error:
            raise ConfigError(
                f"not a calibration table: {error!r}",
                where=where,
                remedy="write it anew with `edge-vlm calibrate`",
            ) from error

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        temporary = path.with_name(f"{path.name}.partial")
        temporary.write_text(self.to_json())
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> CalibrationTable:
        """Raises ConfigError for a file that is missing, unreadable or not a table."""
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the calibration: {error}", where=path) from error
        return cls.from_json(text, where=path)
