"""What serving a bundle needs of the host's memory, said before its graphs are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.memory import PROGRAM_BYTES, free_memory, row_bytes, run_bytes
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.session.budget import cache_capacity, plan_memory, shown_tokens
from edge_vlm_runtime.session.context import FRAMES_PER_PREFILL

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """In bytes, at most: every cache full and the longest prefill under way."""

    weights: int
    cache: int
    """Of one session, with its frames' features."""
    prefill: int
    sessions: int
    """Of viewers and cameras, as many as may be."""
    cameras: int = 0
    """Of the server's own: their sessions are there from the start."""

    @classmethod
    def of(
        cls,
        bundle: EngineBundle,
        settings: SessionSettings,
        limits: ServerLimits,
        num_cameras: int = 0,
    ) -> MemoryNeed:
        """Raises ConfigError for settings that the model cannot hold to."""
        model, language = ModelLimits.from_bundle(bundle), bundle.config.language
        spec = bundle.specs["llm"]
        window = shown_tokens(plan_memory(settings, model, limits), model)
        capacity = cache_capacity(model, limits)
        if settings.attention is Attention.FRAME:
            new = min(FRAMES_PER_PREFILL * model.frame_tokens, model.max_prefill_tokens)
        else:
            new = window
        folder = bundle.path / "graphs"
        features = model.token_bytes - row_bytes(language, spec)
        return cls(
            weights=sum(file.stat().st_size for file in folder.iterdir()),
            cache=capacity * row_bytes(language, spec) + window * max(0, features),
            prefill=run_bytes(language, spec, new, 0 if new == window else window),
            sessions=limits.max_sessions + num_cameras,
            cameras=num_cameras,
        )

    @property
    def least(self) -> int:
        """With one session, or with those of all cameras."""
        caches = max(1, self.cameras) * self.cache
        return PROGRAM_BYTES + self.weights + caches + self.prefill

    @property
    def most(self) -> int:
        """With as many as may come; one of them prefills at a time."""
        return self.least + (self.sessions - max(1, self.cameras)) * self.cache

    def __str__(self) -> str:
        return (
            f"weights {_gb(self.weights)}, a session's cache and frames {_gb(self.cache)}, its "
            f"longest prefill {_gb(self.prefill)}"
        )


def require_memory(
    bundle: EngineBundle,
    settings: SessionSettings,
    limits: ServerLimits,
    free: int | None = None,
    num_cameras: int = 0,
) -> None:
    """Raises ConfigError where one session would not fit, and warns where several would not.

    `free`: bytes, by default what the system says; where it says nothing nothing is checked.
    """
    free = free_memory() if free is None else free
    if free is None:
        return
    need = MemoryNeed.of(bundle, settings, limits, num_cameras)
    if need.least > free:
        raise ConfigError(
            f"serving {f'{num_cameras} cameras ' if num_cameras else ''}needs about "
            f"{_gb(need.least)} of memory ({need}) and {_gb(free)} are free",
            where=bundle.path,
            remedy="lower --kv-tokens, close other programs, or export with fewer bits",
        )
    if need.most > free:
        fitting = max(1, need.cameras) + (free - need.least) // need.cache
        log.warning(
            "%d sessions with full caches need about %s of memory (%s) and %s are free: %d would "
            "fit (--max-sessions, --kv-tokens)",
            need.sessions,
            _gb(need.most),
            need,
            _gb(free),
            fitting,
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
