"""Section `precision` of a calibration: what becomes of every product with weights, and why.

The numbers that are too many for JSON, rounded weights and smoothing factors, lie in one file
beside it, a zip of numpy arrays that are read one at a time.
"""

from __future__ import annotations

import math
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.calibration import Calibration

I8 = npt.NDArray[np.int8]
F32 = npt.NDArray[np.float32]
KEPT = "base"
"""A product that is not quantised, whatever the precision asks for."""
FORMATS = (KEPT, "int8", "int4")
ARRAYS_SUFFIX = ".rounded.npz"
REMEDY = "run `edge-vlm calibrate --sections precision` on this model again"
_Arrays = TypeVar("_Arrays", bound="ArraysWriter")


@dataclass(frozen=True, kw_only=True)
class ProductPlan:
    """One product with weights, by its module's name. Errors are shares of the energy (mean square)
    of what the product gives in float32, on states that nothing was chosen by."""

    module: str
    weights: str
    """The coarsest format that it stands: `int4`, `int8` or `base`."""
    activations: str | None
    """`int8` where its input is quantised too."""
    method: str
    """How it is rounded: `gptq`, `nearest`, `smoothed` (nearest, after smoothing) or `none`."""
    max_abs: float
    """Largest |x| that went in."""
    typical: float
    """Median over the input's channels of the largest |x| of each."""
    outliers: int
    """Channels that reach more than OUTLIER times the typical one."""
    range: float | None
    """The |x| that its input's int8 scale reaches, smoothing included."""
    error_nearest: float
    """Plainly rounded to the same formats."""
    error: float
    """As planned; 0 where it is kept."""
    reason: str

    def __post_init__(self) -> None:
        if self.weights not in FORMATS:
            raise ValueError(f"{self.module}: weights {self.weights!r} is none of {FORMATS}")
        numbers = [self.max_abs, self.typical, self.error_nearest, self.error]
        numbers += [] if self.range is None else [self.range]
        if not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(f"{self.module}: {numbers} are not all finite numbers")
        if self.activations not in (None, "int8"):
            raise ValueError(f"{self.module}: activations {self.activations!r} are not int8")
        if self.activations is not None and self.weights != "int8":
            raise ValueError(f"{self.module}: int8 activations go with int8 weights")
        if self.activations is not None and self.range is None:
            raise ValueError(f"{self.module}: int8 activations need a range")


@dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    SECTION: ClassVar[str] = "precision"
    VERSION: ClassVar[int] = 1

    products: tuple[ProductPlan, ...]
    frames: int
    """Frames whose states were seen."""
    tokens: int
    """Tokens that the language model read, answers included."""
    arrays: str
    """Name of the file beside the calibration that holds the arrays."""
    arrays_sha256: str

    def __post_init__(self) -> None:
        if Path(self.arrays).name != self.arrays:
            raise ValueError(f"{self.arrays!r} is no name of a file")
        if len({plan.module for plan in self.products}) != len(self.products):
            raise ValueError("a product is planned twice")

    def by_module(self) -> Mapping[str, ProductPlan]:
        return {plan.module: plan for plan in self.products}

    def to_data(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "products": [dict(plan) for plan in data["products"]]}

    @classmethod
    def from_data(cls, data: Any) -> PrecisionSection:
        """Inverse of `to_data`. Raises AttributeError, KeyError, TypeError or ValueError."""
        products = tuple(ProductPlan(**plan) for plan in data["products"])
        return cls(**{**data, "products": products})


class ArraysWriter:
    """The arrays' file, array by array: no more than one of them is held."""

    def __init__(self, path: Path) -> None:
        self.path, self._partial = path, path.with_name(f"{path.name}.partial")

    def __enter__(self: _Arrays) -> _Arrays:
        self._zip = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The file appears whole or not at all."""
        self._zip.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()

    def _add(self, name: str, array: npt.NDArray[Any]) -> None:
        # A fixed date: the same arrays make the same file.
        entry = zipfile.ZipInfo(f"{name}.npy")
        with self._zip.open(entry, "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

    def weight(self, module: str, numbers_KN: I8, scale_BN: F32) -> None:
        """Whole numbers -8..7 [K, N], two to a byte along K, and scales of their blocks."""
        unsigned = (numbers_KN + 8).astype(np.uint8)
        self._add(f"{module}.int4", unsigned[::2] | (unsigned[1::2] << 4))
        self._add(f"{module}.scale", scale_BN)

    def smoothing(self, norm: str, factor_K: F32) -> None:
        """What the norm's outputs are divided by, channel by channel."""
        self._add(f"{norm}.smooth", factor_K)


class PlannedArrays:
    """What an `ArraysWriter` wrote. PlannedArrays are read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as found:
                self._names = frozenset(found.files)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"cannot read the calibration's arrays: {error}", where=path, remedy=REMEDY
            ) from error

    @classmethod
    def of(cls, section: PrecisionSection, calibration: Path) -> PlannedArrays:
        """Those beside the file `calibration`. Raises ConfigError when they are absent or not those
        that were written with it."""
        path = calibration.parent / section.arrays
        if not path.is_file():
            raise ConfigError(
                f"the calibration's rounded weights are missing: {section.arrays} was written "
                "beside it",
                where=calibration,
                remedy=f"copy it there, or {REMEDY}",
            )
        if sha256_of_file(path) != section.arrays_sha256:
            raise ConfigError(
                f"{section.arrays} is not the file that was written with the calibration",
                where=path,
                remedy=REMEDY,
            )
        return cls(path)

    def has_weight(self, module: str) -> bool:
        return f"{module}.int4" in self._names

    def weight(self, module: str) -> tuple[I8, F32]:
        """Inverse of `ArraysWriter.weight`."""
        with np.load(self.path, allow_pickle=False) as found:
            packed, scale = found[f"{module}.int4"], found[f"{module}.scale"]
        numbers = np.empty((2 * len(packed), packed.shape[1]), np.int8)
        numbers[::2], numbers[1::2] = packed & 15, packed >> 4
        numbers -= 8
        return numbers, scale

    def smoothing(self, norm: str) -> F32 | None:
        if f"{norm}.smooth" not in self._names:
            return None
        with np.load(self.path, allow_pickle=False) as found:
            factor: F32 = found[f"{norm}.smooth"]
        return factor


def carry_arrays(source: Path, merged: Calibration, out: Path) -> Calibration:
    """Where `merged` goes to `out`, in another folder than `source`, one of the calibrations that
    it was made of: the arrays go along if it is `source` that they belong to, under `out`'s name,
    so that those of another calibration there stay. `merged` as it is to be written. Raises
    ConfigError.
    """
    section = merged.find(PrecisionSection, source)
    own = Calibration.read(source).find(PrecisionSection, source)
    if section is None or own != section or source.parent.resolve() == out.parent.resolve():
        return merged
    found = PlannedArrays.of(section, source).path
    name = f"{out.stem}{ARRAYS_SUFFIX}"
    partial = out.parent / f"{name}.partial"
    try:
        shutil.copyfile(found, partial)
        partial.replace(out.parent / name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(
            f"cannot copy the rounded weights: {error.strerror}", where=out.parent
        ) from error
    written = merged.sections[PrecisionSection.SECTION]
    carried = replace(written, data={**written.data, "arrays": name})
    return replace(merged, sections={**merged.sections, PrecisionSection.SECTION: carried})
