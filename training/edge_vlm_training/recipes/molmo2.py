"""STTS fine-tuning (arXiv 2603.18004) of Molmo2, and of the demo model at small size.

The defaults of `stts` are the published ones.
"""

from __future__ import annotations

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm_training.config import msgspec
from edge_vlm_training.recipes.base import (
    Answers,
    Lora,
    Recipe,
    Rows,
    Similarity,
    Stage,
    Steps,
)
from edge_vlm_training.recipes.overrides import override

replace = msgspec.structs.replace


def stts(
    steps: int, data: Rows, train: dict[str, float] | None = None, warmup_steps: int = 200
) -> Stage:
    """Answers and similarity; a linear warm-up, then a cosine to a tenth of the peak rates."""
    return Stage(
        name="stts",
        length=Steps(steps),
        data=data,
        terms=(Answers(z_loss=1e-4), Similarity(0.5)),
        train=train or {"llm": 1e-5, "vit": 5e-6, "connector": 5e-6, "scorer": 1e-4},
        rate=(1.0, 0.1),
        cosine=True,
        warmup_steps=warmup_steps,
    )


def molmo2_4b_stts_50() -> Recipe:
    """Molmo2-4B with half of the cells kept, as published.

    6,250 updates of 64 packed rows of 9,686 tokens, two on each GPU at a time (sample command: one
    node of eight GPUs). `--init` names the folder of the captioner it starts from.
    """
    return Recipe(
        name="molmo2_4b_stts_50",
        model="molmo2_4b",
        stages=(stts(6250, Rows(batch=64, device_batch=2, sequence_length=9686)),),
        frame_markers=True,
        rescale=Rescale.ROW,
        attention=VisionAttention.ALL,
        residual_dropout=0.1,
        activation_checkpointing=True,
    )


def molmo2_4b_stts_30() -> Recipe:
    """As `molmo2_4b_stts_50` with 70 % of the cells kept: 30 % removed."""
    recipe = override(molmo2_4b_stts_50(), ["keep_ratio=0.7"])
    return replace(recipe, name="molmo2_4b_stts_30")


def molmo2_4b_stts_50_lora() -> Recipe:
    """`molmo2_4b_stts_50` on one card of 24 GB: the scorer, and adapters on frozen weights.

    20,000 rows of a clip each, with ten times the rates of whole matrices.
    """
    data = Rows(batch=16, device_batch=1, sequence_length=3584, row_frames=64)
    train = {"llm": 1e-4, "vit": 5e-5, "scorer": 1e-4}
    return replace(
        molmo2_4b_stts_50(),
        name="molmo2_4b_stts_50_lora",
        stages=(stts(1250, data, train, warmup_steps=50),),
        lora=Lora(),
    )


def molmo2_4b_stream() -> Recipe:
    """The published schedule for a live model: one checkpoint for every budget.

    Scores are stretched over a frame, past frames never change, and the share kept is drawn anew
    for each batch, because a model trained at one share breaks at others.
    """
    shares = "keep_ratio=1,0.7,0.5,0.5,0.35,0.2"
    recipe = override(molmo2_4b_stts_50(), [shares, "rescale=frame", "attention=frame"])
    return replace(recipe, name="molmo2_4b_stream")


def stts_demo_cpu() -> Recipe:
    """The demo model by steps on a CPU: its published schedule at small size, rendered clips."""
    data = Rows(
        batch=8,
        device_batch=4,
        sequence_length=480,
        max_frames=8,
        keep_ratio=(1.0, 0.7, 0.5, 0.5, 0.35),
    )
    train = {"llm": 6e-4, "vit": 1e-4, "connector": 1e-4, "scorer": 6e-4}
    return Recipe(
        name="stts_demo_cpu",
        stages=(stts(2000, data, train, warmup_steps=50),),
        rescale=Rescale.ABSOLUTE,
        device="cpu",
        save_every=200,
        sample_every=200,
    )


def stts_demo_lora() -> Recipe:
    """Adapters on the demo model (`--init`), on a CPU: a first try of LoRA."""
    train = {"llm": 2e-3, "vit": 5e-4, "scorer": 6e-4}
    recipe = override(stts_demo_cpu(), ["steps=500", "precision=float32"])
    (stage,) = recipe.stages
    return replace(
        recipe,
        name="stts_demo_lora",
        stages=(replace(stage, train=train),),
        lora=Lora(rank=8, alpha=16.0, base="float32"),
    )


def stts_demo_gpu() -> Recipe:
    """As `stts_demo_cpu` in batches for one GPU."""
    more = ["steps=20000", "batch=64", "device_batch=64", "device=cuda"]
    recipe = override(stts_demo_cpu(), [*more, "save_every=1000", "sample_every=1000"])
    return replace(recipe, name="stts_demo_gpu")


def stts_smoke() -> Recipe:
    """Six steps of a tiny batch, for tests and first tries."""
    fewer = ["steps=6", "batch=2", "device_batch=1", "max_frames=3", "sequence_length=240"]
    fewer += ["keep_ratio=0.5", "precision=float32", "warmup_steps=2"]
    often = ["log_every=1", "save_every=3", "sample_every=3"]
    return replace(override(stts_demo_cpu(), [*fewer, *often]), name="stts_smoke")
