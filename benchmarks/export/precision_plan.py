"""What a plan of int8 vision saves over plain rounding, product by product, on real frames.

    python -m benchmarks.export.precision_plan --footage bikes.mp4

The demo model; then two vision blocks of Molmo2-4B's width with made-up weights, as they are and
with outliers put in: two features of the residual stream past what float16 can hold, as the
published model has them. Errors are shares of the variance of what a product computes in float32,
on states of the same footage that nothing was chosen by. Of language products:
`benchmarks.export.rounding`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.formats.calibrated.precision import ArraysWriter, ProductPlan
from edge_vlm.model.evaluator import TorchModel
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import molmo2_4b
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_calibration.precision.states import watched
from edge_vlm_calibration.precision.vision import new_states, plan_vision, watched_products
from edge_vlm_calibration.precision.watching import QUESTIONS, pieces_of, read, run_of
from edge_vlm_runtime.demo.paths import DEMO_FOLDER

LOUD = 70_000.0
"""Of two features of the vision's residual stream; float16 ends at 65,504."""
LOUD_LANGUAGE = 40.0
"""Of six channels' scales in the language model's norms; the others have 1."""


def full_width(words: Path, outliers: bool) -> VideoLM:
    """Two vision blocks and a language block of Molmo2-4B's widths, the demo's vocabulary."""
    cfg = molmo2_4b()
    tokens = Tokenizer.from_file(words)
    patch = PromptFormat(tokens).patch_id
    demo = open_folder(words.parent).config.language
    assert demo.base_vocab <= patch < demo.vocab
    cfg = replace(
        cfg,
        scorer=None,
        vision=replace(cfg.vision, num_layers=2, feature_layers=(1, 0)),
        language=replace(
            cfg.language, num_layers=1, base_vocab=demo.base_vocab, extra_vocab=demo.extra_vocab
        ),
    )
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).eval()
    if outliers:
        with torch.no_grad():
            model.vit.pos_embed[:, 100], model.vit.pos_embed[:, 700] = LOUD, -LOUD
            for block in model.vit.blocks:
                for norm in (block.get_submodule("norm1"), block.get_submodule("norm2")):
                    # Trained scales make what lies beside such features count again.
                    scale = norm.get_parameter("weight")
                    scale.fill_(3000.0)
                    scale[[100, 700]] = 1.0
            for block in model.llm.blocks:
                for norm in (block.get_submodule("attn_norm"), block.get_submodule("mlp_norm")):
                    norm.get_parameter("weight")[::427] = LOUD_LANGUAGE
    return model


@torch.inference_mode()
def planned(model: VideoLM, words: Path, footage: Sequence[Path], frames: int) -> dict[str, Any]:
    """Products by kind: mean errors as planned and as plainly rounded."""
    began = time.process_time()
    torch_model = TorchModel(model, PromptFormat(Tokenizer.from_file(words)))
    modules = watched_products(model)
    states, frames_seen = new_states(modules), 0
    with watched(modules, states):
        for path in footage:
            for piece in pieces_of(path, 2.0, frames, QUESTIONS):
                run = run_of(model.cfg, 0.5)
                read(torch_model, piece, run)
                frames_seen += len(piece.rgbs)
    residual = model.vit.pos_embed.abs().max()
    with tempfile.TemporaryDirectory() as scratch, ArraysWriter(Path(scratch) / "a.npz") as arrays:
        products = [*plan_vision(model, states, arrays)]
    return {
        "frames": frames_seen,
        "largest_position_embedding": round(float(residual), 1),
        "processor_s": round(time.process_time() - began, 1),
        "products": by_kind(products),
    }


def by_kind(products: Sequence[ProductPlan]) -> dict[str, Any]:
    kinds: dict[str, list[ProductPlan]] = {}
    for plan in products:
        if not plan.module.startswith("connector"):
            part, _, rest = plan.module.partition(".")
            kinds.setdefault(f"{part} {rest.rpartition('.')[2]}", []).append(plan)
    return {
        kind: {
            "planned_percent": _percent([plan.error for plan in plans]),
            "plainly_rounded_percent": _percent([plan.error_nearest for plan in plans]),
            "largest_input": float(f"{max(plan.max_abs for plan in plans):.4g}"),
            "typical_channel": float(f"{mean(plan.typical for plan in plans):.4g}"),
            "stay_float": sum(plan.weights == "base" for plan in plans),
            "of": len(plans),
        }
        for kind, plans in kinds.items()
    }


def _percent(shares: Sequence[float]) -> float:
    return float(f"{100 * mean(shares):.3g}")


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "precision_plan.json")
    parser.add_argument("--footage", type=Path, nargs="+", default=[DEMO_FOLDER / "clip.mp4"])
    parser.add_argument("--frames", type=int, default=16, help="of each footage")
    parser.add_argument("--threads", type=int, default=1)
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    demo = open_folder(CHECKPOINT)
    words = demo.require_tokenizer()
    result = {**result_head(__file__, argv, torch.device("cpu")), "frames": args.frames}
    cases: dict[str, Callable[[], VideoLM]] = {
        "demo": demo.load,
        "full width": lambda: full_width(words, outliers=False),
        "full width with outliers": lambda: full_width(words, outliers=True),
    }
    for name, make in cases.items():
        result[name] = planned(make(), words, args.footage, args.frames)
        for kind, found in result[name]["products"].items():
            progress(f"{name}: {kind} {found}")
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
