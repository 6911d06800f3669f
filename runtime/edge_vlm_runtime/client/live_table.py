"""A running stream as a table that is drawn again and again. Rich is imported only here."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType

from edge_vlm.console.output import obeyed, visible_lines
from edge_vlm.errors import EdgeVlmError, MissingExtraError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.answers import Answer
from edge_vlm_runtime.client.run import PlannedQuestion
from edge_vlm_runtime.client.terminal import (
    LineOutput,
    alert_line,
    answer_line,
    heat_rows,
    point_lines,
)
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.sources.container import Picture

try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise MissingExtraError.for_library("rich", "client") from error

MAX_ANSWERS = 8
MAX_ALERTS = 8
DRAW_EVERY_S = 0.125
HISTORY = 12
"""Frames over which rates are averaged."""
NOTHING = "-"


class LiveGauges:
    """Counts what is sent and what the server says."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._sent_s: deque[float] = deque(maxlen=HISTORY)
        self._accepted: deque[protocol.FrameAccepted] = deque(maxlen=HISTORY)
        self._accepted_s = 0.0
        self._num_sent = 0
        self._source_age_s = 0.0
        """Of the last picture when it was sent."""
        self._num_accepted = 0
        self._dropped: Counter[str] = Counter()
        self._stats: protocol.SessionStats | None = None
        self._done: protocol.ResponseDone | None = None

    def sent(self, age_s: float = 0.0) -> None:
        """A picture was sent, which the camera saw `age_s` before."""
        self._num_sent += 1
        self._source_age_s = age_s
        self._sent_s.append(self._clock_s())

    def event(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self._num_accepted += 1
            self._accepted.append(event)
            self._accepted_s = self._clock_s()
        elif isinstance(event, protocol.FrameDropped):
            self._dropped[event.reason] += 1
        elif isinstance(event, protocol.SessionStats):
            self._stats = event
        elif isinstance(event, protocol.ResponseDone) and event.ttft_s is not None:
            self._done = event

    @property
    def newest(self) -> protocol.FrameAccepted | None:
        """The last frame that was processed."""
        return self._accepted[-1] if self._accepted else None

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each, in the order of a frame's way."""
        stats = self._stats
        memory_bytes = None if stats is None else stats.memory_bytes
        watts = None if stats is None else stats.power_watts
        return [
            ("fps in", f"{self._rate():.1f}"),
            ("processed", self._processed(stats)),
            ("dropped", _counted(self._dropped) or "none"),
            ("cells kept", self._kept()),
            ("recomputed", self._recomputed()),
            ("frame age", self._age()),
            ("TTFT", self._of_answer(lambda done: f"{(done.ttft_s or 0.0) * 1e3:.0f} ms")),
            ("tokens/s", self._of_answer(_speed)),
            ("KV", self._cache(stats)),
            ("memory", _gauge(memory_bytes, lambda value: f"{value / 2**20:.0f} MiB")),
            ("power", _gauge(watts, lambda value: f"{value:.1f} W")),
        ]

    def _rate(self) -> float:
        """Pictures a second that the source gives now; it falls when no more come."""
        if len(self._sent_s) < 2:
            return 0.0
        gap_s = (self._sent_s[-1] - self._sent_s[0]) / (len(self._sent_s) - 1)
        silent_s = self._clock_s() - self._sent_s[-1]
        slowest_s = max(gap_s, silent_s - gap_s)
        return 1.0 / slowest_s if slowest_s > 0 else 0.0

    def _processed(self, stats: protocol.SessionStats | None) -> str:
        counted = f"{self._num_accepted} of {self._num_sent}"
        return counted if stats is None else f"{counted}, {stats.fps_processed:.1f} a second"

    def _kept(self) -> str:
        seen = sum(event.cells_seen for event in self._accepted)
        kept = sum(event.cells_kept for event in self._accepted)
        return f"{kept / seen:.0%} of the last {len(self._accepted)}" if seen else NOTHING

    def _recomputed(self) -> str:
        """Cells that the blocks in front of the scorer were computed for."""
        shares = [event.share_recomputed for event in self._accepted]
        return f"{sum(shares) / len(shares):.0%} of the cells" if shares else NOTHING

    def _age(self) -> str:
        """Of what the model knows: since the camera saw the newest frame, as long as there is no
        newer one."""
        if not self._accepted:
            return NOTHING
        age_s = self._accepted[-1].age_ms * 1e-3 + self._clock_s() - self._accepted_s
        age_s += self._source_age_s
        return f"{age_s * 1e3:.0f} ms" if age_s < 1.0 else f"{age_s:.1f} s"

    def _of_answer(self, show: Callable[[protocol.ResponseDone], str]) -> str:
        return NOTHING if self._done is None else show(self._done)

    def _cache(self, stats: protocol.SessionStats | None) -> str:
        if stats is not None:
            frames = f", {stats.frames_in_memory} frames"
            return f"{stats.kv_tokens} / {stats.kv_capacity_tokens} tokens{frames}"
        newest = self.newest
        return NOTHING if newest is None else f"{newest.kv_tokens} tokens"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _speed(done: protocol.ResponseDone) -> str:
    return NOTHING if done.tokens_per_s is None else f"{done.tokens_per_s:.0f}"


def _gauge(value: float | None, show: Callable[[float], str]) -> str:
    return NOTHING if value is None else show(value)


def _text(text: str, style: str = "") -> Text:
    """Of somebody else."""
    return Text(visible_lines(text), style=style)


class LiveTable(LineOutput):
    """A table that is redrawn: rates, drops, the heat map of the last frame, the answers."""

    def __init__(self, grid: int, title: str) -> None:
        super().__init__(grid)
        self._title = title
        self._gauges = LiveGauges()
        self._answers: dict[PlannedQuestion, str] = {}
        self._alerts: list[str] = []
        self._said = ""
        self._typed = ""
        self.typing = self.show_typed
        self.takes_questions = False
        """A line at the foot says that one may type."""
        self.is_subscriber = False
        """Somebody else sends the pictures: they are counted by their outcomes."""
        self._drawn_s = 0.0
        # Drawn by us, not by a thread of rich: an output that is gone is noticed here.
        self._live = Live(
            # One that has gone is no terminal any more, and rich would draw nothing from then on.
            console=Console(file=obeyed(sys.stdout), force_terminal=sys.stdout.isatty() or None),
            auto_refresh=False,
            get_renderable=self._render,
        )

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _draw(self) -> None:
        """Something has changed. The server's `session.stats` come every second at least."""
        now_s = time.monotonic()
        if self._live.is_started and now_s - self._drawn_s >= DRAW_EVERY_S:
            self._drawn_s = now_s
            self._live.refresh()

    def sent(self, sequence: int, picture: Picture) -> None:
        self._gauges.sent(picture.age_s)

    def event(self, event: protocol.ServerEvent) -> None:
        outcomes = (protocol.FrameAccepted, protocol.FrameDropped)
        if self.is_subscriber and isinstance(event, outcomes):
            self._gauges.sent()
        self._gauges.event(event)
        if isinstance(event, (AlertTriggered, AlertCleared)):
            self._alerts = [*self._alerts, alert_line(event)][-MAX_ALERTS:]
        self._draw()

    def say(self, text: str) -> None:
        self._said = text
        self._draw()

    def show_typed(self, text: str) -> None:
        """The question that is being typed."""
        self._typed = text
        self._drawn_s = 0.0
        self._draw()

    def asked(self, question: PlannedQuestion, after_s: float) -> None:
        self._answers[question] = ""
        while len(self._answers) > MAX_ANSWERS:
            self._answers.pop(next(iter(self._answers)))

    def delta(self, question: PlannedQuestion, text: str) -> None:
        if question in self._answers:
            self._answers[question] += text
        self._draw()

    def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        points = point_lines(result) if isinstance(result, Answer) else []
        self._answers[question] = "\n".join([answer_line(result), *points])

    def _render(self) -> Panel:
        gauges = Table.grid(padding=(0, 2))
        for name, value in self._gauges.rows():
            gauges.add_row(Text(name, style="dim"), value)
        parts = Table.grid(padding=(0, 4))
        parts.add_row(gauges, self._heat_map())
        dialogue = Table.grid(padding=(0, 1))
        for question, text in self._answers.items():
            dialogue.add_row(Text("?", style="bold"), _text(question.text, style="bold"))
            dialogue.add_row(Text(">"), _text(text or "..."))
        for text in self._alerts:
            dialogue.add_row(Text("!", style="bold"), _text(text.removeprefix("! ")))
        foot = [_text(f"* {self._said}", style="dim")] if self._said else []
        if self._typed:
            foot.append(_text(f"? {self._typed}_", style="bold"))
        elif self.takes_questions:
            foot.append(Text("type a question and press Enter", style="dim"))
        return Panel(
            Group(parts, Text(), dialogue, *foot), title=_text(self._title), title_align="left"
        )

    def _heat_map(self) -> Text:
        last = self._gauges.newest
        if last is None:
            return Text("no frame yet", style="dim")
        rows = "\n".join(heat_rows(last.kept_cells, self._grid))
        return Text(
            f"frame {last.frame_sequence}, t={last.time_s:.1f} s, "
            f"kept {last.cells_kept}/{last.cells_seen}\n{rows}"
        )


def make_view(grid: int, title: str) -> LineOutput:
    """The table on a terminal, plain lines elsewhere."""
    return LiveTable(grid, title) if sys.stdout.isatty() else LineOutput(grid)
