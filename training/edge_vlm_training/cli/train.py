"""`edge-vlm train` and `edge-vlm world`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm.console.paths import output_folder
from edge_vlm.console.progress import Progress, counted, told
from edge_vlm.console.usage import did_you_mean, thread_count
from edge_vlm.errors import ConfigError


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        default="demo_cpu",
        help="measured in minutes: demo_cpu (default), demo_larger, demo_present, demo_streams, "
        "smoke; in steps: stts_demo_cpu, stts_demo_gpu, stts_demo_lora, stts_smoke, "
        "molmo2_4b_stts_50, molmo2_4b_stts_30, molmo2_4b_stream, molmo2_4b_stts_50_lora "
        "(one card of 24 GB)",
    )
    parser.add_argument("-o", "--out", type=output_folder, required=True, help="folder of the run")
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from it, or from a run"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last state")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help="change a field of the recipe; may be given several times",
    )
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: all)")


def _train(args: argparse.Namespace) -> int:
    import torch

    from edge_vlm_training.recipes.catalog import RECIPES
    from edge_vlm_training.recipes.overrides import override
    from edge_vlm_training.trainer.distributed import join_ranks
    from edge_vlm_training.trainer.train import stored_recipe, train

    name = args.recipe
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}",
            remedy=f"choose one of {', '.join(RECIPES)}",
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = stored_recipe(args.out, name) if args.resume else RECIPES[name]()
    settings = [*args.settings, *([f"init={args.init}"] if args.init else [])]
    recipe = override(recipe, settings)
    with join_ranks(recipe.device) as ranks:
        checkpoint = train(recipe, args.out, ranks, resume=args.resume, watched=True)
        if ranks.leads:
            print(f"checkpoint: {checkpoint}")
    return 0


def _world_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=output_folder, required=True, help="folder to write")
    parser.add_argument("--per-kind", type=int, default=200, help="questions of every kind")
    parser.add_argument(
        "--kinds", metavar="NAMES", help="which kinds, with commas; also alert, absent"
    )
    parser.add_argument(
        "--per-clip", type=int, default=1, metavar="N", help="questions of a kind in one clip"
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="as `edge-vlm eval` does it: with alerts, denser"
    )
    parser.add_argument(
        "--harder", action="store_true", help="clips of the harder world (docs/demo-model.md)"
    )
    parser.add_argument("--seed", type=int, default=1, help="which held-out clips")
    parser.add_argument(
        "--demo-clip", action="store_true", help="write the demo's clip.mp4 and clip.json instead"
    )
    parser.add_argument(
        "--events",
        type=int,
        metavar="COUNT",
        help="write COUNT stretches of footage with event times for `eval-alerts` instead",
    )
    parser.add_argument(
        "--frames", type=int, default=48, help="pictures of each of these, two a second"
    )


def _world(args: argparse.Namespace) -> int:
    from edge_vlm.formats.qa_set import write_question_set
    from edge_vlm_training.world.heldout import heldout_clips, write_demo_clip

    if args.seed < 0:
        raise ConfigError("--seed must be 0 or more")
    if args.harder and (args.demo_clip or args.events is not None):
        raise ConfigError("--harder is of questions, not of --demo-clip or --events")
    if args.demo_clip:
        args.out.mkdir(parents=True, exist_ok=True)
        write_demo_clip(args.out, args.seed)
        print(f"demo clip: {args.out / 'clip.mp4'}")
        return 0
    if args.events is not None:
        from edge_vlm.formats.alert_set import write_event_set
        from edge_vlm_training.world.heldout_events import heldout_footage

        if args.events < 1 or not 2 <= args.frames <= 1000:
            raise ConfigError("--events must be positive and --frames in 2..1000")
        footage = heldout_footage(args.seed, args.events, args.frames)
        num_events = write_event_set(
            args.out, counted(footage, "world: stretches of footage", args.events)
        )
        print(f"{num_events} events in {args.events} stretches of footage: {args.out}")
        return 0
    kinds = _kinds(args)
    clips = heldout_clips(
        args.seed, args.per_kind, kinds=kinds, per_clip=_per_clip(args), is_harder=args.harder
    )
    with Progress("world: questions", len(kinds) * args.per_kind) as progress:
        written = told(clips, progress, size=lambda clip: len(clip.questions))
        asked = write_question_set(args.out, written)
    print(f"{asked} questions about held-out clips: {args.out}")
    return 0


def _kinds(args: argparse.Namespace) -> tuple[str, ...]:
    from edge_vlm.world.questions import QUESTION_KINDS
    from edge_vlm_training.world.heldout import ASKED_KINDS, BENCHMARK_KINDS

    if args.kinds is None:
        return BENCHMARK_KINDS if args.benchmark else QUESTION_KINDS
    names = tuple(dict.fromkeys(args.kinds.split(",")))
    if unknown := set(names) - set(ASKED_KINDS):
        raise ConfigError(
            f"unknown kinds of question: {', '.join(sorted(unknown))}",
            remedy=f"there are {', '.join(ASKED_KINDS)}",
        )
    return names


def _per_clip(args: argparse.Namespace) -> int:
    from edge_vlm_training.world.heldout import BENCHMARK_PER_CLIP

    if args.per_clip < 1 or args.per_kind < 1:
        raise ConfigError("--per-clip and --per-kind must be positive")
    return BENCHMARK_PER_CLIP if args.benchmark else args.per_clip


train = Command(
    add_arguments=_train_arguments,
    run=_train,
)
world = Command(
    add_arguments=_world_arguments,
    run=_world,
)
