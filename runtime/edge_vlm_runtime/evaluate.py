"""Accuracy as a user gets it: a question set streamed to a server and answered in words.

Each clip is one session. Its pictures go over the websocket as JPEG, a question is asked when the
frames up to its own have been processed, and the generated text is compared with the true answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_vlm.question_set import AskedQuestion, ClipQuestions
from edge_vlm_runtime.client import Client

_POINT = re.compile(r'coords="[\d.]+ \d+ (\d+) (\d+)"')


@dataclass
class Tally:
    """Right answers of one kind of question."""

    right: int = 0
    asked: int = 0

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval of the share."""
        if not self.asked:
            return (0.0, 1.0)
        z, n, p = 1.96, self.asked, self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half, middle + half)


@dataclass
class Result:
    """What one pass over a question set gave."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    cells_seen: int = 0
    cells_kept: int = 0
    ttft_s: list[float] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)

    @property
    def kept_share(self) -> float:
        return self.cells_kept / self.cells_seen if self.cells_seen else math.nan

    def mean(self, kinds: Iterable[str]) -> float:
        """Mean share over kinds, each weighted alike."""
        shares = [self.kinds[kind].share for kind in kinds if kind in self.kinds]
        return sum(shares) / len(shares) if shares else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {
            "kept_share": round(self.kept_share, 4),
            "kinds": {
                kind: {
                    "right": tally.right,
                    "asked": tally.asked,
                    "percent": round(100 * tally.share, 1),
                    "interval_95": [round(100 * end, 1) for end in tally.interval()],
                }
                for kind, tally in sorted(self.kinds.items())
            },
        }


def is_right(question: AskedQuestion, text: str) -> bool:
    """Exact match of the words; a pointed-at place counts if it lies inside the thing's box."""
    if question.box is None:
        return text.strip().lower() == question.answer.strip().lower()
    found = _POINT.search(text)
    if found is None:
        return False
    x, y, side = question.box
    px, py = (int(value) / 1000 for value in found.groups())
    return max(abs(px - x), abs(py - y)) <= side / 2


async def evaluate(
    url: str,
    clips: Iterable[ClipQuestions],
    settings: Mapping[str, Any],
    on_clip: Callable[[int], None] | None = None,
) -> Result:
    """Streams every clip in a session of its own and asks its questions.

    Raises what the client raises; a frame the server did not take is an error of the run, because
    the answers behind it would be about something else.
    """
    result = Result()
    for number, clip in enumerate(clips, start=1):
        async with await Client.connect(url, {"delivery": "wait", **settings}) as client:
            await _one_clip(client, clip, result)
        if on_clip is not None:
            on_clip(number)
    return result


async def _one_clip(client: Client, clip: ClipQuestions, result: Result) -> None:
    for i, (jpeg, time_s) in enumerate(zip(clip.jpegs, clip.times_s, strict=True)):
        await client.send_frame(jpeg, round(time_s * 1e6))
        await client.wait_processed()
        if client.dropped:
            reason = next(iter(client.dropped.values())).reason
            raise RuntimeError(f"clip {clip.name}: frame {i} was dropped ({reason})")
        for question in (q for q in clip.questions if q.frame == i):
            answer = await client.ask(question.text)
            tally = result.kinds.setdefault(question.kind, Tally())
            tally.asked += 1
            if is_right(question, answer.text):
                tally.right += 1
            else:
                result.wrong.append(
                    {
                        "clip": clip.name,
                        "question": question.text,
                        "answer": question.answer,
                        "said": answer.text,
                    }
                )
            if answer.ttft_s is not None:
                result.ttft_s.append(answer.ttft_s)
    for event in client.accepted.values():
        result.cells_seen += event.cells_seen
        result.cells_kept += event.cells_kept


def table(results: Mapping[str, Result], kinds: Iterable[str] | None = None) -> str:
    """One row a kind, one column a result, in percent with the 95 % interval."""
    names = list(results)
    rows = sorted({kind for result in results.values() for kind in result.kinds})
    lines = [f"{'':<12}" + "".join(f"{name:>26}" for name in names)]
    shares = "".join(f"{result.kept_share:>26.1%}" for result in results.values())
    lines.append(f"{'cells kept':<12}{shares}")
    for kind in rows:
        cells = []
        for result in results.values():
            tally = result.kinds.get(kind, Tally())
            low, high = tally.interval()
            cells.append(
                f"{tally.right}/{tally.asked} {tally.share:.1%} [{low:.0%}, {high:.0%}]".rjust(26)
            )
        lines.append(f"{kind:<12}" + "".join(cells))
    chosen = list(rows if kinds is None else kinds)
    means = "".join(f"{result.mean(chosen):>26.1%}" for result in results.values())
    lines.append(f"{'mean':<12}{means}   ({', '.join(chosen)})")
    return "\n".join(lines)
