"""Settings as typed structs: checked whenever one is made, plain JSON in files.

msgspec is imported here and nowhere else in this package.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.json_text import MALFORMED

try:
    import msgspec
except ImportError as error:
    raise MissingExtraError.for_library("msgspec", "train") from error

__all__ = ["Config", "Positive", "Share", "from_plain", "msgspec", "plain", "read_json"]

Positive = Annotated[int, msgspec.Meta(gt=0)]
Number = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
Weight = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Kept = Annotated[float, msgspec.Meta(gt=0, le=1)]
"""A share of cells to keep."""
Grey = Annotated[float, msgspec.Meta(ge=0, le=255)]
"""A difference in grey levels."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frozen. What a field's annotation says holds for every one that is made.

    Raises ValueError naming the field and its value.
    """

    def __post_init__(self) -> None:
        for field in _fields(type(self)):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                what = f"{type(self).__name__}.{field.name} = {value!r}"
                raise ValueError(f"{what}: {error}") from None

    def _check(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, field)
            raise ValueError(f"{type(self).__name__}.{field} = {value!r}: {rule}")


@cache
def _fields(kind: type[Config]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Found out once: a recipe is made anew for each thing that is set."""
    return msgspec.structs.fields(kind)


C = TypeVar("C", bound=Config)


def plain(config: Config) -> dict[str, Any]:
    """Plain JSON types; `from_plain` is the inverse."""
    built: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    return built


def from_plain(data: Any, kind: type[C]) -> C:
    """Numbers and booleans may be written as text. Raises msgspec.ValidationError."""
    return msgspec.convert(data, kind, strict=False, dec_hook=lambda type_, value: type_(value))


def read_json(path: Path, kind: type[C]) -> C:
    """The struct in a file. Raises ConfigError if it holds another or is damaged."""
    try:
        return from_plain(msgspec.json.decode(path.read_bytes()), kind)
    except (msgspec.MsgspecError, OSError, *MALFORMED) as error:
        raise ConfigError(f"not a {kind.__name__.lower()}: {error}", where=path) from error
