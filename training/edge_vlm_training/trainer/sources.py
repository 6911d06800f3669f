"""The data of a recipe: its sources by name and weight, as this process's stream of batches."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.mixture import Mixture, Share
from edge_vlm_training.data.sample import Source
from edge_vlm_training.data.sampling import FrameSampling
from edge_vlm_training.data.stream import PackedStream, PackingConfig
from edge_vlm_training.data.trees import TokenWeights
from edge_vlm_training.data.video_source import VideoSource
from edge_vlm_training.data.world_source import WorldSource
from edge_vlm_training.recipes.base import WORLD, StepRecipe
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.world.scenes import WorldConfig


def open_stream(
    recipe: StepRecipe, cfg: ModelConfig, prompt: PromptFormat, world: Ranks
) -> PackedStream:
    """This process's share of the recipe's rows, the same rows for any number of processes.

    Raises ConfigError for a source that is not SOURCE or SOURCE@WEIGHT, or for a batch that cannot
    be shared; DataError and RecordInvalid for files that cannot be read.
    """
    shares = [_share(text, recipe, cfg) for text in recipe.data]
    try:
        mixture = Mixture(shares, seed=recipe.seed)
    except ValueError as error:
        raise ConfigError(f"data = {','.join(recipe.data)}: {error}") from error
    packing = PackingConfig(
        max_tokens=recipe.sequence_length,
        max_frames=recipe.row_frames,
        removed=recipe.removed,
        min_cells=(recipe.min_cells,),
    )
    each = recipe.batch // world.size
    return PackedStream(
        mixture,
        prompt,
        cfg,
        packing,
        weights=TokenWeights(scale=recipe.token_weight),
        lanes=range(world.rank * each, (world.rank + 1) * each),
        num_lanes=recipe.batch,
        rows_per_batch=recipe.device_batch,
        skip_bad=recipe.skip_bad,
        threads=recipe.decode_threads,
    )


def _share(text: str, recipe: StepRecipe, cfg: ModelConfig) -> Share:
    name, _, weight = text.partition("@")
    try:
        return Share(_source(name, recipe, cfg), float(weight or 1))
    except ValueError as error:
        raise ConfigError(
            f"data: {text!r}: {error}", remedy="write SOURCE or SOURCE@WEIGHT, with commas between"
        ) from error


def _source(name: str, recipe: StepRecipe, cfg: ModelConfig) -> Source:
    if name == WORLD:
        return WorldSource(
            WorldConfig(fps=recipe.fps),
            seed=recipe.seed,
            num_frames=sorted({1, max(1, recipe.max_frames // 2), recipe.max_frames}),
            branches=recipe.world_questions,
            at_end=cfg.attention is VisionAttention.ALL,
        )
    sampling = FrameSampling(fps=recipe.fps, max_frames=recipe.max_frames)
    return VideoSource(Path(name), sampling, seed=recipe.seed, name=name)
