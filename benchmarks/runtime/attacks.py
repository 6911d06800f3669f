"""What one attacker does to another viewer: the time to the first word of its answers, in turns
with the attack and without it before and behind.

    python -m benchmarks.runtime.attacks                          # half an hour
    python -m benchmarks.runtime.attacks --only settings --seconds 4 --out small.json
    python -m benchmarks.runtime.attacks --only "60 scans" --turns 5 --out scans.json

Goals, for each kind of attack: 95 of 100 first words come within twice the time they take without
it, every frame of the viewer has one outcome, every question an answer, and the viewer stays
connected. The server's memory is told besides.

Server, viewer and attacker are processes of their own on the same machine. The attacker takes a
processor from the others: with fewer than three idle ones that is part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, progress, result_head, script_parser, write_result
from benchmarks.runtime.loads.attack_clients import KINDS
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE

GOAL_RATIO = 2.0
SETTLE_S = 1.0
"""After an attack, before its absence is measured."""
PATIENCE_S = 120.0
KEY = "correct-horse-battery-staple"
Turn = tuple[float, float]


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """Address and process of a server that wants a key."""
    (folder / "key.txt").write_text(KEY)
    program = Path(sys.executable).parent / "edge-vlm"
    command = [program, "serve", "--port", "0", "--bundle", DEMO_BUNDLE]
    command += ["--api-key-file", folder / "key.txt", "--threads", "1"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"//([\d.]+:\d+)/", server.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield found[1], server.pid
        finally:
            server.send_signal(signal.SIGTERM)


def _client(kind: str, address: str) -> subprocess.Popen[str]:
    module = "benchmarks.runtime.loads.attack_clients"
    command = [sys.executable, "-m", module, kind, address, KEY]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _memory_mb(pid: int) -> dict[str, float]:
    """Resident now and at most; nothing where /proc is not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = {name: re.search(rf"^{name}:\s+(\d+)", status, re.M) for name in ("VmRSS", "VmHWM")}
    return {name: round(int(value[1]) / 1024, 1) for name, value in found.items() if value}


def measure(kind: str, seconds: float, turns: int, folder: Path) -> dict[str, Any]:
    """One kind of attack, so many times, on a server of its own."""
    with served(folder) as (address, pid), _client("viewer", address) as viewer:
        assert viewer.stdout is not None
        first = viewer.stdout.readline()  # an answer has come: everything is warm
        if not first:
            raise RuntimeError("the viewer got no answer")
        lines = _read_on(viewer)
        alone, with_it = [], []
        for _ in range(turns):
            with _client(kind, address) as attacker:
                assert attacker.stdout is not None and attacker.stdin is not None
                if attacker.stdout.readline() != "ready\n":
                    raise RuntimeError(f"{kind}: the attacker failed")
                alone.append(_turn(seconds, lines))
                load, before = os.getloadavg()[0], _memory_mb(pid)
                attacker.stdin.write("go\n")
                attacker.stdin.flush()
                with_it.append(_turn(seconds, lines))
                attacker.communicate()
            after = _memory_mb(pid)
            time.sleep(SETTLE_S)
        alone.append(_turn(seconds, lines))
        assert viewer.stdin is not None
        viewer.stdin.close()
        viewer.wait(PATIENCE_S)
        _until(lambda: lines and "is_cut" in lines[-1])
    *answers, told = map(json.loads, lines)
    return row(answers, told, alone, with_it) | {
        "load_average": round(load, 2),
        "memory_mb": {"before": before, "after": after},
    }


def _read_on(viewer: subprocess.Popen[str]) -> list[str]:
    """The viewer's further lines, as they come."""
    lines: list[str] = []

    def read() -> None:
        assert viewer.stdout is not None
        while line := viewer.stdout.readline():
            lines.append(line)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _turn(seconds: float, lines: Sequence[str]) -> Turn:
    """So long, and on a busy machine until something that was asked in it is answered."""
    begin_s = time.monotonic()

    def has_its_answer() -> bool:
        newest = json.loads(lines[-1]) if lines else {}
        return "is_cut" in newest or newest.get("at_s", begin_s - 1) >= begin_s

    time.sleep(seconds)
    _until(has_its_answer)
    return begin_s, time.monotonic()


def _until(is_met: Callable[[], object]) -> None:
    """Not for ever."""
    until_s = time.monotonic() + PATIENCE_S
    while not is_met() and time.monotonic() < until_s:
        time.sleep(0.02)


def row(
    answers: Sequence[dict[str, float]],
    told: dict[str, Any],
    alone: Sequence[Turn],
    with_it: Sequence[Turn],
) -> dict[str, Any]:
    """What the viewer felt, and whether that is within the goals. `answers`: when each was asked
    for (`at_s`) and how long it took to begin (`ttft_s`); `told`: the viewer's last line."""

    def asked_in(*turns: Turn) -> list[float]:
        return sorted(
            each["ttft_s"] * 1e3
            for each in answers
            if any(begin <= each["at_s"] < end for begin, end in turns)
        )

    without, beside = asked_in(*alone), asked_in(*with_it)
    ratio = p95(beside) / p95(without) if without and beside else None
    return {
        "ttft_ms": {
            "without": spread(without),
            "with": spread(beside),
            "without_by_turn": [spread(asked_in(turn)) for turn in alone],
            "with_by_turn": [spread(asked_in(turn)) for turn in with_it],
        },
        "ratio": None if ratio is None else round(ratio, 2),
        "viewer": told,
        "goals": {
            "ttft": ratio is not None and ratio <= GOAL_RATIO,
            "one_outcome_each": told["lost"] == 0 and told["told_twice"] == 0,
            "all_answered": told["unanswered"] == 0,
            "stays": not told["is_cut"],
        },
    }


def p95(ascending: Sequence[float]) -> float:
    return ascending[min(len(ascending) - 1, int(0.95 * len(ascending)))]


def spread(ascending: Sequence[float]) -> dict[str, Any]:
    if not ascending:
        return {"number": 0}
    return {
        "number": len(ascending),
        "median": round(statistics.median(ascending), 1),
        "p95": round(p95(ascending), 1),
        "most": round(ascending[-1], 1),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'attack':40} {'p95 without':>12} {'with':>8} {'ratio':>6}  missed goals"]
    for kind, found in rows.items():
        without, beside = found["ttft_ms"]["without"], found["ttft_ms"]["with"]
        missed = ", ".join(name for name, is_met in found["goals"].items() if not is_met)
        lines.append(
            f"{kind:40} {without.get('p95', '-'):>12} {beside.get('p95', '-'):>8} "
            f"{found['ratio'] or '-':>6}  {missed}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "attacks.json")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=1, help="with each attack")
    parser.add_argument("--only", default="", help="kinds of attack with this in their name")
    args: argparse.Namespace = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if args.only in kind]
    if args.turns < 1:
        parser.error(f"argument --turns: expected at least 1, got {args.turns}")
    if not kinds:
        parser.error(f"no attack has {args.only!r} in its name; there are: {'; '.join(KINDS)}")
    result = result_head(__file__, argv, torch.device("cpu"))
    result["seconds_each_turn"], result["turns"] = args.seconds, args.turns
    rows: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        progress(kind)
        with tempfile.TemporaryDirectory() as folder:
            rows[kind] = measure(kind, args.seconds, args.turns, Path(folder))
        progress(table({kind: rows[kind]}).splitlines()[1])
    result["attacks"] = rows
    result["all_within_goals"] = all(all(found["goals"].values()) for found in rows.values())
    write_result(args.out, result)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
