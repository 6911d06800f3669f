"""Answers as they come, one line for each clip and run, so that a run that was cut off goes on.

The first line says what is measured: another question set or another model's answers never mix with
it. The last line may have been cut in the middle; it is taken off. A log is written by one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import ClipAnswers
from edge_vlm.json_text import MALFORMED, fault_of, parse_json

FORMAT = 1
Key = tuple[str, str, str]
"""Path, name of the run, name of the clip."""


class AnswerLog:
    """What was answered so far, in memory and, with a file, on disk."""

    def __init__(self, file: Path | None, measured: Mapping[str, Any]) -> None:
        """`measured` must be what the file was begun with, as far as both name the same things.

        Raises ConfigError when it is not, or when the file is no such log or cannot be written.
        """
        self._answers: dict[Key, ClipAnswers] = {}
        self._file: IO[bytes] | None = None
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "ab+")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ConfigError(f"answers cannot be kept there: {error}", where=file) from error
        try:
            self._read(file, dict(measured))
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path, measured: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write({"format": FORMAT, "measured": measured})
            return
        try:
            head = parse_json(lines[0])
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']}, expected {FORMAT}")
            before = dict(head["measured"])
            for line in lines[1:]:
                entry = parse_json(line)
                if "measured" in entry:
                    before |= entry["measured"]
                    continue
                answers = ClipAnswers(
                    [str(text) for text in entry["said"]], int(entry["seen"]), int(entry["kept"])
                )
                self._answers[entry["path"], entry["run"], entry["clip"]] = answers
        except MALFORMED as error:
            raise ConfigError(
                f"not a log of answers: {fault_of(error)}", where=path, remedy="name another folder"
            ) from error
        other = [name for name in measured if before.get(name, measured[name]) != measured[name]]
        if other:
            raise ConfigError(
                f"the folder's answers were given with different {', '.join(sorted(other))}",
                where=path,
                remedy="name another folder, or remove this one",
            )
        more = {name: value for name, value in measured.items() if name not in before}
        if more:
            self._write({"measured": more})

    def __contains__(self, key: Key) -> bool:
        return key in self._answers

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, key: Key) -> ClipAnswers:
        return self._answers[key]

    def add(self, key: Key, answers: ClipAnswers) -> None:
        """On disk when this returns: an interrupt loses nothing that was answered."""
        self._answers[key] = answers
        path, run, clip = key
        self._write(
            {
                "path": path,
                "run": run,
                "clip": clip,
                "said": list(answers.texts),
                "seen": answers.cells_seen,
                "kept": answers.cells_kept,
            }
        )

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
