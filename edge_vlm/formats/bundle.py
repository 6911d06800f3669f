"""The bundle: one folder with everything a runtime needs, and a manifest that vouches for it.

    manifest.json          schema version, model config, graph specs, precision, sha256 of every
                           other file
    graphs/NAME.onnx       plus NAME.weights, its tensors, mapped into memory rather than read
    embed_table.npy        token embeddings, f32 or f16 [vocab, width], mapped
    tokenizer.json
    precision_plan.json    format of every node, the largest value it saw, and why
    reference/NAME.npz     small inputs and the outputs torch gave for them

A bundle is opened only when every file the manifest names is there with the recorded hash. It is
written into a hidden folder beside its destination and renamed when complete, so that an
interrupted export leaves nothing that could be mistaken for a bundle.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edge_vlm.config import MOST_OF_ANYTHING, ModelConfig
from edge_vlm.errors import (
    BundleError,
    BundleFileMissing,
    BundleHashMismatch,
    BundleNotFound,
    BundleSchemaError,
)
from edge_vlm.errors.export import RangeFp16
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import FP32, KVLayout, Precision, Variant
from edge_vlm.formats.usage import FrameRule, ModelCard
from edge_vlm.json_text import MALFORMED, fault_of, parse_json
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import PLAIN, PromptStyle

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 said nothing of precision, variant, layout and prompt: it had today's defaults."""
MANIFEST = "manifest.json"
PRECISION_PLAN = "precision_plan.json"
IMAGE_ENCODER = "image_encoder"
"""The graph of still pictures; only checkpoints with an image path have it."""
VIT_STEM_REUSE = "vit_stem_reuse"
"""The stem of one frame for its changed cells only; in bundles that were exported with it."""
BORROWED = {
    "llm_decode": ("llm",),
    IMAGE_ENCODER: ("vit_stem", "vit_trunk"),
    VIT_STEM_REUSE: ("vit_stem",),
}
"""Graphs whose tensors may lie in the weights files of others."""
MOST_SECONDS = 1e9
"""Of video, some 30 years."""
MOST_MANIFEST_BYTES = 16 << 20
MOST_REFERENCE_BYTES = 1 << 30
"""Of one graph, unpacked: those of a full-size model have some 10 MB."""
UNREADABLE_ARRAYS = (
    *(ValueError, OverflowError, MemoryError, EOFError, KeyError, OSError, SyntaxError),
    RuntimeError,  # of encrypted archives
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""What numpy raises on files that are none of its own."""
TOKENIZER = "tokenizer.json"
EMBED_TABLE = "embed_table.npy"


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class EngineBundle:
    """An opened bundle. `open` is the only way in; what it returns has been checked."""

    path: Path
    name: str
    config: ModelConfig
    specs: Mapping[str, GraphSpec]
    defaults: Mapping[str, Any]
    """Settings of a session that the checkpoint was made for, such as `keep_ratio`."""
    source: Mapping[str, Any]
    """Where the weights came from: checkpoint name and sha256, versions of the tools."""
    graph_files: Mapping[str, str]
    precision: Precision = FP32
    variant: Variant = Variant.PORTABLE
    kv_layout: KVLayout = KVLayout.TOKEN_MAJOR
    style: PromptStyle = PLAIN
    images: ImageConfig | None = None
    """How still pictures are cut for the graph `image_encoder`; None without that graph."""
    frames: FrameRule | None = None
    """Which frames of a whole clip the model was trained on; None where nothing is known."""
    card: ModelCard | None = None
    """None for a model that nobody has described, and in bundles from before there were cards."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EngineBundle:
        """Reads the manifest and checks every file against it.

        Raises BundleNotFound (no such folder, or no manifest in it), BundleSchemaError (the
        manifest is not one we can read), BundleFileMissing, BundleHashMismatch.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleNotFound("no such bundle", where=root, remedy="give the bundle's folder")
        if not (root / MANIFEST).is_file():
            is_checkpoint = (root / "config.json").is_file()
            raise BundleNotFound(
                f"no {MANIFEST} here, so this is not a bundle",
                where=root,
                remedy=f"a checkpoint is exported first: edge-vlm export {root} -o my-bundle"
                if is_checkpoint
                else "give the folder that `edge-vlm export` wrote",
            )
        bundle, files = _read_manifest(root)
        for name, digest in files.items():
            file = root / name
            if not file.is_file():
                raise BundleFileMissing(
                    f"the bundle lacks {name}", where=root, remedy="export or copy it again"
                )
            if sha256_of_file(file) != digest:
                raise BundleHashMismatch(
                    f"{name} is not the file the manifest describes",
                    where=root,
                    remedy="it was changed or damaged, export or copy the bundle again",
                )
        return bundle

    def graph_path(self, name: str) -> Path:
        """Raises BundleSchemaError if the bundle has no graph of that name, or lies where the
        libraries that run graphs find none: they take names in UTF-8 only."""
        if name not in self.graph_files:
            raise BundleSchemaError(
                f"no graph {name!r}, only {sorted(self.graph_files)}", where=self.path
            )
        path = self.path / self.graph_files[name]
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise BundleSchemaError(
                "its path is not UTF-8, which ONNX Runtime and others need",
                where=self.path,
                remedy="rename the folder",
            ) from error
        return path

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def embed_table(self) -> np.ndarray:
        """Token embeddings f32 or f16 [vocab, width], read-only and mapped: rows are read when
        used."""
        try:
            _require_whole(self.path / EMBED_TABLE)
            table: np.ndarray = np.load(self.path / EMBED_TABLE, mmap_mode="r", allow_pickle=False)
            return table
        except UNREADABLE_ARRAYS as error:
            raise BundleSchemaError(f"{EMBED_TABLE}: {error}", where=self.path) from error

    def has_reference(self, name: str) -> bool:
        return (self.path / "reference" / f"{name}.npz").is_file()

    def reference(self, name: str) -> dict[str, np.ndarray]:
        """Recorded arrays; of a graph, keyed "inputs/NAME" and "outputs/NAME". Raises
        BundleSchemaError."""
        path = self.path / "reference" / f"{name}.npz"
        try:
            _require_small(path)
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except UNREADABLE_ARRAYS as error:
            raise BundleSchemaError(f"{path.name}: {error}", where=self.path) from error


def _require_whole(path: Path) -> None:
    """Raises ValueError for an array that is larger than its file, SyntaxError and its kind for a
    header that is none."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version > (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        needed = file.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > path.stat().st_size:
        raise ValueError(f"its header says {list(shape)}, which the file does not hold")


def _require_small(path: Path) -> None:
    """Raises ValueError for an archive that would unpack to more than any reference is."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MOST_REFERENCE_BYTES:
        raise ValueError(f"it would unpack to {size:,} bytes")


def _read_manifest(root: Path) -> tuple[EngineBundle, dict[str, str]]:
    try:
        if (size := (root / MANIFEST).stat().st_size) > MOST_MANIFEST_BYTES:
            raise ValueError(f"{size:,} bytes are no manifest's")
        data = parse_json((root / MANIFEST).read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise BundleSchemaError(f"{MANIFEST} is not JSON: {error}", where=root) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise BundleSchemaError(
            f"{MANIFEST} has schema_version {version!r}, this program reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}",
            where=root,
            remedy="export the checkpoint again with this version",
        )
    try:
        files = {str(name): str(digest) for name, digest in data["files"].items()}
        graph_files = {str(name): str(graph["file"]) for name, graph in data["graphs"].items()}
        bundle = EngineBundle(
            path=root,
            name=str(data["name"]),
            config=ModelConfig.from_dict(data["model"]),
            specs={
                name: GraphSpec.from_dict(graph["spec"]) for name, graph in data["graphs"].items()
            },
            defaults=dict(data["defaults"]),
            source=dict(data["source"]),
            graph_files=graph_files,
            precision=Precision.from_dict(data["precision"] if version > 1 else {}),
            variant=Variant(data["variant"] if version > 1 else Variant.PORTABLE),
            kv_layout=KVLayout(data["kv_layout"] if version > 1 else KVLayout.TOKEN_MAJOR),
            style=PromptStyle(**(data["prompt"] if version > 1 else {})),
            images=_images(data.get("images"), graph_files),
            frames=FrameRule(**data["frames"]) if data.get("frames") else None,
            card=ModelCard(**data["card"]) if data.get("card") else None,
            schema_version=version,
        )
    except MALFORMED as error:
        raise BundleSchemaError(
            f"{MANIFEST} is malformed: {fault_of(error)}", where=root
        ) from error
    _check_limits(bundle)
    for name in files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise BundleSchemaError(f"{MANIFEST} names a file outside: {name}", where=root)
    for name in [*graph_files.values(), TOKENIZER, EMBED_TABLE]:
        if name not in files:
            raise BundleSchemaError(f"{MANIFEST} has no hash for {name}", where=root)
    return bundle, files


def _check_limits(bundle: EngineBundle) -> None:
    """The name, and of `defaults` what is no session's setting. Raises BundleSchemaError."""
    if not bundle.name.isprintable():  # it is shown in terminals
        raise BundleSchemaError(f"{MANIFEST}: the name is {bundle.name!r:.80}", where=bundle.path)
    for name, most in (("max_positions", MOST_OF_ANYTHING), ("max_time_s", MOST_SECONDS)):
        value = bundle.defaults.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value <= most):
            raise BundleSchemaError(
                f"{MANIFEST}: defaults.{name} must be a number above 0 and at most {most}, "
                f"got {value!r:.40}",
                where=bundle.path,
            )


def _images(fields: Mapping[str, Any] | None, graphs: Mapping[str, str]) -> ImageConfig | None:
    """Raises ValueError unless the graph is there exactly when its pictures are described."""
    if (fields is None) != (IMAGE_ENCODER not in graphs):
        raise ValueError(f"images and the graph {IMAGE_ENCODER} belong together")
    return None if fields is None else ImageConfig(**fields)


class BundleWriter:
    """Collects a bundle's files in `folder`; `finish` writes the manifest over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._graphs: dict[str, dict[str, Any]] = {}

    def graph_file(self, spec: GraphSpec) -> Path:
        """Registers a graph and says where its ONNX file must be written."""
        name = f"graphs/{spec.name}.onnx"
        self._graphs[spec.name] = {"file": name, "spec": spec.to_dict()}
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return path

    def embed_table(self, table: np.ndarray, dtype: str = "float32") -> None:
        """Raises RangeFp16 for numbers that a float16 cannot hold."""
        largest = float(np.abs(table).max(initial=0))
        if largest > float(np.finfo(dtype).max):
            raise RangeFp16(
                f"an embedding reaches {largest:.0f}, which {dtype} cannot hold",
                remedy="export with embed=float32",
            )
        np.save(self.folder / EMBED_TABLE, np.ascontiguousarray(table, dtype=dtype))

    def precision_plan(self, text: str) -> None:
        (self.folder / PRECISION_PLAN).write_text(text, encoding="utf-8")

    def tokenizer(self, source: Path) -> None:
        shutil.copyfile(source, self.folder / TOKENIZER)

    def reference(self, graph: str, arrays: Mapping[str, np.ndarray]) -> None:
        path = self.folder / "reference" / f"{graph}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **dict(arrays))  # type: ignore[arg-type]

    def finish(
        self,
        *,
        name: str,
        config: ModelConfig,
        defaults: Mapping[str, Any],
        source: Mapping[str, Any],
        precision: Precision = FP32,
        variant: Variant = Variant.PORTABLE,
        kv_layout: KVLayout = KVLayout.TOKEN_MAJOR,
        style: PromptStyle = PLAIN,
        images: ImageConfig | None = None,
        frames: FrameRule | None = None,
        card: ModelCard | None = None,
    ) -> None:
        files = {
            path.relative_to(self.folder).as_posix(): sha256_of_file(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "precision": precision.to_dict(),
            "variant": variant.value,
            "kv_layout": kv_layout.value,
            "prompt": dataclasses.asdict(style),
            "images": None if images is None else dataclasses.asdict(images),
            "frames": None if frames is None else dataclasses.asdict(frames),
            "card": None if card is None else dataclasses.asdict(card),
            "model": config.to_dict(),
            "graphs": self._graphs,
            "files": files,
            "defaults": dict(defaults),
            "source": dict(source),
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def write_bundle(
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[BundleWriter]:
    """A writer whose work appears at `path` when the block ends well, and nowhere otherwise.

    With `overwrite` an existing bundle is replaced; a folder that is not a bundle never is. Raises
    BundleError if `path` is taken.
    """
    target = Path(path).absolute()
    if target.exists():
        replaceable = (target / MANIFEST).is_file() or (
            target.is_dir() and not any(target.iterdir())
        )
        if not replaceable:
            raise BundleError("exists and is not a bundle", where=target, remedy="choose another")
        if not overwrite and (target / MANIFEST).is_file():
            raise BundleError(
                "exists already", where=target, remedy="pass --overwrite to replace it"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    prefix = f".{target.name}.partial-{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield BundleWriter(folder)
        if not (folder / MANIFEST).is_file():
            raise BundleError("the bundle was never finished", where=target)
        os.chmod(folder, 0o755)  # mkdtemp's 0700 would keep a server under another user out
        if target.exists():
            old = folder.with_name(folder.name.replace(".partial-", ".old-"))
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Removes what exports to the same place left behind that were killed in the middle."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.partial-*-*"):
        process = folder.name.removeprefix(f".{target.name}.partial-").partition("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
