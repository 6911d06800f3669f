"""The pass that asks: every question on every picture, through a session as it will be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.watching import WatchedSession, Watcher
from edge_vlm_calibration.alerts.marks import Watch
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.looking import side_of
from edge_vlm_calibration.rows import RowFile, Rows, check_rows


@dataclass(frozen=True)
class Series:
    """What the model said of one question over one stream."""

    watch: Watch
    times_s: Sequence[float]
    probabilities: Sequence[float]
    """NaN where the picture was a duplicate: what was measured before holds on."""
    answer_mass: float
    length_s: float


def check_clip(
    watcher: Watcher,
    path: Path,
    fps: float,
    settings: Mapping[str, Any],
    questions: Sequence[str],
    watches: Sequence[Watch],
    file: RowFile,
    on_frame: Callable[[], None],
) -> None:
    """Writes a row for each picture. A clip that was not finished is begun anew: its session is
    gone. Raises what sessions raise."""
    if file.is_done:
        for _ in range(len(file.read())):
            on_frame()
        return
    file.forget()
    session: WatchedSession | None = None
    stream = -1
    with ExitStack() as stack, file.append() as writer:
        for picture in pictures(path, fps, side_of(watcher)):
            if picture.is_first or session is None:
                stack.close()
                stream += 1
                asked = list(
                    dict.fromkeys(each.question for each in watches if each.stream == stream)
                )
                session = stack.enter_context(watcher.session(settings, asked))
            sent = session.send(picture.rgb(), picture.time_s)
            found = np.full((2, len(questions)), np.nan, np.float32)
            for check in sent.checks:
                place = questions.index(check.question)
                found[:, place] = check.probability, check.answer_mass
            writer.add((picture.time_s, picture.is_first, found[0], found[1]))
            on_frame()
    file.finish()


def rows_for(questions: Sequence[str]) -> np.dtype[Any]:
    return check_rows(len(questions))


def series_of(
    rows: Rows, watches: Sequence[Watch], questions: Sequence[str], frame_s: float
) -> list[Series]:
    """Of one clip's watches."""
    firsts = [*np.flatnonzero(rows["first"]).tolist(), len(rows)]
    found = []
    for watch in watches:
        part = np.array(rows[firsts[watch.stream] : firsts[watch.stream + 1]])
        place = questions.index(watch.question)
        times_s = part["time_s"].tolist()
        mass = part["answer_mass"][:, place]
        found.append(
            Series(
                watch,
                times_s,
                part["probability"][:, place].tolist(),
                float(np.nanmean(mass)) if np.isfinite(mass).any() else 0.0,
                times_s[-1] - times_s[0] + frame_s,
            )
        )
    return found
