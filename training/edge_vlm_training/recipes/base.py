"""Recipes measured in steps: everything a run needs to know, as functions returning a dataclass."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from edge_vlm.config import Rescale, VisionAttention

ModelName = Literal["demo", "tiny", "molmo2_4b", "molmo2_8b", "molmo2_o_7b"]
Precision = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]

WORLD = "world"
"""The source of rendered clips."""
PARTS = ("llm", "vit", "connector", "scorer")
"""Parts of the model with a learning rate of their own, by the first word of a weight's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """A run of `steps` updates; the defaults are those of STTS fine-tuning (arXiv 2603.18004)."""

    name: str
    steps: int
    batch: int
    """Packed rows of an update, over all processes and over what they accumulate."""
    device_batch: int
    """Packed rows that a process computes at once; divides `batch` by the number of processes."""
    sequence_length: int
    """Most tokens of a packed row, after the drop."""

    model: ModelName = "demo"
    init: Path | None = None
    """Checkpoint folder to start from, ours or a published one; without it weights are random."""
    tokenizer: Path | None = None
    """tokenizer.json; by default that of `init`, or for the demo model the rendered world's."""
    data: tuple[str, ...] = (WORLD,)
    """`world` (rendered clips) or the paths of JSONL files or folders of records, each with
    `@WEIGHT` behind it if they are several in other than equal parts."""
    max_frames: int = 64
    """Of a clip."""
    row_frames: int = 128
    """Of a packed row."""
    fps: float = 2.0
    token_weight: float = 4.0
    """An answer of n tokens weighs this times sqrt(n); captions 0.1, points 0.2 a token."""
    world_questions: int = 8
    """About each rendered clip."""
    skip_bad: bool = False
    """Leave records out that cannot be read, instead of stopping."""
    decode_threads: int = 0
    frame_markers: bool = False
    """Frames stand between `<frame_start>` and `<frame_end>` instead of the image markers."""

    removed: tuple[float, ...] = (0.5,)
    """Share of cells removed, one of these drawn for each batch."""
    min_cells: int = 2
    """Cells that every later frame keeps in any case; not in `rescale = row` (published rule)."""
    rescale: Rescale = Rescale.FRAME
    """`row` trains by the published computation to the letter, with the similarity's gradient
    reaching the features; the others by ours, with that target detached."""
    attention: VisionAttention = VisionAttention.FRAME

    lr_llm: float = 1e-5
    lr_vit: float = 5e-6
    lr_connector: float = 5e-6
    lr_scorer: float = 1e-4
    warmup_steps: int = 200
    final_rate: float = 0.1
    """Share of the peak learning rates at which the cosine ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    """Neither paper states one."""
    clip_norm: float = 1.0
    """Largest gradient norm, of each part on its own."""
    z_loss: float = 1e-4
    aux_weight: float = 0.5
    """Weight of the temporal similarity loss (0.5 in the published code)."""
    residual_dropout: float = 0.0

    precision: Precision = "bfloat16"
    """Of the products; weights, moments and the losses are float32."""
    activation_checkpointing: bool = False
    """Compute each block's inner activations anew in the backward pass instead of keeping them."""
    device: Device = "auto"
    memory_gib: float = 0.0
    """Memory a process may use; 0: what the device has free at the start."""
    seed: int = 0

    log_every: int = 10
    save_every: int = 500
    keep_last: int = 2
    """How many sharded checkpoints stay."""
    whole_every: int = 0
    """Steps between checkpoints that other commands read; 0: at the end only."""
    sample_every: int = 500
    """Steps between samples of answers; 0: none."""
    sample_tokens: int = 16
    peak_tflops: float = 0.0
    """What MFU is measured against, per process; 0: known for the GPU, or measured at the start."""

    def __post_init__(self) -> None:
        for field, kind in (("rescale", Rescale), ("attention", VisionAttention)):
            object.__setattr__(self, field, kind(getattr(self, field)))
        for field in ("init", "tokenizer"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else Path(value))
        for field in ("removed", "betas", "data"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in (
            *("steps", "batch", "device_batch", "sequence_length", "max_frames", "fps", "eps"),
            *(
                "clip_norm",
                "token_weight",
                "world_questions",
                "row_frames",
                "log_every",
                "save_every",
                "keep_last",
                "sample_tokens",
            ),
        ):
            self._check(field, getattr(self, field) > 0, "must be positive")
        for field in (
            *("warmup_steps", "lr_llm", "lr_vit", "lr_connector", "lr_scorer", "weight_decay"),
            *(
                "z_loss",
                "aux_weight",
                "sample_every",
                "whole_every",
                "min_cells",
                "memory_gib",
                "peak_tflops",
            ),
            "decode_threads",
        ):
            self._check(field, getattr(self, field) >= 0, "must not be negative")
        for field in ("final_rate", "residual_dropout"):
            self._check(field, 0 <= getattr(self, field) < 1, "must lie in [0, 1)")
        shares = self.removed
        self._check("removed", len(shares) > 0, "needs one share or more")
        self._check("removed", all(0 <= s < 1 for s in shares), "shares must lie in [0, 1)")
        self._check("betas", len(self.betas) == 2, "needs two numbers")
        self._check("betas", all(0 <= b < 1 for b in self.betas), "must lie in [0, 1)")
        fits = self.batch % self.device_batch == 0
        self._check("batch", fits, f"must be a multiple of device_batch = {self.device_batch}")

    def _check(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{field} = {getattr(self, field)!r}: {rule}")

    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each part."""
        return {part: getattr(self, f"lr_{part}") for part in PARTS}

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at `step` (from 0): linear warm-up, cosine to the end."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self.final_rate + (1 - self.final_rate) * cosine

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; `StepRecipe(**data)` is the inverse."""
        data = dataclasses.asdict(self)
        for key, value in data.items():
            if isinstance(value, Path):
                data[key] = str(value)
            elif isinstance(value, (Rescale, VisionAttention)):
                data[key] = value.value
            elif isinstance(value, tuple):
                data[key] = list(value)
        return data


OPERATIONAL = frozenset(
    {
        *("log_every", "save_every", "keep_last", "sample_every", "sample_tokens", "whole_every"),
        *("memory_gib", "peak_tflops", "activation_checkpointing"),
        *("skip_bad", "decode_threads", "device_batch"),
    }
)
"""Fields that a resumed run may change: they do not change what it learns."""


def molmo2_4b_stts_50() -> StepRecipe:
    """Molmo2-4B with half of the cells removed, as published.

    6,250 updates of 64 packed rows of 9,686 tokens, two on each GPU at a time (sample command: one
    node of eight GPUs). `--init` names the folder of the captioner it starts from.
    """
    return StepRecipe(
        name="molmo2_4b_stts_50",
        model="molmo2_4b",
        steps=6250,
        batch=64,
        device_batch=2,
        sequence_length=9686,
        frame_markers=True,
        removed=(0.5,),
        rescale=Rescale.ROW,
        attention=VisionAttention.ALL,
        residual_dropout=0.1,
        activation_checkpointing=True,
    )


def molmo2_4b_stts_30() -> StepRecipe:
    """As `molmo2_4b_stts_50` with 30 % of the cells removed."""
    return dataclasses.replace(molmo2_4b_stts_50(), name="molmo2_4b_stts_30", removed=(0.3,))


def molmo2_4b_stream() -> StepRecipe:
    """The published schedule for a live model: one checkpoint for every budget.

    Scores are stretched over a frame, past frames never change, and the share removed is drawn
    anew for each batch, because a model trained at one share breaks at others.
    """
    return dataclasses.replace(
        molmo2_4b_stts_50(),
        name="molmo2_4b_stream",
        removed=(0.0, 0.3, 0.5, 0.5, 0.65, 0.8),
        rescale=Rescale.FRAME,
        attention=VisionAttention.FRAME,
    )


def stts_demo_cpu() -> StepRecipe:
    """The demo model by steps on a CPU: its published schedule at small size, rendered clips."""
    return StepRecipe(
        name="stts_demo_cpu",
        steps=2000,
        batch=8,
        device_batch=4,
        sequence_length=480,
        max_frames=8,
        removed=(0.0, 0.3, 0.5, 0.5, 0.65),
        rescale=Rescale.ABSOLUTE,
        lr_llm=6e-4,
        lr_vit=1e-4,
        lr_connector=1e-4,
        lr_scorer=6e-4,
        warmup_steps=50,
        device="cpu",
        save_every=200,
        sample_every=200,
    )


def stts_demo_gpu() -> StepRecipe:
    """As `stts_demo_cpu` in batches for one GPU."""
    return dataclasses.replace(
        stts_demo_cpu(),
        name="stts_demo_gpu",
        steps=20_000,
        batch=64,
        device_batch=64,
        device="cuda",
        save_every=1000,
        sample_every=1000,
    )


def stts_smoke() -> StepRecipe:
    """Six steps of a tiny batch, for tests and first tries."""
    return dataclasses.replace(
        stts_demo_cpu(),
        name="stts_smoke",
        steps=6,
        batch=2,
        device_batch=1,
        max_frames=3,
        sequence_length=240,
        removed=(0.5,),
        precision="float32",
        warmup_steps=2,
        log_every=1,
        save_every=3,
        sample_every=3,
    )


STEP_RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        *(stts_demo_cpu, stts_demo_gpu, stts_smoke),
        *(molmo2_4b_stts_50, molmo2_4b_stts_30, molmo2_4b_stream),
    )
}
