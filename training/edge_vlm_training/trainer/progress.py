"""What a run says while it goes on: a bar on the terminal, a line of JSON per report, TensorBoard.

Only the leading process has one; `silent` is for the others and for tests.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from edge_vlm.console.output import obeyed
from edge_vlm.errors import MissingExtraError
from edge_vlm.json_text import MALFORMED, parse_json

LOG, BOARD = "log.jsonl", "tensorboard"


_SHOWN = {
    "loss": "loss {:.4f}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
    "kept": "kept {:.1%}",
    "eta_s": "ETA {:.0f} s",
}


class Reporter:
    """Takes numbers by step; use it as a context manager."""

    def __init__(self, folder: Path, start: int, *, console: Console | None) -> None:
        """Reports after step `start` that an earlier, killed run left are taken back.

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
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            self._task = self._bar.add_task("starting", total=1.0, numbers="")

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._board.close()

    def advance(self, step: int, share: float, stage: str) -> None:
        """One more step is done; `step` counts them, `share` is that of the stage."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share, description=f"{stage} step {step}")

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """One report: into the log, to TensorBoard and beside the bar.

        A value is a number, a text or a mapping of numbers.
        """
        with open(self._log, "a") as log:
            log.write(json.dumps({"step": step, **_rounded(values)}) + "\n")
        for name, value in values.items():
            if isinstance(value, Mapping):
                for key, number in value.items():
                    self._board.add_scalar(f"{name}/{key}", number, step)
            elif not isinstance(value, str):
                self._board.add_scalar(name, value, step)
        if self._bar is not None and self._console is not None:
            shown = "  ".join(
                text.format(values[name]) for name, text in _SHOWN.items() if name in values
            )
            self._bar.update(self._task, numbers=shown)
            if not self._console.is_terminal:
                self._console.print(f"{values['stage']} step {step}  {shown}")

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
        for line in self._log.read_text(errors="replace").splitlines():
            try:
                if parse_json(line)["step"] <= step:
                    kept.append(line + "\n")
            except MALFORMED:
                break  # cut off when the run was killed
        partial = self._log.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._log)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = _rounded(value)
        else:
            found[name] = value if isinstance(value, str) else float(f"{value:.6g}")
    return found


def terminal() -> Console:
    """The console of a run that is watched."""
    return Console(file=obeyed(sys.stderr))
