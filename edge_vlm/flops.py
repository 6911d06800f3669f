"""Floating-point operations of the model's matrix products, a multiplication and addition as two.

What a speed-up can at most be: the share of these that pruning leaves out. Normalisations,
activations and softmax are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_vlm.config import CELL, LanguageConfig, ModelConfig


def vision_flops(cfg: ModelConfig, cells_per_frame: Sequence[int]) -> int:
    """Frames that keep so many cells each, from their patches to the language model's features.

    The blocks before the drop and the scorer see whole frames, the rest the kept cells. Without
    scores every cell has to be kept; raises ValueError otherwise.
    """
    vision = cfg.vision
    whole_blocks = cfg.whole_blocks
    if not cfg.has_scores and any(cells != vision.num_cells for cells in cells_per_frame):
        raise ValueError("a model without a scorer keeps every cell")
    later_blocks = vision.num_layers - whole_blocks
    per_frame = 2 * vision.num_patches * vision.patch_dim * vision.width
    per_frame += whole_blocks * block_flops(cfg, vision.num_patches) + scorer_flops(cfg)
    kept = sum(
        later_blocks * block_flops(cfg, cells * CELL * CELL) + cells * connector_flops(cfg)
        for cells in cells_per_frame
    )
    return len(cells_per_frame) * per_frame + kept


def block_flops(cfg: ModelConfig, num_tokens: int) -> int:
    """One block of the vision transformer on one frame of `num_tokens` patches."""
    vision = cfg.vision
    inner = vision.num_heads * vision.head_dim
    per_token = 2 * (4 * vision.width * inner + 2 * vision.width * vision.mlp_width)
    return num_tokens * per_token + 4 * num_tokens**2 * inner


def scorer_flops(cfg: ModelConfig) -> int:
    """The scorer on one frame; 0 without one."""
    if cfg.change is not None:
        return 4 * cfg.vision.num_patches * cfg.vision.width
    if cfg.scorer is None:
        return 0
    width, scorer = cfg.vision.width, cfg.scorer
    pool = _pool_flops(width, scorer.num_heads * scorer.head_dim, width)
    mlp = 2 * (2 * width * scorer.mlp_width + scorer.mlp_width**2 + scorer.mlp_width)
    return cfg.vision.num_cells * (pool + mlp)


def connector_flops(cfg: ModelConfig) -> int:
    """The connector on one cell."""
    connector = cfg.connector
    in_width = cfg.vision.width * len(cfg.vision.feature_layers)
    pool = _pool_flops(in_width, connector.num_heads * connector.head_dim, connector.width)
    widths = 2 * connector.width + cfg.language.width
    return pool + 2 * widths * connector.mlp_width


def _pool_flops(in_width: int, inner: int, out_width: int) -> int:
    """Attention of one query over the nine patches of a cell, with its projections."""
    patches = CELL * CELL
    return 2 * inner * (in_width + 2 * patches * in_width + 2 * patches + out_width)


def language_flops(cfg: LanguageConfig, num_tokens: int, num_past: int = 0) -> int:
    """All blocks on new tokens after `num_past` ones, without the head.

    The attention is counted in full, as a kernel with an arbitrary mask computes it.
    """
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    per_token = 2 * cfg.width * (2 * queries + 2 * keys + 3 * cfg.mlp_width)
    attention = 4 * queries * num_tokens * (num_past + num_tokens)
    return cfg.num_layers * (num_tokens * per_token + attention)
