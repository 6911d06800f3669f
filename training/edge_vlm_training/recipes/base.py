"""What a training run is: stages, each with its length, data, loss terms and learning rates.

Recipes are functions that return a `Recipe` (`demo`, `molmo2`); `catalog` knows them by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.model.lora.layers import TARGETS, Target
from edge_vlm.world.street_traffic import STEP_S
from edge_vlm_training.config import (
    Config,
    Grey,
    Kept,
    Number,
    Positive,
    PositiveFloat,
    Share,
    Weight,
    msgspec,
)

WORLD = "world"
"""The source of rendered clips."""
PARTS = ("llm", "vit", "connector", "scorer")
"""Parts of the model, by the first word of a weight's name."""
PROBES = "probes"
"""The linear read-outs that a stage's terms train beside the model; not part of a checkpoint."""

Form = Literal["prefix", "rows"]
"""How questions see their clip: as the past of each (faster on a CPU, one process), or all in one
packed row under a mask. Both give the same loss and gradients."""
Selection = Literal["clip", "published", "stream", "frame_topk", "random"]
"""How cells are chosen. `clip`: the best of the whole clip. `published`: the same, but with
`Rescale.ROW` the published computation to the letter. The others are policies of
`edge_vlm.pruning`."""


class Steps(Config, frozen=True, tag="steps"):
    """So many updates."""

    steps: Positive

    def progress(self, steps: int, seconds: float) -> float:
        """The share that is done."""
        return steps / self.steps

    def seconds_left(self, steps: int, seconds: float, a_step_s: float) -> float:
        return max(0.0, (self.steps - steps) * a_step_s)


class Minutes(Config, frozen=True, tag="minutes"):
    """So much wall-clock time, over all starts of a run: shared CPUs drift in speed."""

    minutes: PositiveFloat

    def progress(self, steps: int, seconds: float) -> float:
        """The share that is done; one step is made in any case."""
        return seconds / (60 * self.minutes) if steps else 0.0

    def seconds_left(self, steps: int, seconds: float, a_step_s: float) -> float:
        return max(0.0, 60 * self.minutes - seconds)


class Clips(Config, frozen=True, kw_only=True, tag="clips"):
    """Clips rendered for each step, all as long, with the truth that probes need.

    More is asked of the kinds of question that are still answered wrong.
    """

    batch: Positive
    num_frames: Positive = 1
    other_lengths: tuple[Positive, ...] = ()
    """Half of the steps take clips of one of these lengths instead, as many frames in all."""
    branches: Number = 12
    """Questions about each clip; 0: pictures alone."""
    keep_ratio: Annotated[tuple[Kept, ...], msgspec.Meta(min_length=1)] = (1.0,)
    """Share of cells kept, one of these drawn for each step."""
    selection: Annotated[tuple[Selection, ...], msgspec.Meta(min_length=1)] = ("clip", "stream")
    """How cells are chosen, drawn anew each step: the rule over the whole clip, which spends more
    where more happens, and the policy that a session can have."""
    min_cells: Number = 2
    """Up to this many cells of every later frame are kept whatever their rank."""
    reuse: Annotated[tuple[Grey, ...], msgspec.Meta(min_length=1)] = (0.0,)
    """Thresholds of change, one of these drawn for each clip with questions: the blocks in front of
    the scorer compute what changed by less no more than a session with that `reuse` does. 0:
    everything."""
    crowded: Share = 0.5
    """Share of clips that are as full as they can be: with one thing a clip, any event is its."""
    history_share: Share = 0.15
    """Share of questions that stand behind earlier turns of dialogue."""
    forgetful_share: Share = 0.0
    """Share of steps whose clips miss a stretch after the first frame, as a full memory does."""
    absent_share: Share = 0.0
    """Share of questions about what is not there, or not remembered; the true answer says so."""
    look_alike_share: Share = 0.0
    """Share of questions whether something is there that looks like what is there."""
    harder_share: Share = 0.0
    """Share of steps with clips of the harder world (`edge_vlm.world.harder`)."""
    stream_share: Share = 0.0
    """Share of steps whose clips are what a session holds of a street after up to half an hour."""
    stream_time_s: PositiveFloat = 60.0
    """Largest time stamp of those."""
    form: Form = "prefix"

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = max((self.num_frames, *self.other_lengths))
        fits = self.stream_share == 0 or (self.branches > 0 and longest > 1)
        self._check("stream_share", fits, "is of clips with questions and two frames or more")
        shortest = STEP_S * (longest + MOST_EVICTED)
        fits = self.stream_share == 0 or shortest <= self.stream_time_s <= LONGEST_STREAM_S
        rule = f"with stream_share it must be in {shortest:g}..{LONGEST_STREAM_S:g}"
        self._check("stream_time_s", fits, f"{rule}, half a second for each frame")

    @property
    def device_batch(self) -> int:
        """Rows that are computed at once."""
        return self.batch

    @property
    def row_shape(self) -> tuple[int, int]:
        """About how many tokens and frames a row has before the drop, the most of all steps."""
        frames = max(self.num_frames, *self.other_lengths, 1)
        return frames * CLIP_FRAME_TOKENS + 24 * self.branches, frames


CLIP_FRAME_TOKENS = 24
"""Of the demo model: its cells, stamp and markers."""
MOST_EVICTED = 4
"""Frames of a stream's clip between what was forgotten and what is remembered, as the scorer
compares with them."""
LONGEST_STREAM_S = 1800.0


class Rows(Config, frozen=True, kw_only=True, tag="rows"):
    """Clips of any length packed into rows; the same rows however many processes share them."""

    batch: Positive
    """Packed rows of an update, over all processes and over what they accumulate."""
    device_batch: Positive
    """Packed rows that a process computes at once; divides `batch` by the number of processes."""
    sequence_length: Positive
    """Most tokens of a packed row, after the drop."""
    sources: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = (WORLD,)
    """`world` (rendered clips) or the paths of JSONL files or folders of records, each with
    `@WEIGHT` after it if they are several in other than equal parts."""
    max_frames: Positive = 64
    """Of a clip."""
    row_frames: Positive = 128
    """Of a packed row."""
    fps: PositiveFloat = 2.0
    token_weight: PositiveFloat = 4.0
    """An answer of n tokens weighs this times sqrt(n); captions 0.1, points 0.2 a token."""
    world_questions: Positive = 8
    """About each rendered clip."""
    skip_bad: bool = False
    """Leave records out that cannot be read, instead of stopping."""
    decode_threads: Number = 0
    keep_ratio: Annotated[tuple[Kept, ...], msgspec.Meta(min_length=1)] = (0.5,)
    """Share of cells kept, one of these drawn for each batch."""
    min_cells: Number = 2
    """Cells that every later frame keeps in any case; not in `rescale = row` (published rule)."""
    reuse: Annotated[tuple[Grey, ...], msgspec.Meta(min_length=1)] = (0.0,)
    """As that of rendered clips; not in `rescale = row`."""
    form: Form = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.batch % self.device_batch == 0
        self._check("batch", fits, f"must be a multiple of device_batch = {self.device_batch}")

    @property
    def row_shape(self) -> tuple[int, int]:
        """Most tokens and frames of a row."""
        return self.sequence_length, self.row_frames


class Answers(Config, frozen=True, tag="answers"):
    """Cross-entropy of the answers' tokens; `z_loss` weighs the squared log-partition beside it."""

    weight: Weight = 1.0
    z_loss: Weight = 0.0


class Similarity(Config, frozen=True, tag="similarity"):
    """Scores follow how little a cell resembles the frame before (0.5 in the published code)."""

    weight: Weight = 0.5


class FeatureScale(Config, frozen=True, tag="feature_scale"):
    """Bounds the scale of the vision features."""

    weight: Weight = 0.1


class DenseProbe(Config, frozen=True, tag="dense"):
    """Each place names what covers it: kept cells by their features, or all patches of the ViT."""

    weight: Weight = 1.0
    on: Literal["features", "patches"] = "features"


class TimelineProbe(Config, frozen=True, tag="timeline"):
    """The language model's vision tokens tell motion and time of their thing."""

    weight: Weight = 0.1


class PresenceProbe(Config, frozen=True, tag="presence"):
    """What is there now, read from frame ends and bare places."""

    weight: Weight = 0.1


Term = Answers | Similarity | FeatureScale | DenseProbe | TimelineProbe | PresenceProbe
NEED_TRUTH = (DenseProbe, TimelineProbe, PresenceProbe)


class Stage(Config, frozen=True, kw_only=True):
    """One stretch of training; it begins with fresh moments and a warm-up."""

    name: str
    length: Steps | Minutes
    data: Clips | Rows
    terms: tuple[Term, ...]
    """The loss is their weighted sum."""
    train: dict[str, Weight]
    """Peak learning rate of each part that learns: one of `PARTS`, `probes`, or several as
    `llm+scorer`, whose gradients are then limited together. What is not named does not change."""
    rate: tuple[Weight, Weight] = (1.0, 1.0)
    """Factor on the learning rates at the start and at the end."""
    decay_from: Share | None = None
    """Share of the stage after which the factor begins to move; by default after the warm-up."""
    cosine: bool = False
    """The factor moves by half a cosine instead of linearly."""
    warmup_steps: Number = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        named = [part for group in self.train for part in group.split("+")]
        known = len(set(named)) == len(named) > 0 and set(named) <= {*PARTS, PROBES}
        self._check("train", known, f"names parts of {', '.join(PARTS)}, {PROBES}, each once")
        self._check("terms", len(self.terms) > 0, "needs one term or more")
        asked = isinstance(self.data, Rows) or self.data.branches > 0
        for term in self.terms:
            shown = asked or (isinstance(term, DenseProbe) and term.on == "patches")
            self._check("terms", shown, f"{type(term).__name__} needs data with questions")
            truth = isinstance(self.data, Clips) or not isinstance(term, NEED_TRUTH)
            self._check("terms", truth, f"{type(term).__name__} needs rendered clips as data")

    @property
    def parts(self) -> frozenset[str]:
        """Those that learn."""
        return frozenset(part for group in self.train for part in group.split("+"))

    def rate_at(self, step: int, progress: float) -> float:
        """Factor on the learning rates of the stage's update number `step` (from 0)."""
        start, end = self.rate
        begin = self.decay_from
        if begin is None:
            steps = isinstance(self.length, Steps) and self.length.steps
            begin = self.warmup_steps / steps if steps else 0.0
        moved = min(1.0, max(0.0, progress - begin) / max(1e-9, 1 - begin))
        if self.cosine:
            moved = (1 - math.cos(math.pi * moved)) / 2
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * (start + (end - start) * moved)


class Lora(Config, frozen=True, kw_only=True):
    """Low-rank adapters (arXiv 2106.09685) on weights that stay as they are."""

    rank: Positive = 16
    alpha: PositiveFloat = 32.0
    """What is added is scaled by alpha / rank."""
    targets: Annotated[tuple[Target, ...], msgspec.Meta(min_length=1)] = TARGETS
    """Which matrices of each block get an adapter, in the parts that a stage trains."""
    base: Literal["float32", "bfloat16", "nf4"] = "bfloat16"
    """What the weights of `init` are kept in. `nf4` packs the matrices of all blocks into four bits
    (bitsandbytes), the rest stays bfloat16."""


class Recipe(Config, frozen=True, kw_only=True):
    """Stages in order and what they share."""

    name: str
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1)]

    model: Literal["demo", "tiny", "molmo2_4b", "molmo2_8b", "molmo2_o_7b"] = "demo"
    init: Path | None = None
    """Checkpoint folder to start from, ours or a published one, or a run, whose probes then go on;
    without it weights are random."""
    tokenizer: Path | None = None
    """tokenizer.json; by default that of `init`, or for the demo model the rendered world's."""
    world_words: bool = False
    """The vocabulary is the rendered world's in any case; embeddings of words that `init` knows
    are taken over."""
    new_scorer: bool = False
    """The scorer of `init` is thrown away."""
    lora: Lora | None = None
    """Train adapters on `llm` and `vit` instead of their weights, and the scorer as it is."""
    frame_markers: bool = False
    """Frames stand between `<frame_start>` and `<frame_end>` instead of the image markers."""
    rescale: Rescale = Rescale.FRAME
    """`row` trains by the published computation to the letter where cells are chosen as published,
    with the similarity's gradient reaching the features; elsewhere that target is detached."""
    attention: VisionAttention = VisionAttention.FRAME

    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: PositiveFloat = 1e-6
    weight_decay: Weight = 0.0
    """Neither paper states one."""
    clip_norm: PositiveFloat = 1.0
    """Largest gradient norm, of each trained part (each key of `train`) and probe on its own."""
    residual_dropout: Share = 0.0

    precision: Literal["float32", "bfloat16", "bfloat16_weights"] = "bfloat16"
    """Of the products, by autocast; masters, moments and losses are float32. `bfloat16_weights`
    computes with bfloat16 copies of float32 masters: faster on a CPU, where autocast would cast
    each weight anew at each use."""
    activation_checkpointing: bool = False
    """Compute each block's inner activations anew in the backward pass instead of keeping them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    memory_gib: Weight = 0.0
    """Memory a process may use; 0: what the device has free at the start."""
    seed: int = 0

    log_every: Number = 10
    """Steps; a report is due after these or after `log_every_s`, whichever is set and comes."""
    log_every_s: Weight = 0.0
    save_every: Number = 500
    save_every_s: Weight = 0.0
    keep_last: Positive = 2
    """How many sharded checkpoints stay."""
    average_last: Positive = 1
    """The checkpoint that other commands read holds the mean weights of so many of the newest ones:
    where a falling rate would lead, or better. May be chosen when all is trained (`--resume`)."""
    whole_every: Number = 0
    """Steps between checkpoints that other commands read; 0: at the end only."""
    sample_every: Number = 500
    """Steps between samples of answers; 0: none."""
    sample_tokens: Positive = 16
    peak_tflops: Weight = 0.0
    """What MFU is measured against, per process; 0: known for the GPU, or measured at the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in self.stages:
            streams = isinstance(stage.data, Clips) and stage.data.stream_share > 0
            fits = not streams or self.attention is VisionAttention.FRAME
            self._check("attention", fits, "with stream_share it must be frame")
            published = isinstance(stage.data, Rows) or "published" in stage.data.selection
            fits = self.rescale is not Rescale.ROW or not published or not any(stage.data.reuse)
            self._check("rescale", fits, "reuse is no part of the published computation")
        kept = self.average_last <= self.keep_last
        self._check("average_last", kept, f"is more than keep_last = {self.keep_last}")
        if self.lora is None:
            return
        trained = frozenset[str]().union(*(stage.parts for stage in self.stages))
        whole = sorted(trained - {"llm", "vit", "scorer", PROBES})
        self._check("stages", not whole, f"with lora {', '.join(whole)} cannot be trained")
        self._check("world_words", not self.world_words, "with lora the vocabulary is the base's")
        kinds = ("bfloat16", "float32") if self.lora.base == "float32" else ("bfloat16",)
        rule = f"with lora.base = {self.lora.base} it is {' or '.join(kinds)}"
        self._check("precision", self.precision in kinds, rule)


OPERATIONAL = frozenset(
    {
        *("log_every", "log_every_s", "save_every", "save_every_s", "keep_last", "whole_every"),
        "average_last",
        *("sample_every", "sample_tokens", "memory_gib", "peak_tflops"),
        *("activation_checkpointing", "skip_bad", "decode_threads", "device_batch"),
    }
)
"""Fields that a resumed run may change: they do not change what it learns."""
