"""Everything that runs one bundle, opened together."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import BundleSchemaError, ConfigError
from edge_vlm.formats.bundle import IMAGE_ENCODER, VIT_STEM_REUSE, EngineBundle
from edge_vlm.formats.calibrated import reuse_left_out, session_settings, with_settings
from edge_vlm.formats.calibration import Calibration, ModelIdentity
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import KeepAll
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_runtime.engines.base import CacheMemory, Engine
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.open import open_graphs
from edge_vlm_runtime.inference.constraints import Constraints
from edge_vlm_runtime.inference.image_encoder import ImageVision
from edge_vlm_runtime.inference.language import LanguageModel
from edge_vlm_runtime.inference.stem_reuse import StemReuse
from edge_vlm_runtime.inference.vision import VisionPipeline

if TYPE_CHECKING:
    from edge_vlm_runtime.engine_thread.in_process import InProcessSession
    from edge_vlm_runtime.protocol.base import ServerEvent
    from edge_vlm_runtime.protocol.settings import ServerLimits
    from edge_vlm_runtime.protocol.typed import Settings

log = logging.getLogger(__name__)


class LoadedBundle:
    """One bundle's graphs and what surrounds them. Owned by one thread; sessions take turns."""

    def __init__(
        self,
        bundle: EngineBundle,
        graphs: dict[str, Engine],
        cache_memory: CacheMemory | None = None,
        runs_on: str = "",
    ) -> None:
        """`cache_memory`: of the device on which the graphs run; None is the host. `runs_on`: in
        words, which libraries run them."""
        self.bundle, self.runs_on = bundle, runs_on
        self.in_call = threading.RLock()
        """Held by whoever uses the engines, where that may be several threads by mistake."""
        self.is_closed = False
        self._graphs = graphs
        cfg = bundle.config
        self.prompt = _prompt(bundle)
        table = bundle.embed_table
        if table.shape != (cfg.language.vocab, cfg.language.width):
            raise BundleSchemaError(
                f"the embedding table is {list(table.shape)}, the config says "
                f"{[cfg.language.vocab, cfg.language.width]}",
                where=bundle.path,
            )
        reuse = None
        if VIT_STEM_REUSE in graphs:
            reuse = StemReuse(graphs[VIT_STEM_REUSE], cfg.vision.num_cells, cache_memory)
        self.vision = VisionPipeline(graphs["vit_stem"], graphs["vit_trunk"], cfg, reuse)
        encoder = graphs.get(IMAGE_ENCODER)
        self.images: ImageVision | None = None
        """For pictures at full detail; None if the model reads video only."""
        if encoder is not None and bundle.images is not None:
            self.images = ImageVision(encoder, cfg, bundle.images)
        self.constraints = Constraints(
            self.prompt.tokenizer, self.prompt.eos_ids, cfg.language.base_vocab
        )
        self.language = LanguageModel(
            graphs["llm"],
            table,
            cfg.language,
            self.prompt.patch_id,
            bundle.kv_layout,
            graphs.get("llm_decode"),
            cache_memory,
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        threads: int = 2,
        backend: Backend = Backend.ORT,
        engines: str | os.PathLike[str] | None = None,
        check: Callable[[EngineBundle], None] = lambda bundle: None,
        wrap: Callable[[str, Engine], Engine] = lambda name, engine: engine,
        calibration: Path | None = None,
    ) -> LoadedBundle:
        """Checks the bundle and loads its graphs; `engines`: see `open_graphs`; `check` may refuse
        the bundle before they are loaded; `wrap` may put something round each graph, by its name;
        `calibration`: see `calibrated`.

        Raises BundleError and its leaves, and what `open_graphs`, `calibrated` and `check` raise.
        """
        bundle = calibrated(EngineBundle.open(path), calibration)
        check(bundle)
        opened = open_graphs(bundle, backend, threads=threads, engines=engines)
        for name, graph in opened.graphs.items():
            opened.graphs[name] = wrap(name, graph)
        try:
            return cls(bundle, opened.graphs, opened.cache_memory, opened.runs_on)
        except BaseException:
            for graph in opened.graphs.values():
                graph.close()
            raise

    def session(
        self,
        settings: Settings | None = None,
        *,
        limits: ServerLimits | None = None,
        on_event: Callable[[ServerEvent], None] | None = None,
    ) -> InProcessSession:
        """A stream in this process, without a server, see `InProcessSession`. Raises
        ConfigError."""
        import edge_vlm_runtime  # its public names: the room itself stands above this one

        return edge_vlm_runtime.InProcessSession(self, settings, limits=limits, on_event=on_event)

    def close(self) -> None:
        """Frees the graphs; twice does no harm."""
        self.is_closed = True
        for graph in self._graphs.values():
            graph.close()

    def __enter__(self) -> LoadedBundle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def identity_of(bundle: EngineBundle) -> ModelIdentity:
    """Which weights it was made from. Raises BundleSchemaError when it does not say."""
    vision = bundle.config.vision
    try:
        return ModelIdentity.from_source(
            bundle.source,
            scorer=bundle.config.scorer_kind,
            image_size=vision.image_size,
            num_cells=vision.num_cells,
        )
    except (AttributeError, ValueError) as error:
        raise BundleSchemaError(
            "the manifest does not say which weights the bundle was made from",
            where=bundle.path,
            remedy="export it again",
        ) from error


def calibrated(bundle: EngineBundle, file: Path | None) -> EngineBundle:
    """The bundle with the settings of `edge-vlm calibrate` in place of those it was made for.

    Raises ConfigError for a file that is none, is of another model, or holds no settings.
    """
    if file is None:
        return bundle
    calibration = Calibration.read(file)
    calibration.require_model(identity_of(bundle), file)
    can_reuse = VIT_STEM_REUSE in bundle.specs
    if not can_reuse and (note := reuse_left_out(calibration, file)):
        log.warning("%s", note)
    settings = session_settings(calibration, file, can_reuse=can_reuse)
    if not settings:
        raise ConfigError(
            "the calibration holds no settings of sessions",
            where=file,
            remedy="make them with `edge-vlm calibrate --sections budget,change`",
        )
    return replace(bundle, defaults=with_settings(bundle.defaults, settings))


def _prompt(bundle: EngineBundle) -> PromptFormat:
    try:
        prompt = PromptFormat(Tokenizer.from_file(bundle.tokenizer_path), bundle.style)
    except KeyError as error:
        raise BundleSchemaError(
            f"the tokenizer does not fit: {error}", where=bundle.path
        ) from error
    language = bundle.config.language
    last_written = max(prompt.bos_id, *prompt.eos_ids)
    if prompt.patch_id >= language.vocab or last_written >= language.base_vocab:
        raise BundleSchemaError(
            "the tokenizer has ids that the model's vocabulary lacks", where=bundle.path
        )
    return prompt


def warm_up(engines: LoadedBundle) -> None:
    """One picture and one token through every graph, so that the first viewer does not pay."""
    size = engines.bundle.config.vision.image_size
    picture = np.full((size, size, 3), 128, dtype=np.uint8)
    vision, language, prompt = engines.vision, engines.language, engines.prompt
    frame = vision.encode(Frame(rgb=picture, pts_ns=0, seq=0), vision.new_state(), KeepAll())
    arena = language.new_arena(len(frame.cells) + 64)
    ids = prompt.frame_ids(0.0, len(frame.cells), first=True)
    language.prefill(arena, language.embed(ids, frame.embeds))
    language.decode_step(arena, prompt.eos_id)
    arena.close()
