"""Everything that runs one bundle, opened together."""

from __future__ import annotations

import os
from types import TracebackType

from edge_vlm.bundle import EngineBundle
from edge_vlm.errors import BundleSchemaError
from edge_vlm.prompt import PromptFormat
from edge_vlm.tokenizer import Tokenizer
from edge_vlm_runtime.backends.base import Engine
from edge_vlm_runtime.backends.ort import OrtEngine
from edge_vlm_runtime.language import LanguageModel
from edge_vlm_runtime.vision import VisionPipeline


class Engines:
    """One bundle's graphs and what surrounds them. Owned by one thread; sessions take turns."""

    def __init__(self, bundle: EngineBundle, graphs: dict[str, Engine]) -> None:
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
        self.language = LanguageModel(
            graphs["llm"],
            table,
            cfg.language,
            self.prompt.patch_id,
            bundle.kv_layout,
            graphs.get("llm_decode"),
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], threads: int = 2) -> Engines:
        """Checks the bundle and loads its graphs on the CPU.

        Raises BundleError and its leaves, EngineError, MissingExtraError.
        """
        bundle = EngineBundle.open(path)
        return cls(
            bundle, {name: OrtEngine(bundle, name, threads=threads) for name in bundle.specs}
        )

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
