"""The demo model from nothing, in stages on the rendered world (docs/demo-model.md)."""

from __future__ import annotations

from functools import partial

from edge_vlm.config import Rescale
from edge_vlm_training.config import msgspec
from edge_vlm_training.recipes.base import (
    Answers,
    Clips,
    DenseProbe,
    FeatureScale,
    Minutes,
    PresenceProbe,
    Recipe,
    Similarity,
    Stage,
    Steps,
    Term,
    TimelineProbe,
)

KEEP_MIXED = (1.0, 0.7, 0.5, 0.35, 0.2)
"""Share of cells kept, drawn anew each step: a model trained at one breaks at others."""
KEEP_FEWER = (1.0, 0.7, 0.5, 0.5, 0.35, 0.2, 0.2)
"""The same with more weight where answers are still wrong."""
KEEP_HALF = (1.0, 0.7, 0.5)

replace = msgspec.structs.replace


def demo_recipe(name: str, *stages: Stage, seed: int = 0) -> Recipe:
    """What the demo's recipes share: CPU, bfloat16 copies of the weights, saved by the clock."""
    return Recipe(
        name=name,
        stages=stages,
        seed=seed,
        world_words=True,
        rescale=Rescale.ABSOLUTE,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.05,
        precision="bfloat16_weights",
        device="cpu",
        log_every=0,
        log_every_s=20,
        save_every=0,
        save_every_s=120,
        sample_every=0,
    )


def pictures(name: str, length: Minutes | Steps, batch: int, lr: float = 1e-3) -> Stage:
    """Dense pre-training of the vision transformer alone, on single frames."""
    return Stage(
        name=name,
        length=length,
        data=Clips(batch=batch, branches=0, crowded=0.0),
        terms=(DenseProbe(1.0, on="patches"),),
        train={"vit": lr, "probes": 1e-3},
        rate=(1.0, 0.05),
        decay_from=0.6,
    )


def questions(
    name: str,
    length: Minutes | Steps,
    data: Clips,
    vision: float | None = 3e-4,
    connector: float = 3e-4,
    *,
    lr: float = 1e-3,
    timeline: float = 0.1,
    presence: float = 0.1,
    rate: tuple[float, float] = (1.0, 1.0),
    decay_from: float = 0.0,
) -> Stage:
    """Questions with all probes; without `vision` that side is frozen, scorer included."""
    terms: tuple[Term, ...] = (
        *(Answers(), TimelineProbe(timeline), PresenceProbe(presence), DenseProbe(1.0)),
    )
    train = {"llm": lr, "probes": lr}
    if vision is not None:
        terms = (*terms, Similarity(0.5), FeatureScale(0.1))
        train = {"llm+scorer": lr, "probes": lr, "vit": vision, "connector": connector}
    return Stage(
        name=name,
        length=length,
        data=data,
        terms=terms,
        train=train,
        rate=rate,
        decay_from=decay_from,
    )


def demo_cpu(minutes: float = 115.0) -> Recipe:
    """The demo model on two CPU cores with bf16 arithmetic: under two hours."""

    def part(number: float) -> Minutes:
        return Minutes(number * minutes / 115.0)

    single = Clips(batch=32, branches=8, forgetful_share=0.15)
    four = Clips(batch=24, num_frames=4, keep_ratio=KEEP_HALF, forgetful_share=0.15)
    eight = Clips(
        batch=8, num_frames=8, other_lengths=(1, 4), keep_ratio=KEEP_MIXED, forgetful_share=0.15
    )
    last = replace(eight, other_lengths=(), branches=16)
    return demo_recipe(
        "demo_cpu",
        pictures("dense", part(11), 128),
        questions("one-frame", part(15), single, vision=2e-4),
        questions("four-frames", part(6), four),
        questions("four-frames-frozen", part(6), four, vision=None),
        questions("eight-frames", part(33), eight, connector=3e-5, rate=(0.9, 0.9)),
        # Places are read more exactly from a vision side that has settled.
        questions("eight-frames-settling-1", part(6), eight, vision=1e-4, connector=1e-4),
        questions("eight-frames-settling-2", part(6), eight, vision=3e-5, connector=3e-5),
        questions(
            *("eight-frames-frozen", part(26), last),
            vision=None,
            rate=(0.8, 0.01),
            decay_from=0.2,
        ),
        questions(
            *("eight-frames-polish", part(6), last),
            vision=None,
            rate=(0.3, 0.01),
            decay_from=0.4,
        ),
    )


def demo_larger(minutes: float = 69.0) -> Recipe:
    """Takes a demo checkpoint of a smaller world (`--init`) to this one, sixteen frames long."""

    def part(number: float) -> Minutes:
        return Minutes(number * minutes / 69.0)

    data = Clips(
        batch=8,
        num_frames=16,
        other_lengths=(4, 8),
        branches=16,
        keep_ratio=KEEP_MIXED,
        forgetful_share=0.1,
        history_share=0.1,
    )
    single = Clips(batch=64, branches=6, history_share=0.1, forgetful_share=0.1)
    learn = partial(questions, lr=6e-4, timeline=0.25)
    return demo_recipe(
        "demo_larger",
        learn("new-kinds", part(5), single),
        learn("sixteen-frames", part(14), data, vision=1.5e-4, connector=1e-4),
        learn("settling", part(20), data, vision=4e-5, connector=4e-5),
        learn("frozen", part(30), data, vision=None, rate=(1.0, 0.01), decay_from=0.35),
        seed=4,
    )


def demo_present(minutes: float = 105.0) -> Recipe:
    """Goes on from `demo_larger` (`--init`): what is there now is read out, fewer are kept."""

    def part(number: float) -> Minutes:
        return Minutes(number * minutes / 105.0)

    data = Clips(
        batch=8,
        num_frames=16,
        other_lengths=(4, 8),
        branches=16,
        keep_ratio=KEEP_FEWER,
        forgetful_share=0.1,
    )
    learn = partial(questions, lr=6e-4)
    whole, late = 0.25, 0.4 * 0.25  # by then the probes' losses are several times the questions'
    return demo_recipe(
        "demo_present",
        learn(*("whole", part(65), data, 4e-5, 4e-5), timeline=whole, presence=whole),
        learn(
            *("frozen", part(40), data, None),
            timeline=late,
            presence=late,
            rate=(1.0, 0.01),
            decay_from=0.1,
        ),
        seed=5,
    )


def demo_streams(minutes: float = 105.0) -> Recipe:
    """Goes on from `demo_present` (`--init`): clips as a session has them after minutes, clips of
    the harder world, and frames of which only what changed was computed."""

    def part(number: float) -> Minutes:
        return Minutes(number * minutes / 105.0)

    data = Clips(
        batch=8,
        num_frames=16,
        other_lengths=(8, 32),
        branches=16,
        keep_ratio=KEEP_FEWER,
        stream_share=0.5,
        harder_share=0.5,
        absent_share=0.1,
        reuse=(0.0, 0.0, 4.0, 8.0),
    )
    learn = partial(questions, lr=6e-4, timeline=0.15, presence=0.15)
    settling = learn("settling", part(28), data, 4e-5, 4e-5)
    # A checkpoint has no read-outs: new ones would teach the rest nothing but noise at first.
    read_outs = replace(settling, name="read-outs", length=part(4), train={"probes": 1e-3})
    return demo_recipe(
        "demo_streams",
        read_outs,
        learn("whole", part(31), data, 1e-4, 1e-4),
        settling,
        learn("frozen", part(42), data, None, rate=(1.0, 0.01), decay_from=0.1),
        seed=6,
    )


def smoke() -> Recipe:
    """Seconds long: every kind of stage once, for tests and first tries."""
    length = Minutes(0.02)
    clips = Clips(batch=2, num_frames=3, branches=3, keep_ratio=(1.0, 0.5), forgetful_share=0.5)
    return demo_recipe(
        "smoke",
        pictures("dense", length, 4),
        questions("clips", length, clips),
        questions("frozen", length, replace(clips, keep_ratio=(0.5,)), vision=None),
    )
