"""Is what a model said right? Decided by what the question asks for.

- **words** (every other kind): exactly the true answer or one of its other wordings; case, spaces
  at the ends and a full stop do not matter.
- **points** (a question with boxes): each point that `parse_points` reads, so each that would be
  drawn, is found if it lies inside a box that no other point took.
- **facts** (kind `caption`): the phrases of a caption, such as "red cat, blue dog", each counted
  once for each time it is true.

The last two have parts, so that an answer can be partly right: a verdict holds what was found, said
and true, and the F1 score 2 found / (said + true) over many verdicts is their share. For words all
three are one, and the share is that of right answers. Saying nothing where there is nothing to say
is right, too.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from edge_vlm.formats.qa_set import AskedQuestion, Box
from edge_vlm.text.points import parse_points

CAPTION = "caption"
_BETWEEN_FACTS = re.compile(r"[,;\n]|\.(?:\s|$)| and ")
_ARTICLE = re.compile(r"^(?:there (?:is|are) )?(?:an? |the )?")


@dataclass(frozen=True)
class Verdict:
    """Parts of an answer: found ones are both said and true."""

    found: int
    said: int
    true: int

    @property
    def right(self) -> bool:
        return self.found == self.said == self.true


def judge(question: AskedQuestion, text: str) -> Verdict:
    """What `text`, said to `question`, is worth."""
    answers = (question.answer, *question.also)
    if question.boxes is not None:
        return _judge_points(question.boxes, [(point.x, point.y) for point in parse_points(text)])
    if question.kind == CAPTION:
        verdicts = [_judge_facts(answer, text) for answer in answers]
        return max(verdicts, key=lambda verdict: verdict.found / (verdict.said + verdict.true))
    return Verdict(int(_plain(text) in map(_plain, answers)), 1, 1)


def facts_of(text: str) -> Counter[str]:
    """The phrases of a caption, without articles."""
    phrases = (_plain(part) for part in _BETWEEN_FACTS.split(text.lower()))
    return Counter(_ARTICLE.sub("", phrase) for phrase in phrases if phrase)


def _judge_points(boxes: tuple[Box, ...], points: list[tuple[float, float]]) -> Verdict:
    free = list(boxes)
    found = 0
    for x, y in points:
        hit = next((box for box in free if _inside(box, x, y)), None)
        if hit is not None:
            free.remove(hit)
            found += 1
    return _verdict(found, len(points), len(boxes))


def _inside(box: Box, x: float, y: float) -> bool:
    centre_x, centre_y, width, height = box
    return abs(x - centre_x) <= width / 2 and abs(y - centre_y) <= height / 2


def _judge_facts(answer: str, text: str) -> Verdict:
    true, said = facts_of(answer), facts_of(text)
    return _verdict((true & said).total(), said.total(), true.total())


def _verdict(found: int, said: int, true: int) -> Verdict:
    return Verdict(found, said, true) if said or true else Verdict(1, 1, 1)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
