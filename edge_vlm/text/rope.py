"""Rotary positions: by which angle each pair of a head's dimensions turns per position.

The model, the exported graph's inputs and the runtime take their cosines and sines from here. A
model whose blocks rotate in two ways has two tables, which lie side by side on the last axis:
plain, then scaled (`LanguageConfig.rope_table_of`).
"""

from __future__ import annotations

import math

import numpy as np

from edge_vlm.config import LanguageConfig, RopeScaling


def rope_frequencies(cfg: LanguageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Radians per position, and what cosine and sine are multiplied by: f32 [cfg.rope_width]."""
    plain = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    one = np.ones_like(plain)
    tables = [(plain, one)]
    if cfg.rope_scaling is not None:
        scaled = (_yarn(cfg, cfg.rope_scaling, plain), one * cfg.rope_scaling.attention_factor)
        tables = [*tables, scaled] if cfg.num_rope_tables == 2 else [scaled]
    angles, factors = (
        np.concatenate(side).astype(np.float32) for side in zip(*tables, strict=True)
    )
    return angles, factors


def rope_table(cfg: LanguageConfig, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine f32 [num_positions, cfg.rope_width] of the first positions."""
    angles, factors = rope_frequencies(cfg)
    turned = np.arange(num_positions, dtype=np.float32)[:, None] * angles
    return np.cos(turned) * factors, np.sin(turned) * factors


def _yarn(cfg: LanguageConfig, scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    """Plain frequencies where dimensions turn often, `factor` times slower where they hardly do."""

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns within the original positions."""
        length = scaling.original_max_positions / (2 * math.pi * turns)
        return cfg.head_dim * math.log(length) / (2 * math.log(cfg.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    # The published code widens an empty ramp by this much.
    span = high - low if high != low else 0.001
    slowed = np.clip((np.arange(len(plain)) - low) / span, 0, 1)
    mixed: np.ndarray = plain / scaling.factor * slowed + plain * (1 - slowed)
    return mixed
