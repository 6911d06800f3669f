"""What was told, what a queue kept, what arrived: is anything lost that was accepted?

An alert event is *told* when a viewer has it, *kept* when the server's queue file holds it, and has
*arrived* when a receiver has written it down (webhook) or the broker has acknowledged it (MQTT).
What is kept must arrive. What is told must arrive, too, but for a moment before the server was
killed: the file follows the event, and nothing waits for the disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOMENT_S = 2.0
"""Before a kill of the server, what was told within this may be lost with its memory."""


@dataclass(frozen=True)
class Told:
    """An alert event that a viewer has."""

    at: float
    """Time of day when it noted it: later than the kill if it still lay on the line."""
    generation: int
    """The start of the server that said it, from 1."""


@dataclass(kw_only=True)
class Account:
    """Of one receiver."""

    told: Mapping[str, Told]
    """By event."""
    kept: Collection[str]
    """Found in the queue's file after a kill of the server."""
    arrived: Counter[str]
    server_kills: Mapping[int, float]
    """By generation, the time of day; not of those that ended in order."""
    lost: dict[str, float] = field(init=False)
    """What was told and did not arrive: seconds from then to its server's kill."""

    def __post_init__(self) -> None:
        self.lost = {}
        for event, told in self.told.items():
            if not self.arrived[event]:
                kill = self.server_kills.get(told.generation, float("inf"))
                self.lost[event] = kill - told.at

    @property
    def kept_and_lost(self) -> list[str]:
        return sorted(event for event in self.kept if not self.arrived[event])

    @property
    def lost_without_excuse(self) -> list[str]:
        return sorted(event for event, age_s in self.lost.items() if age_s > MOMENT_S)

    def report(self) -> dict[str, Any]:
        moments = [age_s for age_s in self.lost.values() if age_s <= MOMENT_S]
        return {
            "told": len(self.told),
            "kept_over_a_kill": len(self.kept),
            "arrived": len(self.arrived),
            "arrived_more_than_once": sum(count > 1 for count in self.arrived.values()),
            "kept_and_lost": self.kept_and_lost,
            "lost_without_excuse": self.lost_without_excuse,
            "told_a_moment_before_a_kill_and_lost": len(moments),
            "of_these_read_behind_the_kill": sum(age_s < 0 for age_s in moments),
            "longest_such_moment_ms": round(1e3 * max(0.0, *moments, 0.0), 1),
        }


def differing(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Events that came with another key than their id, or twice with another body."""
    digests: dict[str, str] = {}
    wrong = {line["id"] for line in lines if line["key"] != line["id"]}
    for line in lines:
        if digests.setdefault(line["id"], line["digest"]) != line["digest"]:
            wrong.add(line["id"])
    return sorted(wrong)


def out_of_order(ids: Sequence[str]) -> list[str]:
    """Episodes whose end arrived before their begin."""
    seen: set[str] = set()
    wrong = []
    for event in ids:
        episode, _, kind = event.rpartition("/")
        if kind == "alert.cleared" and f"{episode}/alert.triggered" not in seen:
            wrong.append(episode)
        seen.add(event)
    return sorted(set(wrong))


def viewers_trouble(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a viewer's journal shows that must not be: of each session, an event twice or left out,
    a frame with two outcomes; in a session that was closed in order, a frame with none."""
    trouble = []
    newest: dict[str, int] = {}
    frames: dict[str, Counter[int]] = {}
    session = ""
    for line in lines:
        if "token" in line:
            session = line["session"]
            newest[session] = line["event"]
        elif "event" in line:
            session = line["session"]
            if line["event"] != newest[session] + 1:
                trouble.append(f"{session}: event {line['event']} behind {newest[session]}")
            newest[session] = line["event"]
            if "frame" in line:
                frames.setdefault(session, Counter())[line["frame"]] += 1
        elif line.get("over") == "closed":
            seen = frames.get(session, Counter())
            missing = sorted(set(range(1, max(seen, default=0) + 1)) - set(seen))
            if missing:
                trouble.append(f"{session}: frames {missing} without an outcome")
    for name, counts in frames.items():
        twice = sorted(frame for frame, count in counts.items() if count > 1)
        if twice:
            trouble.append(f"{name}: frames {twice} with two outcomes")
    return trouble


def bugs_in(log: str) -> list[str]:
    """What a log says of bugs: where each traceback ends and with what, and what is called one."""
    found, where, is_trace = [], "", False
    for line in log.splitlines():
        if line.startswith("Traceback"):
            is_trace, where = True, ""
        elif is_trace and line.startswith("  File "):
            where = line.strip()
        elif is_trace and line and not line.startswith(" "):
            found.append(f"{where}: {line}")
            is_trace = False
        elif "a bug" in line:
            found.append(line)
    return found + (["a traceback without an end"] if is_trace else [])
