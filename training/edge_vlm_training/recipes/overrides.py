"""`--set key=value`: fields of a recipe by name, read by the field's own type."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm_training.config import from_plain, msgspec, plain
from edge_vlm_training.recipes.base import Recipe

Path_ = tuple[str, ...]
_WORDS = {"none": None, "yes": True, "no": False}


def _removed(text: str) -> str:
    return ",".join(f"{1 - float(share):g}" for share in text.split(","))


RENAMED: dict[str, tuple[str, Callable[[str], str]]] = {
    "data": ("sources", str),
    "removed": ("keep_ratio", _removed),
    "final_rate": ("rate", "1,{}".format),
    "lr": ("train.llm train.scorer train.probes", str),
    "lr_vision": ("train.vit", str),
    **{f"lr_{part}": (f"train.{part}", str) for part in ("llm", "vit", "connector", "scorer")},
    "aux_weight": ("similarity.weight", str),
    "scale_weight": ("feature_scale.weight", str),
    "dense_weight": ("dense.weight", str),
    "timeline_weight": ("timeline.weight", str),
    "present_weight": ("presence.weight", str),
}
"""Short keys: what they stand for, and how their values are read."""


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with every `key=value` applied, the whole checked once.

    A key is a path (`stages.2.length.minutes`) or its last word, which then is set wherever it
    stands, in all stages or in one (`minutes`, `stages.2.minutes`). A tuple is written with commas,
    an absent value as `none`. Raises ConfigError: no `=`, an unknown key (all valid ones are
    listed), a value that is not of the field's type or that the recipe refuses.
    """
    data = plain(recipe)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting!r} is not key=value", remedy="write --set steps=100")
        try:
            if not _set(data, key, text):
                raise _unknown(data, key)
        except ValueError as error:
            raise ConfigError(f"--set {setting}: {error}") from error
    try:
        return from_plain(data, Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--set {' '.join(settings)}: {error}") from error


def leaves(data: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any, str | int]]:
    """Every value that can be set: its path, and where it lies as container and key.

    Stages and terms are found by number; a term also by its kind, a trained part by its name.
    """
    items = enumerate(data) if isinstance(data, list | tuple) else data.items()
    for key, value in items:
        below = (*path, str(key))
        if key in ("type", "name"):
            continue
        if isinstance(value, dict) or (isinstance(value, list | tuple) and _of_dicts(value)):
            yield from leaves(value, below)
        else:
            yield below, data, key


def valid_keys(recipe: Recipe) -> list[str]:
    """Every short key that `override` finds something for."""
    data = plain(recipe)
    names = {path[-1] for path, _, _ in leaves(data) if path[-2:-1] != ("train",)} - {"weight"}
    return sorted({*names, *(k for k in RENAMED if _places(data, [], k)), "steps", "minutes"})


def _of_dicts(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict)


def _set(data: Any, key: str, text: str) -> bool:
    """Whether there was something to set."""
    *prefix, name = key.split(".")
    if name in ("steps", "minutes"):
        return _set_length(data, [part for part in prefix if part != "length"], name, text)
    _, read = RENAMED.get(name, (name, str))
    value = read(text)
    places = _places(data, prefix, name)
    for container, place in places:
        container[place] = _value(container[place], value)
    return bool(places)


def _places(data: Any, prefix: list[str], name: str) -> list[tuple[Any, str | int]]:
    """Where the values lie that a key sets."""
    targets, _ = RENAMED.get(name, (name, str))
    return [
        (container, place)
        for path, container, place in leaves(data)
        if path[: len(prefix)] == tuple(prefix)
        and any(_named(path, container, target) for target in targets.split())
    ]


def _named(path: Path_, container: Any, target: str) -> bool:
    kind, _, name = target.rpartition(".")
    if kind == "train":
        return path[-2:-1] == ("train",) and name in path[-1].split("+")
    if kind:
        return container.get("type") == kind and path[-1] == name
    return path[-1] == name


def _set_length(data: Any, prefix: list[str], name: str, text: str) -> bool:
    """A stage that is measured in the other unit changes it."""
    if len(prefix) not in (0, 2) or prefix[:1] not in ([], ["stages"]):
        return False
    stages = [s for number, s in enumerate(data["stages"]) if prefix[1:] in ([], [str(number)])]
    for stage in stages:
        stage["length"] = {"type": name, name: text}
    return bool(stages)


def _value(before: Any, text: str) -> Any:
    """`text` as a plain value in the form of the one before; its type is checked later."""
    if isinstance(before, list | tuple):
        return [piece.strip() for piece in text.strip("()[]").split(",") if piece.strip()]
    return _WORDS.get(text.lower(), text)


def _unknown(data: Any, key: str) -> ConfigError:
    *prefix, _ = key.split(".")
    last = len(data["stages"]) - 1
    if prefix[:1] == ["stages"] and prefix[1:] and prefix[1] not in map(str, range(last + 1)):
        return ConfigError(f"--set: {key}: stages are numbered 0 to {last}")
    valid = valid_keys(from_plain(data, Recipe))
    near = difflib.get_close_matches(key.rpartition(".")[2], valid, n=1, cutoff=0.7)
    remedy = f"valid keys: {', '.join(valid)}; or one stage's: stages.N.minutes"
    if near:
        remedy = f"did you mean {near[0]}?"
    return ConfigError(f"--set: unknown key {key!r}", remedy=remedy)
