"""One run of `edge-vlm calibrate`: the footage is looked at once, then sections are made of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import edge_vlm
from edge_vlm.console.progress import Progress
from edge_vlm.errors import ConfigError, MissingExtraError, RecordingError, VideoError
from edge_vlm.evaluation.runs import EvaluatorOptions
from edge_vlm.formats.bundle import MANIFEST
from edge_vlm.formats.calibrated.change import CHANGE_SETTINGS, ChangeSection
from edge_vlm.formats.calibration import Calibration, ClipRecord, Provenance
from edge_vlm.watching import WATCHER_GROUP, Watcher
from edge_vlm_calibration.answering import accuracy
from edge_vlm_calibration.budget import Wanted, budget_section
from edge_vlm_calibration.footage import expected_frames, pictures
from edge_vlm_calibration.looking import look_at, rows_of, side_of
from edge_vlm_calibration.measuring import measured
from edge_vlm_calibration.noise.change import Stretch, change_section, shows_nothing, stillest
from edge_vlm_calibration.noise.reuse import reuse_section
from edge_vlm_calibration.provenance import hash_of_clip
from edge_vlm_calibration.rows import RowFile, Rows, WorkFolder
from edge_vlm_calibration.simulate import DEFAULTS

SEARCH_STEPS = 30
LEAST_FRAMES = 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    model: Path
    clips: Sequence[Path]
    sections: Sequence[str]
    wanted: Wanted
    fps: float
    measure_s: float
    threads: int
    backend: str
    questions: Path | None = None
    """With known answers, a JSONL file or a question set."""

    @property
    def is_bundle(self) -> bool:
        return (self.model / MANIFEST).is_file()


@contextmanager
def opened(request: Request) -> Iterator[Watcher]:
    """The model. Raises BundleError, CheckpointError, MissingExtraError."""
    if not request.is_bundle:
        try:
            import torch
        except ModuleNotFoundError as error:
            raise MissingExtraError.for_library("torch", "train") from error
        from edge_vlm_calibration.torch_watcher import CheckpointWatcher

        if request.threads:
            torch.set_num_threads(request.threads)
        yield CheckpointWatcher(request.model)
        return
    points = {point.name: point for point in metadata.entry_points(group=WATCHER_GROUP)}
    if "bundle" not in points:
        raise MissingExtraError.for_library("onnxruntime", "ort")
    try:
        open_bundle = points["bundle"].load()
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library.startswith("edge_vlm"):
            raise
        raise MissingExtraError.for_library(library, "ort") from error
    with open_bundle(
        str(request.model), threads=request.threads or 2, backend=request.backend
    ) as watcher:
        yield watcher


@dataclass
class Seen:
    """The footage, looked at."""

    rows: dict[str, Rows] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    records: list[ClipRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def names_of(clips: Sequence[Path]) -> dict[str, Path]:
    """Each clip by a name of its own."""
    names: dict[str, Path] = {}
    for path in clips:
        name, number = path.resolve().name, 1
        while name in names:
            number += 1
            name = f"{path.resolve().name} ({number})"
        names[name] = path
    return names


def look(request: Request, watcher: Watcher, work: WorkFolder) -> Seen:
    """One pass over all clips. One that cannot be read is skipped and named.

    Raises ConfigError when fewer than half are left, or all that is seen is one colour."""
    seen = Seen()
    named = names_of(request.clips)
    expected = [expected_frames(path, request.fps) for path in named.values()]
    total = None if None in expected else sum(count or 0.0 for count in expected)
    if work.is_resumed:
        print("going on where the last run was stopped", file=sys.stderr)
    with Progress("frames", total) as progress:
        for number, (name, path) in enumerate(named.items()):
            file = work.rows(f"{number:04d}.rows", rows_of(watcher))
            _look_at(request, watcher, name, path, file, seen, progress.advance)
    if len(seen.rows) * 2 < len(named):
        why = "; ".join(f"{name}: {why}" for name, why in seen.skipped.items())
        raise ConfigError(
            f"only {len(seen.rows)} of {len(named)} clips can be read: {why}",
            remedy="name clips that play in a video player",
        )
    blank = [name for name, rows in seen.rows.items() if shows_nothing(rows)]
    if len(blank) == len(seen.rows):
        raise ConfigError(
            "the footage is of one colour: there is nothing to choose by",
            where=", ".join(blank),
            remedy="is the lens covered? give footage in which things can be seen",
        )
    seen.notes += [f"{name} is of one colour all the time" for name in blank]
    return seen


def _look_at(
    request: Request,
    watcher: Watcher,
    name: str,
    path: Path,
    file: RowFile,
    seen: Seen,
    on_frame: Callable[[], None],
) -> None:
    if not file.is_done:
        try:
            look_at(watcher, path, request.fps, file, on_frame)
            file.finish()
        except (VideoError, ConfigError, RecordingError) as error:
            if len(file.read()) < LEAST_FRAMES:
                file.forget()
            file.finish(str(error))
    rows = file.read()
    if len(rows) < LEAST_FRAMES:
        seen.skipped[name] = file.why_not or f"it has {len(rows)} frame, which tells of no change"
        print(f"edge-vlm: {name} is left out: {seen.skipped[name]}", file=sys.stderr)
        return
    if file.why_not:
        seen.notes.append(f"{name} breaks off, what comes before is used: {file.why_not}")
    width, height = _size_of(path, request.fps, side_of(watcher))
    _note_size(name, width, height, watcher, seen.notes)
    seen.rows[name], seen.paths[name] = rows, path
    seen.records.append(
        ClipRecord(
            name=name,
            sha256=hash_of_clip(path),
            frames=len(rows),
            seconds=round(_seconds(rows, 1 / request.fps), 3),
            size=(width, height),
        )
    )


def _seconds(rows: Rows, frame_s: float) -> float:
    steps = rows["time_s"][1:] - rows["time_s"][:-1]
    return float(steps[~rows["first"][1:]].sum()) + int(rows["first"].sum()) * frame_s


def _size_of(path: Path, fps: float, max_side: int) -> tuple[int, int]:
    first = next(iter(pictures(path, fps, max_side)))
    height, width, _ = first.rgb().shape
    return width, height


def _note_size(name: str, width: int, height: int, watcher: Watcher, notes: list[str]) -> None:
    side = watcher.config.vision.image_size
    if min(width, height) < side / 2:
        notes.append(
            f"{name} is {width}x{height}, the model sees {side}x{side}: it is enlarged, and "
            "scores of a real camera of that size may differ"
        )
    elif max(width, height) > 3 * min(width, height):
        notes.append(
            f"{name} is {width}x{height} and is squeezed into {side}x{side}: things look "
            "otherwise than the model was trained on"
        )


def make(request: Request, watcher: Watcher, work: WorkFolder, made: Calibration) -> Calibration:
    """The sections of LOOKED, as far as they are asked for, put into `made`."""
    if "reuse" in request.sections and not watcher.config.has_scores:
        raise ConfigError(
            "reuse is about the blocks in front of the scorer, and this model has none",
            where=request.model,
            remedy="leave the section out",
        )
    seen = look(request, watcher, work)
    scorer = watcher.config.scorer_kind
    still = stillest(seen.rows)
    change, notes = change_section(seen.rows, still, scorer)
    if "change" in request.sections:
        made = made.with_section(change, provenance(request, watcher, seen), seen.notes + notes)
    known = made.find(ChangeSection)
    usual = {**DEFAULTS, **watcher.defaults}
    before = {name: usual[name] for name in sorted(CHANGE_SETTINGS)}
    before |= known.settings if known else {}
    if "reuse" in request.sections:
        made = _with_reuse(request, watcher, seen, still, before, made)
    if "budget" not in request.sections:
        return made
    base: dict[str, Any] = {"fps_cap": request.fps, **before}
    with Progress("settings", SEARCH_STEPS) as progress:
        section, notes = budget_section(seen.rows, request.wanted, base, scorer, progress.advance)
        progress.at(SEARCH_STEPS)
    if request.measure_s > 0:
        most = max(2, round(request.measure_s * request.fps))
        total = sum(min(most, len(rows)) for rows in seen.rows.values())
        with Progress("measured frames", total) as progress:
            section = measured(
                watcher,
                section,
                seen.paths,
                seen.rows,
                {**base, **section.settings},
                most,
                progress.advance,
            )
    if request.questions is not None:
        points = accuracy(
            request.model,
            is_bundle=request.is_bundle,
            questions=request.questions,
            fps=request.fps,
            options=EvaluatorOptions(threads=request.threads or 2, backend=request.backend),
        )
        section = dataclasses.replace(section, accuracy=points)
    floor = change.score_floor
    if scorer == "change" and floor and float(section.settings["change_threshold"]) < floor:
        notes.append(
            f"the threshold of change lies below what noise alone reaches ({floor:.4g}): noise is "
            "kept, too; ask for a smaller share"
        )
    noted = seen.notes + notes
    return made.with_section(section, provenance(request, watcher, seen, **before), noted)


def _with_reuse(
    request: Request,
    watcher: Watcher,
    seen: Seen,
    still: Stretch | None,
    settings: Mapping[str, Any],
    made: Calibration,
) -> Calibration:
    total = sum(map(len, seen.rows.values())) + (0 if still is None else len(still.rows))
    with Progress("reuse: frames", total) as progress:
        section, notes = reuse_section(
            seen.paths,
            seen.rows,
            still,
            settings,
            watcher.config.vision,
            request.fps,
            side_of(watcher),
            progress.advance,
        )
    if section.settings and request.is_bundle and not watcher.can_reuse:
        notes.append(
            "this bundle has no graph for it and leaves the level out: export the weights again "
            "with --reuse"
        )
    return made.with_section(section, provenance(request, watcher, seen, **settings), notes)


def provenance(request: Request, watcher: Watcher, seen: Seen, **more: Any) -> Provenance:
    return Provenance(
        clips=tuple(seen.records),
        skipped=dict(seen.skipped),
        settings={"fps": request.fps, request.wanted.name: request.wanted.value, **more},
        opened=watcher.opened,
        tool_version=edge_vlm.__version__,
    )


def made_with(request: Request, watcher: Watcher) -> Mapping[str, Any]:
    """What rows depend on."""
    return {
        "weights": dict(watcher.model.weights),
        "scorer": watcher.model.scorer,
        "opened": watcher.opened,
        "fps": request.fps,
        "clips": [_hash_or_nothing(path) for path in request.clips],
        "version": edge_vlm.__version__,
    }


def _hash_or_nothing(path: Path) -> str:
    try:
        return hash_of_clip(path)
    except OSError:
        return f"unreadable {path}"
