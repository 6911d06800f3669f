"""A model that looks at footage as a live session would: what `edge-vlm calibrate` is done with.

Who can open one is an entry point of WATCHER_GROUP: `bundle` an exported model, without torch.
Checkpoints are opened by calibration itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from edge_vlm.config import ModelConfig
from edge_vlm.formats.calibration import ModelIdentity
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pruning.policies import Scores

WATCHER_GROUP = "edge_vlm.watchers"


@dataclass(frozen=True)
class Look:
    """What a model makes of a picture before anything is chosen."""

    scores: Scores | None
    """f32 [C]; None where what is scored is change, which depends on what was kept."""
    scored: npt.NDArray[Any] | None = None
    """f32 [N, D] that changes are computed from; only of a model that is scored by change."""


@dataclass(frozen=True)
class Check:
    """An alert's question was asked of the stream."""

    question: str
    probability: float
    answer_mass: float


@dataclass(frozen=True)
class Sent:
    """What became of a picture in a session."""

    cells_seen: int = 0
    """0: dropped as a duplicate."""
    cells_kept: int = 0
    kept: Sequence[int] = ()
    checks: Sequence[Check] = ()


class WatchedSession(Protocol):
    def send(self, rgb: Rgb, time_s: float) -> Sent:
        """The next picture. Raises the typed error of whatever goes wrong."""


class Watcher(Protocol):
    """A model that is ready to look."""

    model: ModelIdentity
    config: ModelConfig
    opened: str
    """For provenance: checkpoint, or bundle with its precision."""
    defaults: Mapping[str, Any]
    """Settings of sessions that the model was made for."""
    can_reuse: bool
    """Its sessions can have the setting `reuse`."""

    def begin(self) -> None:
        """The next picture is a clip's first."""

    def look(self, rgb: Rgb) -> Look:
        """The next picture, u8 [H, W, 3], of a stream in which every one is encoded. Raises
        NonFinite."""

    def session(
        self, settings: Mapping[str, Any], questions: Sequence[str] = ()
    ) -> AbstractContextManager[WatchedSession]:
        """A live session in which `questions` are alerts that are checked on every picture.

        Raises ConfigError for settings that the model cannot hold to, or where this kind of model
        cannot be asked; AlertsUnsupported.
        """


class OpenWatcher(Protocol):
    """The value of an entry point of WATCHER_GROUP."""

    def __call__(
        self, target: str, *, threads: int, backend: str
    ) -> AbstractContextManager[Watcher]:
        """Raises the typed error of whatever is wrong with it, MissingExtraError."""
