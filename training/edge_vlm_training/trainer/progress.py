"""What a run says while it goes on: a bar on the terminal, a line of JSON per report, TensorBoard.

Only the leading process has one; `silent` is for the others and for tests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from edge_vlm.errors import MissingExtraError

LOG, BOARD = "log.jsonl", "tensorboard"


class Reporter:
    """Takes numbers by step; use it as a context manager."""

    def __init__(self, folder: Path, total: int, start: int, *, console: Console | None) -> None:
        """Reports behind step `start` that an earlier, killed run left are taken back.

        Raises MissingExtraError if TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError.for_library("tensorboard", "train") from error
        self._log = folder / LOG
        self._keep_until(start)
        self._board = SummaryWriter(str(folder / BOARD), purge_step=start + 1 if start else None)
        self._console = console
        self._bar: Progress | None = None
        if console is not None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._bar.add_task("starting", total=total, completed=start)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._board.close()

    def advance(self, step: int) -> None:
        """One more step is done; `step` counts them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """One report: into the log, to TensorBoard and beside the bar."""
        line = {"step": step, **{name: float(f"{v:.6g}") for name, v in values.items()}}
        with open(self._log, "a") as log:
            log.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._bar is not None:
            shown = (
                f"loss {values['loss']:.4f}  {values['tokens_per_s']:,.0f} tok/s  "
                f"MFU {values['mfu']:.1%}  kept {values['kept']:.1%}"
            )
            self._bar.update(self._task, description=shown)
            if self._console is not None and not self._console.is_terminal:
                self._console.print(f"step {step}  {shown}  ETA {values['eta_s']:.0f} s")

    def text(self, step: int, name: str, lines: list[str]) -> None:
        """Samples of answers."""
        self._board.add_text(name, "\n\n".join(lines), step)
        if self._console is not None:
            for line in lines:
                self._console.print(f"  {line}", markup=False, highlight=False)

    def say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False)

    def _keep_until(self, step: int) -> None:
        if not self._log.exists():
            return
        kept = []
        for line in self._log.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break  # cut off when the run was killed
        partial = self._log.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._log)


def terminal() -> Console:
    """The console of a run that is watched."""
    return Console(stderr=True)
