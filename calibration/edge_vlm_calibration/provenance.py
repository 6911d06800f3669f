"""Where a section of a calibration comes from: the model's identity, the clips' hashes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edge_vlm
from edge_vlm.formats.alert_set import INDEX as EVENT_INDEX
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.calibration import ClipRecord, ModelIdentity, Provenance
from edge_vlm.formats.qa_set import INDEX as QA_INDEX

if TYPE_CHECKING:
    from edge_vlm.model.published.folder import ModelFolder


def identity_of(checkpoint: Path) -> ModelIdentity:
    """Of a checkpoint or published folder; reads all of its weights. Raises as `open_folder`."""
    from edge_vlm.model.published.folder import open_folder

    return identity_of_folder(open_folder(checkpoint))


def identity_of_folder(found: ModelFolder) -> ModelIdentity:
    hashes = {os.path.relpath(path, found.path): path for path in found.weight_files}
    source = {
        "checkpoint": found.path.resolve().name,
        "sha256": {name: sha256_of_file(path) for name, path in hashes.items()},
    }
    return ModelIdentity.from_source(
        source,
        scorer=found.config.scorer_kind,
        image_size=found.config.vision.image_size,
        num_cells=found.config.vision.num_cells,
    )


def provenance_of(
    clips: Sequence[Path],
    settings: Mapping[str, Any],
    opened: str = "checkpoint",
    skipped: Mapping[Path, str] | None = None,
) -> Provenance:
    """With the clips' hashes and nothing of what they held. `skipped`: those of them that could not
    be read, and why."""
    left_out = skipped or {}
    return Provenance(
        clips=tuple(
            ClipRecord(name=path.resolve().name, sha256=hash_of_clip(path))
            for path in clips
            if path not in left_out
        ),
        skipped={path.resolve().name: why for path, why in left_out.items()},
        settings=dict(settings),
        opened=opened,
        tool_version=edge_vlm.__version__,
    )


def hash_of_clip(path: Path) -> str:
    """sha256 of a video file, or of the index of a folder of pictures; "" for what has neither."""
    if path.is_dir():
        indices = [path / name for name in (QA_INDEX, EVENT_INDEX) if (path / name).is_file()]
        return sha256_of_file(indices[0]) if indices else ""
    return sha256_of_file(path)
