"""The section `precision`: footage in, a plan for every product with weights out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edge_vlm.console.progress import Progress
from edge_vlm.errors import ConfigError, FrameDecodeError, VideoError
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
from edge_vlm_calibration.precision.language import plan_language
from edge_vlm_calibration.precision.states import watched
from edge_vlm_calibration.precision.vision import new_states, plan_vision, watched_products
from edge_vlm_calibration.precision.watching import QUESTIONS, Reading, pieces_of, read, run_of

KEEP_RATIO = 0.5
"""Share of cells kept while states are collected, unless the folder says what it was trained at."""
MOST_TOKENS = 16_384
"""That the language model is rounded by; more footage than that is for the vision side alone."""


def make(
    checkpoint: Path, clips: Sequence[Path], fps: float, max_frames: int, out: Path
) -> tuple[PrecisionSection, list[str]]:
    """The section, and notes for a person. Writes the arrays beside `out`, the calibration that is
    to be. At most `max_frames` of each clip are looked at; one that cannot be read is skipped.

    Raises as `open_folder`; ConfigError when fewer than half of the clips can be read; NonFinite.
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
    skipped: dict[str, str] = {}
    with watched(modules, states), Progress("calibrate: clips", len(clips)) as progress:
        for clip in clips:
            try:
                for piece in pieces_of(clip, fps, max_frames, questions):
                    frames += len(piece.rgbs)
                    reading = read(model, piece, run)
                    if tokens < MOST_TOKENS:
                        readings.append(reading)
                        tokens += len(reading.positions_S)
            except (VideoError, FrameDecodeError) as error:
                skipped[clip.name] = str(error)
            progress.advance(note=clip.name)
    if not readings or 2 * len(skipped) > len(clips):
        why = "".join(f"; {name}: {error}" for name, error in skipped.items())
        raise ConfigError(
            f"{len(clips) - len(skipped)} of {len(clips)} clips can be read{why}",
            remedy="name clips that play in a video player",
        )
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
    left_out = [f"{name} was left out: {error}" for name, error in skipped.items()]
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
