"""Recipes: functions that return everything a training run needs to know."""

from __future__ import annotations

import dataclasses

from edge_vlm.config import ModelConfig, Rescale, VisionAttention, demo
from edge_vlm_training.objective.step import CLIP

REMOVED_MIXED = (0.0, 0.3, 0.5, 0.65, 0.8)
"""Share of cells removed, drawn anew each step: a model trained at one breaks at others."""


REMOVED_HARDER = (0.0, 0.3, 0.5, 0.5, 0.65, 0.8, 0.8)
"""The same with more weight where answers are still wrong."""

SELECTIONS = (CLIP, "stream", "frame_topk", "random")
"""Ways to choose cells that need nothing but scores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training, measured in wall-clock time: shared CPUs drift in speed."""

    name: str
    minutes: float
    batch: int
    steps: int = 0
    """If positive, the stage is so many steps long instead: for runs that are compared."""
    num_frames: int = 1
    shorter: tuple[int, ...] = ()
    """Half of the steps take clips of one of these lengths instead, more at the same cost."""
    dense: bool = False
    """Dense pre-training of the ViT alone instead of questions."""
    branches: int = 12
    removed: tuple[float, ...] = (0.0,)
    lr: float = 1e-3
    lr_vision: float = 3e-4
    lr_connector: float = 3e-4
    freeze_vision: bool = False
    read_outs: float = 1.0
    """Factor on the weights of the language model's read-outs: their losses are several times the
    questions' own by the time that answers are mostly right."""
    rate: tuple[float, float] = (1.0, 1.0)
    """Factor on the learning rates at the start and at the end of the stage."""
    decay_from: float = 0.0
    """Share of the stage after which the factor begins to move (linearly)."""

    def __post_init__(self) -> None:
        for name in ("minutes", "batch", "num_frames", "branches"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Stage.{name} = {getattr(self, name)!r}: must be positive")
        for share in self.removed:
            if not 0 <= share < 1:
                raise ValueError(f"Stage.removed = {self.removed!r}: shares must lie in [0, 1)")

    def progress(self, seconds: float, steps: int) -> float:
        """The share of the stage that is done."""
        return steps / self.steps if self.steps else seconds / (self.minutes * 60)

    def rate_at(self, progress: float) -> float:
        """The factor after the share `progress` of the stage."""
        start, end = self.rate
        moved = max(0.0, progress - self.decay_from) / max(1e-9, 1 - self.decay_from)
        return start + (end - start) * min(1.0, moved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages in order and what they share."""

    name: str
    stages: tuple[Stage, ...]
    seed: int = 0
    aux_weight: float = 0.5
    """Weight of the temporal similarity loss (0.5 in the published code)."""
    dense_weight: float = 1.0
    """Weight of the dense read-out on the connector's features."""
    timeline_weight: float = 0.1
    """Weight of the read-out of motion and time on the language model's vision tokens."""
    present_weight: float = 0.1
    """Weight of the read-out of what is there now, on frame ends and bare places."""
    scale_weight: float = 0.1
    """Weight of the loss that bounds the scale of the vision features."""
    crowded: float = 0.5
    """Share of clips that are as full as they can be: with one thing a clip, any event is its."""
    selection: tuple[str, ...] = (CLIP, "stream")
    """How cells are chosen, drawn anew each step: the published rule over the whole clip, which
    spends more where more happens, and the policy that a session can have."""
    rescale: Rescale = Rescale.ABSOLUTE
    attention: VisionAttention = VisionAttention.FRAME
    new_scorer: bool = False
    """The scorer of the weights that training starts from is thrown away."""
    min_cells: int = 2
    """Up to this many cells of every later frame are kept whatever their rank."""
    history_share: float = 0.15
    """Share of questions that stand behind earlier turns of dialogue."""
    forgetful_share: float = 0.0
    """Share of steps whose clips miss a stretch behind the first frame, as a full memory does."""
    clip_norm: float = 1.0
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        if unknown := set(self.selection) - set(SELECTIONS):
            raise ValueError(f"Recipe.selection: no way to choose cells is called {unknown.pop()}")

    def model(self, base_vocab: int, extra_vocab: int) -> ModelConfig:
        """The demo model as this recipe wants it."""
        config = demo(base_vocab, extra_vocab)
        assert config.scorer is not None
        scorer = dataclasses.replace(config.scorer, rescale=self.rescale)
        return dataclasses.replace(config, scorer=scorer, attention=self.attention)


def demo_cpu(minutes: float = 115.0) -> Recipe:
    """The demo model on two CPU cores with bf16 arithmetic: under two hours."""
    unit = minutes / 115.0
    frozen = Stage(
        name="eight-frames-frozen",
        minutes=26 * unit,
        batch=8,
        num_frames=8,
        branches=16,
        removed=REMOVED_MIXED,
        freeze_vision=True,
        rate=(0.8, 0.01),
        decay_from=0.2,
    )
    return Recipe(
        name="demo_cpu",
        forgetful_share=0.15,
        stages=(
            Stage(
                name="dense",
                minutes=11 * unit,
                batch=128,
                dense=True,
                lr=1e-3,
                lr_vision=1e-3,
                rate=(1.0, 0.05),
                decay_from=0.6,
            ),
            Stage(name="one-frame", minutes=15 * unit, batch=32, branches=8, lr_vision=2e-4),
            Stage(
                name="four-frames",
                minutes=6 * unit,
                batch=24,
                num_frames=4,
                removed=(0.0, 0.3, 0.5),
            ),
            Stage(
                name="four-frames-frozen",
                minutes=6 * unit,
                batch=24,
                num_frames=4,
                removed=(0.0, 0.3, 0.5),
                freeze_vision=True,
            ),
            Stage(
                name="eight-frames",
                minutes=33 * unit,
                batch=8,
                num_frames=8,
                shorter=(1, 4),
                removed=REMOVED_MIXED,
                lr_connector=3e-5,
                rate=(0.9, 0.9),
            ),
            # Places are read more exactly from a vision side that has settled.
            *(
                Stage(
                    name=f"eight-frames-settling-{number}",
                    minutes=6 * unit,
                    batch=8,
                    num_frames=8,
                    shorter=(1, 4),
                    removed=REMOVED_MIXED,
                    lr_vision=rate,
                    lr_connector=rate,
                )
                for number, rate in enumerate((1e-4, 3e-5), start=1)
            ),
            frozen,
            dataclasses.replace(
                frozen,
                name="eight-frames-polish",
                minutes=6 * unit,
                rate=(0.3, 0.01),
                decay_from=0.4,
            ),
        ),
    )


def demo_larger(minutes: float = 69.0) -> Recipe:
    """Takes a demo checkpoint of a smaller world (`--init`) to this one, sixteen frames long."""
    unit = minutes / 69.0
    settling = Stage(
        name="settling",
        minutes=20 * unit,
        batch=8,
        num_frames=16,
        shorter=(4, 8),
        branches=16,
        removed=REMOVED_MIXED,
        lr=6e-4,
        lr_vision=4e-5,
        lr_connector=4e-5,
    )
    return Recipe(
        name="demo_larger",
        seed=4,
        forgetful_share=0.1,
        history_share=0.1,
        timeline_weight=0.25,
        stages=(
            Stage(name="new-kinds", minutes=5 * unit, batch=64, branches=6, lr=6e-4),
            dataclasses.replace(
                settling,
                name="sixteen-frames",
                minutes=14 * unit,
                lr_vision=1.5e-4,
                lr_connector=1e-4,
            ),
            settling,
            dataclasses.replace(
                settling,
                name="frozen",
                minutes=30 * unit,
                freeze_vision=True,
                rate=(1.0, 0.01),
                decay_from=0.35,
            ),
        ),
    )


def demo_present(minutes: float = 105.0) -> Recipe:
    """Goes on from `demo_larger` (`--init`): what is there now is read out, more is removed."""
    unit = minutes / 105.0
    whole = Stage(
        name="whole",
        minutes=65 * unit,
        batch=8,
        num_frames=16,
        shorter=(4, 8),
        branches=16,
        removed=REMOVED_HARDER,
        lr=6e-4,
        lr_vision=4e-5,
        lr_connector=4e-5,
    )
    return Recipe(
        name="demo_present",
        seed=5,
        forgetful_share=0.1,
        history_share=0.15,
        timeline_weight=0.25,
        present_weight=0.25,
        stages=(
            whole,
            dataclasses.replace(
                whole,
                name="frozen",
                minutes=40 * unit,
                freeze_vision=True,
                read_outs=0.4,
                rate=(1.0, 0.01),
                decay_from=0.1,
            ),
        ),
    )


def smoke() -> Recipe:
    """Seconds long: every stage kind once, for tests and first tries."""
    minutes = 0.02
    return Recipe(
        name="smoke",
        forgetful_share=0.5,
        stages=(
            Stage(name="dense", minutes=minutes, batch=4, dense=True),
            Stage(
                name="clips", minutes=minutes, batch=2, num_frames=3, branches=3, removed=(0.0, 0.5)
            ),
            Stage(
                name="frozen",
                minutes=minutes,
                batch=2,
                num_frames=3,
                branches=3,
                removed=(0.5,),
                freeze_vision=True,
            ),
        ),
    )


RECIPES = {recipe.__name__: recipe for recipe in (demo_cpu, demo_larger, demo_present, smoke)}
