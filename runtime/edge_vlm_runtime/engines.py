"""Everything that runs one bundle, opened together."""

from __future__ import annotations

import os
from types import TracebackType

from edge_vlm.bundle import IMAGE_ENCODER, EngineBundle
from edge_vlm.errors import BundleSchemaError
from edge_vlm.prompt import PromptFormat
from edge_vlm.tokenizer import Tokenizer
from edge_vlm_runtime.backends.base import Engine
from edge_vlm_runtime.backends.names import Backend
from edge_vlm_runtime.image_vision import ImageVision
from edge_vlm_runtime.kv_arena import CacheMemory
from edge_vlm_runtime.language import LanguageModel
from edge_vlm_runtime.open_graphs import open_graphs
from edge_vlm_runtime.vision import VisionPipeline


class Engines:
    """One bundle's graphs and what surrounds them. Owned by one thread; sessions take turns."""

    def __init__(
        self,
        bundle: EngineBundle,
        graphs: dict[str, Engine],
        cache_memory: CacheMemory | None = None,
    ) -> None:
        """`cache_memory`: of the device on which the graphs run; None is the host."""
        self.bundle = bundle
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
        self.vision = VisionPipeline(graphs["vit_stem"], graphs["vit_trunk"], cfg)
        encoder = graphs.get(IMAGE_ENCODER)
        self.images: ImageVision | None = None
        """For pictures at full detail; None if the model reads video only."""
        if encoder is not None and bundle.images is not None:
            self.images = ImageVision(encoder, cfg, bundle.images)
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
    ) -> Engines:
        """Checks the bundle and loads its graphs; `engines`: see `open_graphs`.

        Raises BundleError and its leaves, and what `open_graphs` raises.
        """
        bundle = EngineBundle.open(path)
        opened = open_graphs(bundle, backend, threads=threads, engines=engines)
        try:
            return cls(bundle, opened.graphs, opened.cache_memory)
        except BaseException:
            for graph in opened.graphs.values():
                graph.close()
            raise

    def close(self) -> None:
        """Frees the graphs; twice does no harm."""
        for graph in self._graphs.values():
            graph.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _prompt(bundle: EngineBundle) -> PromptFormat:
    try:
        prompt = PromptFormat(Tokenizer.from_file(bundle.tokenizer_path), bundle.style)
    except KeyError as error:
        raise BundleSchemaError(
            f"the tokenizer does not fit: {error}", where=bundle.path
        ) from error
    language = bundle.config.language
    if prompt.patch_id >= language.vocab or prompt.eos_id >= language.base_vocab:
        raise BundleSchemaError(
            "the tokenizer has ids that the model's vocabulary lacks", where=bundle.path
        )
    return prompt
