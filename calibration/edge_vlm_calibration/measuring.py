"""What a real session keeps with the chosen settings, beside what was predicted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge_vlm.formats.calibrated.budget import BudgetSection, ClipShare
from edge_vlm.watching import WatchedSession, Watcher
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.looking import side_of
from edge_vlm_calibration.rows import Rows
from edge_vlm_calibration.simulate import simulate


def measured(
    watcher: Watcher,
    section: BudgetSection,
    paths: Mapping[str, Path],
    clips: Mapping[str, Rows],
    settings: Mapping[str, Any],
    most_frames: int,
    on_frame: Callable[[], None],
) -> BudgetSection:
    """The section with the share that sessions kept of each clip's first `most_frames`. Raises what
    sessions raise."""
    shares = [
        _clip(watcher, share, paths[share.name], clips[share.name], settings, most_frames, on_frame)
        for share in section.clips
    ]
    return dataclasses.replace(section, clips=tuple(shares))


def _clip(
    watcher: Watcher,
    share: ClipShare,
    path: Path,
    rows: Rows,
    settings: Mapping[str, Any],
    most_frames: int,
    on_frame: Callable[[], None],
) -> ClipShare:
    fps = float(settings["fps_cap"])
    seen = kept = frames = 0
    session: WatchedSession | None = None
    with ExitStack() as stack:
        for picture in pictures(path, fps, side_of(watcher)):
            if frames == most_frames:
                break
            if picture.is_first or session is None:
                stack.close()
                session = stack.enter_context(watcher.session(settings))
            sent = session.send(picture.rgb(), picture.time_s)
            seen, kept, frames = seen + sent.cells_seen, kept + sent.cells_kept, frames + 1
            on_frame()
    if not seen:
        return share
    expected: float | None = None
    if not settings.get("change_threshold"):
        expected = simulate(rows, settings, 1.0 / fps, most=frames).share
    return dataclasses.replace(
        share, measured_share=kept / seen, measured_frames=frames, expected_share=expected
    )
