"""The data of a stage as this process's stream of batches."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import ConfigError, DataError
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.world.scenes import WorldConfig
from edge_vlm_training.data.packing.row_stream import PackingConfig
from edge_vlm_training.data.packing.stream import PackedStream
from edge_vlm_training.data.packing.trees import TokenWeights
from edge_vlm_training.data.sample import Source
from edge_vlm_training.data.sources.mixture import Mixture, Share
from edge_vlm_training.data.sources.world_source import WorldSource
from edge_vlm_training.data.video_source import VideoSource
from edge_vlm_training.recipes.base import WORLD, Rows


def open_mixture(
    data: Rows,
    cfg: ModelConfig,
    prompt: PromptFormat,
    *,
    rank: int,
    num_ranks: int,
    seed: int,
) -> PackedStream:
    """This process's share of the rows, the same rows for any number of processes.

    Raises ConfigError for a source that is not SOURCE or SOURCE@WEIGHT; DataError and RecordInvalid
    for files that cannot be read.
    """
    shares = [_share(text, data, cfg, seed) for text in data.sources]
    try:
        mixture = Mixture(shares, seed=seed)
    except ValueError as error:
        raise ConfigError(f"data = {','.join(data.sources)}: {error}") from error
    packing = PackingConfig(
        max_tokens=data.sequence_length,
        max_frames=data.row_frames,
        keep_ratio=data.keep_ratio,
        min_cells=(data.min_cells,),
    )
    each = data.batch // num_ranks
    return PackedStream(
        mixture,
        prompt,
        cfg,
        packing,
        weights=TokenWeights(scale=data.token_weight),
        lanes=range(rank * each, (rank + 1) * each),
        num_lanes=data.batch,
        rows_per_batch=data.device_batch,
        skip_bad=data.skip_bad,
        threads=data.decode_threads,
        form=data.form,
        reuse=data.reuse,
    )


def require_sources(data: Rows) -> None:
    """Before a model is loaded for them. Raises DataError for files that are not there."""
    for text in data.sources:
        name = text.partition("@")[0]
        if name != WORLD and not Path(name).exists():
            raise DataError("no such file or folder of records", where=name)


def _share(text: str, data: Rows, cfg: ModelConfig, seed: int) -> Share:
    name, _, weight = text.partition("@")
    try:
        return Share(_source(name, data, cfg, seed), float(weight or 1))
    except ValueError as error:
        raise ConfigError(
            f"data: {text!r}: {error}", remedy="write SOURCE or SOURCE@WEIGHT, with commas between"
        ) from error


def _source(name: str, data: Rows, cfg: ModelConfig, seed: int) -> Source:
    if name == WORLD:
        return WorldSource(
            WorldConfig(fps=data.fps),
            seed=seed,
            num_frames=sorted({1, max(1, data.max_frames // 2), data.max_frames}),
            branches=data.world_questions,
            at_end=cfg.attention is VisionAttention.ALL,
        )
    sampling = FrameRule(max_fps=data.fps, num_frames=data.max_frames)
    return VideoSource(Path(name), sampling, seed=seed, name=name)
