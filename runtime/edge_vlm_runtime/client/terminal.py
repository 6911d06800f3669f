"""What a running stream prints, one line for each thing that happens; `live_table` has a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TextIO

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.answers import Answer
from edge_vlm_runtime.client.run import Observer, Outcome, PlannedQuestion
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered

MAX_POINTS = 12
KEPT, DROPPED = "█", "·"


def heat_row(kept_cells: Sequence[int], grid: int) -> str:
    """The kept cells of a frame in one line, rows separated by blanks: `██·· ·█·· ···· ····`."""
    kept = set(kept_cells)
    return " ".join(
        "".join(KEPT if row * grid + column in kept else DROPPED for column in range(grid))
        for row in range(grid)
    )


def heat_rows(kept_cells: Sequence[int], grid: int) -> list[str]:
    """The same as a picture, two characters a cell so that it is about square."""
    return [
        "".join(character * 2 for character in row) for row in heat_row(kept_cells, grid).split(" ")
    ]


def frame_line(event: protocol.FrameAccepted, grid: int) -> str:
    if event.gathered:
        return f"frame {event.frame_sequence:>3}  t={event.time_s:.1f} s  to be chosen from"
    line = (
        f"frame {event.frame_sequence:>3}  t={event.time_s:.1f} s  "
        f"kept {event.cells_kept:>{len(str(event.cells_seen))}}/{event.cells_seen}"
    )
    if event.share_recomputed < 1.0:
        line += f"  recomputed {event.share_recomputed:>4.0%}"
    return f"{line}  {heat_row(event.kept_cells, grid)}" if grid <= 5 else line


def alert_line(event: AlertTriggered | AlertCleared) -> str:
    if isinstance(event, AlertTriggered):
        return f"! {event.question}  begins at {event.time_s:.1f} s  [{event.probability:.2f}]"
    why = "" if event.reason == "probability" else f" ({event.reason})"
    return (
        f"! {event.question}  ends at {event.time_s:.1f} s, after {event.lasted_s:.1f} s{why}"
        f"  [{event.probability:.2f}]"
    )


def answer_line(result: Answer | EdgeVlmError) -> str:
    if isinstance(result, EdgeVlmError):
        return f"no answer: {result.code}: {result}"
    text = f"{result.shown_text or '(nothing)'}{answer_times(result)}{snapshot_text(result)}"
    shown, accepted = result.frames_shown, result.frames_accepted
    if shown and accepted is not None and shown < accepted:
        text += f"  [{shown} of {accepted} frames looked at]"
    return text + cut_text(result)


def cut_text(answer: Answer) -> str:
    """That there would be more to say, and how to have it; empty for a whole answer."""
    if answer.finish_reason != "length":
        return ""
    return f"  [cut at {answer.usage.output_tokens} tokens: raise --max-answer-tokens]"


def snapshot_text(answer: Answer) -> str:
    """What the model looked at, in a few words; empty unless that was a snapshot."""
    seen = answer.snapshot
    if seen is None:
        return ""
    return (
        f"  [frame {seen.frame_sequence}, {seen.width}x{seen.height}, in {seen.crops} "
        f"{'crop' if seen.crops == 1 else 'crops'}, {seen.tokens} tokens]"
    )


def point_lines(answer: Answer) -> list[str]:
    """Where the answer points, a line for each place."""
    lines = [point_line(point) for point in answer.points[:MAX_POINTS]]
    rest = len(answer.points) - len(lines)
    return [*lines, f"  ... and {rest} more"] if rest else lines


def point_line(point: protocol.PointedAt) -> str:
    frame = "no frame" if point.frame_sequence is None else f"frame {point.frame_sequence}"
    return (
        f"  {point.kind} {point.object_id} {point.label!r}  x {point.x:.3f}  y {point.y:.3f}  "
        f"t={point.time_s:.1f} s ({frame})"
    )


def answer_times(answer: Answer) -> str:
    times = "" if answer.ttft_s is None else f"  [TTFT {answer.ttft_s * 1e3:.0f} ms"
    if times and answer.tokens_per_s is not None:
        times += f", {answer.tokens_per_s:.0f} tokens/s"
    if not times:
        return ""
    return f"{times}, seen until {answer.newest_frame.time_s:.1f} s]"


def looked_at_text(answer: Answer, room: protocol.VideoRoom | None) -> str:
    """How many frames an answer rests on if some are missing, why, and what helps; empty if none
    are, or the video was not asked about."""
    shown, accepted = answer.frames_shown, answer.frames_accepted
    if not shown or accepted is None or shown >= accepted:
        return ""
    text = f"{shown} of {accepted} frames looked at"
    return text if room is None else f"{text}, {no_more_fit(room)}"


def no_more_fit(room: protocol.VideoRoom) -> str:
    """Why, and what helps."""
    limits = {"bundle": "the bundle", "positions": "the model's positions"}
    why = limits.get(room.limited_by, room.limited_by)
    return f"no more fit ({why}): {room.remedy}"


def dropped_text(outcome: Outcome) -> str:
    """What was dropped, to stand in brackets; empty if nothing was."""
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.dropped.items()))
    return f" (dropped: {counted})" if counted else ""


def summary_line(outcome: Outcome) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.dropped.items()))
    share = outcome.cells_kept / outcome.cells_seen if outcome.cells_seen else 0.0
    rate = outcome.frames_processed / outcome.elapsed_s if outcome.elapsed_s > 0 else 0.0
    jumps = f"; jumps of the clock: {outcome.clock_jumps}" if outcome.clock_jumps else ""
    return (
        f"{outcome.frames_sent} frames sent, {outcome.frames_processed} processed, "
        f"dropped: {dropped or 'none'}; {share:.0%} of the cells kept; "
        f"{outcome.answers} of {outcome.questions} questions answered; "
        f"{outcome.elapsed_s:.1f} s ({rate:.1f} frames/s){jumps}"
    )


class LineOutput(Observer):
    """One line for each thing that happens."""

    def __init__(self, grid: int, out: TextIO | None = None) -> None:
        self._grid = grid
        self._out = out or sys.stdout
        self._once_said: set[str] = set()

    def __enter__(self) -> LineOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.flush()

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _once(self, text: str) -> None:
        """What would otherwise be said with every frame."""
        if text not in self._once_said:
            self._once_said.add(text)
            self.line(text)

    def say(self, text: str) -> None:
        """What happens besides: a server or a camera that comes or goes."""
        self.line(f"* {text}")

    typing: Callable[[str], None] | None = None
    """Shows what is being typed, where the terminal does not."""

    def event(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self.line(frame_line(event, self._grid))
        elif isinstance(event, protocol.FrameDropped):
            why = "" if event.message is None else f": {event.message}"
            self.line(f"frame {event.frame_sequence:>3}  dropped ({event.reason}){why}")
        elif isinstance(event, protocol.ClipChosen):
            self.line(f"of the whole clip {event.cells_kept} of {event.cells_seen} cells are kept")
        elif isinstance(event, protocol.MemoryEvicted):
            self._once("the memory is full: from now on the oldest frames are forgotten")
        elif isinstance(event, protocol.MemoryRebased) and event.time_offset_s:
            self._once("the model's time range is full: it is moved along from now on")
        elif isinstance(event, (AlertTriggered, AlertCleared)):
            self.line(alert_line(event))
        elif isinstance(event, protocol.SessionGoAway):
            self.line("the server is stopping")

    def asked(self, question: PlannedQuestion, after_s: float) -> None:
        detail = "" if question.detail == "video" else f", {question.detail}"
        at_s = None if question.is_repeated else question.at_s
        if at_s is not None and at_s > after_s + 1e-6:
            detail += f", the end: {at_s:g} s never came"
        self.line(f"? {question.text}  [asked at {after_s:.1f} s{detail}]")

    def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        self.line(f"> {answer_line(result)}")
        for line in point_lines(result) if isinstance(result, Answer) else []:
            self.line(line)
