"""How many answers about the demo street are right, by kind of question, by how long the stream
has run, by how long ago what is asked about has happened, and by how the thing moves.

    python -m benchmarks.runtime.street              # 24 streets of five minutes; some minutes
    python -m benchmarks.runtime.street --streets 2 --times 10 60

Each street is one session with the server's own settings, over a real websocket. Its pictures are
those of `watch --source demo:SEED` and come as fast as they are processed; the times they carry are
the street's. Around each of the times questions of every kind are asked, and graded by what the
street knows of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, progress, result_head, script_parser, write_result
from edge_vlm.evaluation.grading import judge
from edge_vlm.evaluation.intervals import wilson
from edge_vlm.formats.qa_set import AskedQuestion
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.world.questions import (
    ABSENT,
    NOT_SEEN,
    QUESTION_KINDS,
    Question,
    ask,
    event_time,
)
from edge_vlm.world.scenes import Scenes
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.street import Street
from edge_vlm.world.street_traffic import STEP_S, Thing
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.server.app import Server

FPS = 1 / STEP_S
MOMENTS = (-4.0, -2.0, 0.0, 2.0)
"""Seconds around each time at which questions are asked."""
TRIES = 40
AGES_S = (2.0, 4.0, 8.0, 16.0, 64.0, float("inf"))
"""Upper ends of what is told apart."""
REMEMBERED = ("when", "order")
"""Kinds about what has happened: one question for each age."""
NAMED = (*REMEMBERED, "presence")
"""Kinds that may name something that is not there any more."""


@dataclass(frozen=True)
class Asked:
    question: AskedQuestion
    age_s: float | None
    """Since the thing that is asked about came, of an order the later one; None without one."""
    moves: str
    """Of what is asked about, until then: `stands`, `walks`, `stops` for what did both; `-`."""
    bounds: frozenset[str] = frozenset()
    """Of `when`: answers that are true and less than what is asked, "by 12.0 s" of what was there
    then: all that can be said once its coming is forgotten."""


def questions_at(street: Street, frame: int, rng: random.Random) -> Iterator[Asked]:
    """One question of each kind after a frame, of REMEMBERED kinds one for each age there is; of
    ABSENT ones some forms are about what has never come."""
    scenes = street.scenes(0.0, frame + 1, FPS)
    for kind in (*QUESTION_KINDS, ABSENT):
        told: set[float] = set()
        for _ in range(TRIES):
            question = ask(scenes, 0, kind, frame, rng)
            if question is None or not _is_clear(street, scenes, question):
                continue
            age_s = _age_s(scenes, question)
            if age_group(age_s) in told:
                continue
            told.add(age_group(age_s))
            moves, bounds = _moves(street, scenes, question), _bounds(scenes, question)
            yield Asked(_asked(scenes, question), age_s, moves, bounds)
            if kind not in REMEMBERED:
                break


def _is_clear(street: Street, scenes: Scenes, question: Question) -> bool:
    """Of who came twice it is not clear which time is meant; nor which way one goes that turned."""
    thing = question.meta["object"]
    if thing is None:
        return True
    kinds = scenes.kind[0].tolist()
    if question.kind in NAMED and kinds.count(kinds[thing]) > 1:
        return False
    if question.kind == "order" and any(
        kinds.count(kind) > 1 for kind in kinds if _names(question.text, kind)
    ):
        return False
    if question.kind != "direction":
        return True
    return _thing(street, scenes, thing).direction(question.frame) is not None


def _thing(street: Street, scenes: Scenes, index: int) -> Thing:
    entered_s = float(scenes.enter[0, index]) * STEP_S
    kind = int(scenes.kind[0, index])
    (found,) = (each for each in street.things(entered_s, entered_s) if each.kind == kind)
    return found


def _moves(street: Street, scenes: Scenes, question: Question) -> str:
    index = question.meta["object"]
    if index is None:
        return "-"
    thing = _thing(street, scenes, index)
    way = np.diff(thing.track[: question.frame - thing.enter + 1], axis=0)
    moving = set((way != 0).any(1).tolist())
    return "stops" if len(moving) == 2 else "walks" if moving == {True} else "stands"


def _names(text: str, kind: int) -> bool:
    return re.search(rf"\bthe {KINDS[kind]}\b", text) is not None


def _age_s(scenes: Scenes, question: Question) -> float | None:
    thing = question.meta["object"]
    if thing is None:
        return None
    enter = scenes.enter[0].tolist()
    came = enter[thing]
    if question.kind == "order":
        kinds = scenes.kind[0].tolist()
        came = max(enter[i] for i, kind in enumerate(kinds) if _names(question.text, kind))
    return float((question.frame - came) * STEP_S)


def _asked(scenes: Scenes, question: Question) -> AskedQuestion:
    """As the held-out questions of clips are graded."""
    boxes = None
    also: tuple[str, ...] = ()
    if question.kind == "when":  # right within one frame interval
        first = question.meta["first"]
        also = tuple(event_time(each * STEP_S) for each in (first - 1, first + 1) if each >= 0)
    if question.kind == "point":
        side = float(scenes.size[0, question.meta["object"]])
        boxes = ((float(question.meta["x"]), float(question.meta["y"]), side, side),)
    return AskedQuestion(
        kind=question.kind,
        text=question.text,
        answer=question.answer,
        frame=question.frame,
        also=also,
        boxes=boxes,
    )


def _bounds(scenes: Scenes, question: Question) -> frozenset[str]:
    if question.kind != "when":
        return frozenset()
    there = np.flatnonzero(scenes.visible[0, : question.frame + 1, question.meta["object"]])
    return frozenset(event_time(float(frame) * STEP_S, told=False) for frame in there)


def age_group(age_s: float | None) -> float:
    """The upper end of the group; -1: nothing that has an age is asked about."""
    return -1.0 if age_s is None else next(end for end in AGES_S if age_s <= end)


class Tally:
    """Right answers and all of them, by groups."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[Any, ...]] = Counter()
        self.right: Counter[tuple[Any, ...]] = Counter()
        self.bounded: Counter[tuple[Any, ...]] = Counter()
        self.unseen: Counter[tuple[Any, ...]] = Counter()
        self.wrong: list[dict[str, Any]] = []

    def note(self, seed: int, time_s: float, asked: Asked, answer: str) -> None:
        question = asked.question
        is_right = judge(question, answer).right
        is_bounded = answer in asked.bounds
        is_unseen = question.kind in REMEMBERED and answer == NOT_SEEN
        for group in (
            ("time", time_s, question.kind),
            ("age", age_group(asked.age_s), question.kind),
            ("moves", asked.moves, question.kind),
        ):
            self.asked[group] += 1
            self.right[group] += is_right
            self.bounded[group] += is_bounded
            self.unseen[group] += is_unseen
        if not (is_right or is_bounded or is_unseen):
            self.wrong.append(
                {
                    "seed": seed,
                    "at_s": question.frame * STEP_S,
                    "text": question.text,
                    "answer": answer,
                    "true": question.answer,
                    "age_s": asked.age_s,
                }
            )

    def table(self, by: str) -> dict[str, dict[str, Any]]:
        """Group to kind to counts and the 95 % interval of the share. Of REMEMBERED kinds also how
        many of the others were no answer, but told no time or order that is wrong: `bounded` ones
        and those that say that it was `not_seen`."""
        found: dict[str, dict[str, Any]] = {}
        for (name, group, kind), asked in self.asked.items():
            if name == by:
                right = self.right[name, group, kind]
                low, high = wilson(right / asked, asked)
                counts = {
                    "right": right,
                    "asked": asked,
                    "share": round(right / asked, 4),
                    "interval": [round(low, 4), round(high, 4)],
                }
                if kind in REMEMBERED:
                    counts["bounded"] = self.bounded[name, group, kind]
                    counts["not_seen"] = self.unseen[name, group, kind]
                found.setdefault(group if isinstance(group, str) else f"{group:g}", {})[kind] = (
                    counts
                )
        return {group: found[group] for group in sorted(found, key=_order)}


def _order(group: str) -> tuple[float, str]:
    try:
        return float(group), group
    except ValueError:
        return 0.0, group


async def watch(url: str, seed: int, times_s: Sequence[float], tally: Tally) -> None:
    """One street, one session."""
    street, rng = Street(seed), random.Random(seed)
    wanted = {round((time_s + moment) * FPS): time_s for time_s in times_s for moment in MOMENTS}
    async with await Client.connect(url, {"delivery": "wait"}) as client:
        for frame in range(max(wanted) + 1):
            time_s = frame / FPS
            await client.send_frame(encode_jpeg(street.picture(time_s)), round(time_s * 1e6))
            if frame not in wanted:
                continue
            await client.wait_processed()
            for asked in questions_at(street, frame, rng):
                answer = await client.ask(asked.question.text)
                tally.note(seed, wanted[frame], asked, answer.shown_text)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = script_parser(__doc__, RESULTS / "street.json")
    parser.add_argument("--streets", type=int, default=24)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--times", type=float, nargs="+", default=[10.0, 60.0, 300.0])
    parser.add_argument("--bundle", default=str(DEMO_BUNDLE))
    parser.add_argument("--wrong", action="store_true", help="print what was answered wrongly")
    args: argparse.Namespace = parser.parse_args(argv)
    tally = Tally()
    with Server.open(args.bundle, threads=1) as server:
        server.start()
        for seed in range(args.first_seed, args.first_seed + args.streets):
            progress(f"street {seed}")
            asyncio.run(watch(server.url, seed, args.times, tally))
    if args.wrong:
        for each in tally.wrong:
            print(each)
    record = {
        **result_head(__file__, argv, torch.device("cpu")),
        "bundle": args.bundle if args.bundle != str(DEMO_BUNDLE) else "demo",
        "streets": args.streets,
        "by_time_s": tally.table("time"),
        "by_age_s": tally.table("age"),
        "by_motion": tally.table("moves"),
    }
    write_result(args.out, record)
    return record


if __name__ == "__main__":
    main()
