"""The part `transformers`: the same weights and pictures, read by its Molmo2 and by ours."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import CHECKPOINT, in_turn, progress, speed_up, summary
from benchmarks.peers.missing import NotInstalled
from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.model.checkpoint import read_config
from edge_vlm.model.published.mapping import shapes, to_published
from edge_vlm.model.published.names import TRANSFORMERS
from edge_vlm.pixels.frames import Frame, Rgb
from edge_vlm.pixels.patches import patch_indices_of_cells, to_pixel_values
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.pruning.policies import KeepAll, KeepPolicy
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.bench.workload import FixedCells, cells_at, synthetic_pictures
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.kv_arena import KVArena

FPS = 2.0
KEEP = 0.5
QUESTION = "is there a red ball ?"


def config(is_tiny: bool) -> ModelConfig:
    """The demo's words in tiny shapes, or in Molmo2's picture (81 cells) and an eighth of its
    blocks' numbers."""
    words = read_config(CHECKPOINT).language
    cfg = tiny(words.base_vocab, words.extra_vocab)
    if not is_tiny:
        full = molmo2_4b()
        vision = replace(
            full.vision,
            width=384,
            num_heads=6,
            head_dim=64,
            mlp_width=1536,
            num_layers=8,
            feature_layers=(7, 5),
        )
        language = replace(
            full.language,
            width=768,
            num_layers=6,
            num_heads=8,
            num_kv_heads=4,
            head_dim=96,
            mlp_width=2304,
            base_vocab=words.base_vocab,
            extra_vocab=words.extra_vocab,
        )
        connector = replace(full.connector, width=384, num_heads=6, head_dim=64, mlp_width=1536)
        cfg = replace(cfg, vision=vision, connector=connector, language=language)
    return replace(cfg, scorer=None, attention=VisionAttention.ALL)


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Raises NotInstalled."""
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalled("transformers is missing: pip install 'transformers>=5.20,<6'")
    import transformers

    from tests.model.peers import peer_config  # the configuration that parity is proven with

    cfg, most = config(args.tiny), max(args.frames)
    source = made_up_weights(cfg, 0, CHECKPOINT / "tokenizer.json", "peers")
    folder = scratch / f"peers-{'tiny' if args.tiny else 'small'}-{most}"
    if not folder.is_dir():
        export_source(source, folder, ExportOptions(frames=most, thorough=False))
    weights = {name: source.read(name) for name in shapes(cfg)}
    peer = transformers.Molmo2ForConditionalGeneration(peer_config(cfg)).eval()
    peer.load_state_dict(to_published(TRANSFORMERS, cfg, weights))
    side = cfg.vision.image_size
    pictures = synthetic_pictures(side, side, most)
    with LoadedBundle.open(folder, threads=args.threads) as engines:
        rows = [_measured(engines, peer, pictures[:count], args.rounds) for count in args.frames]
    return {
        "versions": {"transformers": transformers.__version__},
        "shape": f"{cfg.vision.num_cells} cells, vision {cfg.vision.width} x "
        f"{cfg.vision.num_layers}, language {cfg.language.width} x {cfg.language.num_layers}, fp32",
        "keep": KEEP,
        "rows": rows,
    }


def _measured(engines: LoadedBundle, peer: Any, pictures: list[Rgb], rounds: int) -> dict[str, Any]:
    vision, lm, prompt = engines.vision, engines.language, engines.prompt
    half = FixedCells(cells_at(KEEP, vision.num_cells))
    frames = [
        Frame(rgb=rgb, pts_ns=int(index * 1e9 / FPS), seq=index)
        for index, rgb in enumerate(pictures)
    ]
    question = prompt.question_ids(QUESTION)

    def add(arena: KVArena, policy: KeepPolicy, frame: Frame) -> None:
        tokens = vision.encode(frame, vision.new_state(), policy)
        ids = prompt.frame_ids(frame.pts_ns * 1e-9, len(tokens.cells), first=frame.seq == 0)
        blocks = np.where(prompt.vision_mask(ids), frame.seq, -1)
        lm.prefill(arena, lm.embed(ids, tokens.embeds), blocks)

    def arena_of(policy: KeepPolicy) -> KVArena:
        arena = lm.new_arena(len(frames) * (vision.num_cells + 16) + 256)
        lm.prefill(arena, lm.embed(prompt.bos_ids))
        for frame in frames:
            add(arena, policy, frame)
        return arena

    def ask(arena: KVArena) -> None:
        mark = arena.mark()
        lm.prefill(arena, lm.embed(question))
        arena.truncate(mark)

    def one_more(arena: KVArena, policy: KeepPolicy) -> None:
        mark = arena.mark()
        add(arena, policy, frames[-1])
        arena.truncate(mark)

    ids = np.concatenate(
        [
            prompt.bos_ids,
            *(
                prompt.frame_ids(f.pts_ns * 1e-9, vision.num_cells, first=f.seq == 0)
                for f in frames
            ),
            question,
        ]
    )
    inputs = _peer_inputs(engines, ids, pictures)

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        logits: torch.Tensor = peer(**inputs, logits_to_keep=1).logits[0, -1]
        return logits

    difference = _difference(engines, frames, ids, theirs().numpy())
    whole, pruned = arena_of(KeepAll()), arena_of(half)
    cases: dict[str, Callable[[], object]] = {
        "transformers, a question": theirs,
        "session, a question": partial(ask, whole),
        f"session at keep {KEEP:g}, a question": partial(ask, pruned),
        "session, a frame": partial(one_more, whole, KeepAll()),
        f"session at keep {KEEP:g}, a frame": partial(one_more, pruned, half),
    }
    seconds = in_turn(
        cases,
        rounds=rounds,
        warmups=1,
        device=torch.device("cpu"),
        say=lambda line: None,
        clock=time.process_time,
    )
    whole.close()
    pruned.close()
    theirs_s = seconds["transformers, a question"]
    row: dict[str, Any] = {
        "frames": len(frames),
        "prompt_tokens": len(ids),
        "largest_logit_difference": difference,
        "cases": {
            name: summary(found) | {"times_faster": round(speed_up(theirs_s, found), 2)}
            for name, found in seconds.items()
        },
    }
    shown = {name: f"{case['median_s'] * 1e3:.0f} ms" for name, case in row["cases"].items()}
    progress(f"{len(frames)} frames, logits within {difference:.1e}: {shown}")
    return row


def _difference(
    engines: LoadedBundle, frames: list[Frame], ids: np.ndarray, theirs: np.ndarray
) -> float:
    """Of the logits behind the question, when ours reads everything at once as it does: frames see
    each other. In a session they do not, and answers may differ."""
    vision, lm, prompt = engines.vision, engines.language, engines.prompt
    features = np.concatenate(
        [vision.encode(frame, vision.new_state(), KeepAll()).embeds for frame in frames]
    )
    arena = lm.new_arena(len(ids))
    blocks = np.where(prompt.vision_mask(ids), 0, -1)
    ours = lm.prefill(arena, lm.embed(ids, features), blocks)
    arena.close()
    return float(np.abs(np.asarray(ours).ravel()[: len(theirs)] - theirs[: ours.size]).max())


def _peer_inputs(
    engines: LoadedBundle, ids: np.ndarray, pictures: list[Rgb]
) -> dict[str, torch.Tensor]:
    """What transformers' processor would have made of it."""
    cfg = engines.bundle.config
    vision, start = cfg.vision, cfg.language.base_vocab
    tokens = torch.tensor(np.asarray(ids, np.int64))
    table = torch.from_numpy(patch_indices_of_cells(np.arange(vision.num_cells), vision))
    offsets = torch.arange(len(pictures))[:, None, None] * vision.num_patches
    pixels = np.stack([to_pixel_values(rgb, vision) for rgb in pictures])
    return {
        "input_ids": tokens[None],
        "attention_mask": torch.ones_like(tokens)[None],
        "pixel_values_videos": torch.from_numpy(pixels),
        "video_token_pooling": (table[None] + offsets).flatten(0, 1),
        "video_grids": torch.tensor([[len(pictures), vision.cell_grid, vision.cell_grid]]),
        "mm_token_type_ids": (tokens >= start).long()[None],
    }
