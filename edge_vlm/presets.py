"""Shapes of models by name: the published ones, the demo's, and a tiny one for tests."""

from __future__ import annotations

import math

from edge_vlm.config import (
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    Rescale,
    RopeScaling,
    ScorerConfig,
    VisionAttention,
    VisionConfig,
)


def molmo2_4b() -> ModelConfig:
    """Molmo2-4B (arXiv 2601.10611, on Qwen3-4B) with the STTS scorer (arXiv 2603.18004).

    The published folder has no scorer: `dataclasses.replace(molmo2_4b(), scorer=None)`.
    """
    return _molmo2(
        LanguageConfig(
            width=2560,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_width=9728,
            base_vocab=151_936,
            extra_vocab=128,
            rope_theta=5e6,
            max_positions=36_864,
        )
    )


def molmo2_8b() -> ModelConfig:
    """Molmo2-8B (on Qwen3-8B) with the STTS scorer; the published folder has none."""
    return _molmo2(
        LanguageConfig(
            width=4096,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_width=12_288,
            base_vocab=151_936,
            extra_vocab=128,
            rope_theta=1e6,
            max_positions=36_864,
        )
    )


def molmo2_o_7b() -> ModelConfig:
    """Molmo2-O-7B (on Olmo-3-7B) with the STTS scorer; the published folder has none.

    Scaled are the blocks with full attention in Olmo-3, every fourth one. The training code can
    also scale all the others instead, so the config.json of a folder decides when it is loaded.
    """
    return _molmo2(
        LanguageConfig(
            width=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            mlp_width=11_008,
            base_vocab=100_278,
            extra_vocab=128,
            rope_theta=5e5,
            max_positions=65_536,
            post_norm=True,
            full_qk_norm=True,
            rope_scaling=RopeScaling(
                factor=8.0,
                original_max_positions=8192,
                attention_factor=0.1 * math.log(8) + 1,
                layers=tuple(range(3, 32, 4)),
            ),
        )
    )


def _molmo2(language: LanguageConfig) -> ModelConfig:
    """All three share one vision side; its projector is as wide as the language model's MLP."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=378,
            patch_size=14,
            width=1152,
            num_heads=16,
            head_dim=72,
            mlp_width=4304,
            num_layers=25,
            feature_layers=(24, 18),
        ),
        scorer=ScorerConfig(prune_at=3, num_heads=16, head_dim=72, mlp_width=4304),
        connector=ConnectorConfig(
            width=1152, num_heads=16, head_dim=72, mlp_width=language.mlp_width
        ),
        language=language,
    )


def demo(base_vocab: int, extra_vocab: int) -> ModelConfig:
    """The small model of the rendered world: 96-pixel frames of 16 cells."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=96,
            patch_size=8,
            width=128,
            num_heads=2,
            head_dim=64,
            mlp_width=512,
            num_layers=5,
            feature_layers=(4, 3),
        ),
        scorer=ScorerConfig(
            prune_at=1, num_heads=2, head_dim=64, mlp_width=128, rescale=Rescale.ABSOLUTE
        ),
        connector=ConnectorConfig(width=128, num_heads=2, head_dim=64, mlp_width=384),
        language=LanguageConfig(
            width=192,
            num_layers=6,
            num_heads=3,
            num_kv_heads=3,
            head_dim=64,
            mlp_width=512,
            base_vocab=base_vocab,
            extra_vocab=extra_vocab,
            rope_theta=1e4,
            max_positions=768,
        ),
        attention=VisionAttention.FRAME,
    )


def tiny(base_vocab: int = 96, extra_vocab: int = 16) -> ModelConfig:
    """Random-weight shapes for tests: grouped queries, nine cells a frame."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=36,
            patch_size=4,
            width=32,
            num_heads=2,
            head_dim=16,
            mlp_width=48,
            num_layers=5,
            feature_layers=(4, 3),
        ),
        scorer=ScorerConfig(
            prune_at=1, num_heads=2, head_dim=16, mlp_width=40, rescale=Rescale.ABSOLUTE
        ),
        connector=ConnectorConfig(width=32, num_heads=2, head_dim=16, mlp_width=56),
        language=LanguageConfig(
            width=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_width=64,
            base_vocab=base_vocab,
            extra_vocab=extra_vocab,
            rope_theta=1e4,
            max_positions=512,
        ),
        attention=VisionAttention.FRAME,
    )
