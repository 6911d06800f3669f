"""The section `precision`: footage in, a plan for every product with weights out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edge_vlm.console.progress import Progress
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.calibrated.precision import (
    ARRAYS_SUFFIX,
    KEPT,
    ArraysWriter,
    PrecisionSection,
    ProductPlan,
)
from edge_vlm.model.evaluator import TorchModel
from edge_vlm.model.published.folder import ModelFolder, open_folder
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_calibration.footage import Looked
from edge_vlm_calibration.precision.language import plan_language
from edge_vlm_calibration.precision.states import watched
from edge_vlm_calibration.precision.vision import new_states, plan_vision, watched_products
from edge_vlm_calibration.precision.watching import QUESTIONS, Reading, pieces_of, read, run_of

KEEP_RATIO = 0.5
"""Share of cells kept while states are collected, unless the folder says what it was trained at."""
MOST_TOKENS = 16_384
"""That the language model is rounded by; more footage than that is for the vision side alone."""


def make(
    checkpoint: Path,
    clips: Sequence[Path],
    fps: float,
    max_frames: int,
    out: Path,
    looked: Looked | None = None,
) -> tuple[PrecisionSection, list[str]]:
    """The section, and notes for a person. Writes the arrays beside `out`, the calibration that is
    to be. At most `max_frames` of each clip are looked at; one of several that cannot be read is
    skipped, which `looked`, of these clips, knows afterwards.

    Raises as `open_folder` and `shots`; ConfigError when fewer than half of the clips can be
    read or nothing is to be seen; NonFinite.
    """
    folder = open_folder(checkpoint)
    model = TorchModel(folder.load(), _prompt(folder))
    path = out.with_name(f"{out.stem}{ARRAYS_SUFFIX}")
    card = folder.usage.card
    questions = card.questions if card is not None and card.questions else QUESTIONS
    run = run_of(model.config, float(folder.usage.defaults.get("keep_ratio", KEEP_RATIO)))
    modules = watched_products(model.model)
    states, readings = new_states(modules), list[Reading]()
    frames = tokens = 0
    looked = looked or Looked(clips)
    with watched(modules, states), Progress("calibrate: clips", len(clips)) as progress:
        for clip in clips:
            with looked.clip(clip):
                for piece in pieces_of(clip, fps, max_frames, questions):
                    for rgb in piece.rgbs:
                        looked.see(rgb)
                    frames += len(piece.rgbs)
                    reading = read(model, piece, run)
                    if tokens < MOST_TOKENS:
                        readings.append(reading)
                        tokens += len(reading.positions_S)
            progress.advance(note=clip.name)
    looked.require_enough()
    with ArraysWriter(path) as arrays:
        products = [*plan_vision(model.model, states, arrays)]
        products += plan_language(model.model.llm, readings, arrays)
    section = PrecisionSection(
        products=tuple(products),
        frames=frames,
        tokens=tokens,
        arrays=path.name,
        arrays_sha256=sha256_of_file(path),
    )
    left_out = [f"{path.name} was left out: {why}" for path, why in looked.skipped.items()]
    return section, [*left_out, *notes(section)]


def _prompt(folder: ModelFolder) -> PromptFormat:
    return PromptFormat(Tokenizer.from_file(folder.require_tokenizer()), folder.usage.style)


def notes(section: PrecisionSection) -> list[str]:
    """What was planned, what it loses, and every product that stays as it is."""
    lines = []
    for side, quantised in (("vit", "int8"), ("llm", "int4")):
        plans = [p for p in section.products if p.module.startswith(f"{side}.")]
        done = [plan for plan in plans if plan.weights == quantised]
        if done:
            worst = max(done, key=lambda plan: plan.error)
            lines.append(
                f"{side}: {len(done)} of {len(plans)} products as {quantised}, losing "
                f"{_mean(done, planned=True):.2%} on average (plainly rounded "
                f"{_mean(done, planned=False):.2%}), at most {worst.error:.2%} ({worst.module})"
            )
        lines += [f"{p.module}: {p.reason}" for p in plans if p.weights != quantised]
    wide = [p for p in section.products if p.outliers and p.weights != KEPT]
    if wide:
        most = max(wide, key=lambda plan: plan.max_abs / max(plan.typical, 1e-9))
        lines.append(
            f"channels far above the others in {len(wide)} inputs, most in {most.module}: "
            f"{most.max_abs:.4g}, typically {most.typical:.4g}"
        )
    return lines


def _mean(plans: Sequence[ProductPlan], *, planned: bool) -> float:
    errors = [plan.error if planned else plan.error_nearest for plan in plans]
    return float(torch.tensor(errors).mean())
