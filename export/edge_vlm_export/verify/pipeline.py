"""The whole model on a clip, from pictures to words, over any way of running its graphs.

`stream` takes the frames one by one as the runtime does; `whole` takes them together. Torch and
ONNX Runtime are driven by the same code, so that what differs between two results is the graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_vlm.config import CELL, ModelConfig, VisionAttention
from edge_vlm.errors import NonFinite
from edge_vlm.formats.bundle import VIT_STEM_REUSE
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import KVLayout
from edge_vlm.pixels.patches import cell_table, to_pixel_values
from edge_vlm.pruning.change import LastKept
from edge_vlm.pruning.policies import KeepPolicy, make_policy
from edge_vlm.text.masks import CAUSAL, block_bias, block_rule
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.rope import rope_table

Arrays = dict[str, np.ndarray]
RunGraph = Callable[[str, Arrays], Arrays]
"""Graph name and inputs to outputs."""

NUM_TOKENS = 16
QUESTION = "what is in the video ?"


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Pictures rgb u8 [H, W, 3] and their times; sampled evenly."""

    pictures: Sequence[np.ndarray]
    fps: float = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineResult:
    kept: tuple[np.ndarray, ...]
    """Kept cells of each frame, i32 [K]."""
    features: np.ndarray
    """f32 [sum of K, width]"""
    logits: np.ndarray
    """After the question, f32 [vocab]."""
    tokens: tuple[int, ...]
    """The first words of the greedy answer."""

    def to_arrays(self) -> Arrays:
        return {
            "kept": np.concatenate(self.kept),
            "num_kept": np.array([len(cells) for cells in self.kept], np.int32),
            "features": self.features,
            "logits": self.logits,
            "tokens": np.array(self.tokens, np.int32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> PipelineResult:
        ends = np.cumsum(arrays["num_kept"])[:-1]
        return cls(
            kept=tuple(np.split(arrays["kept"], ends)),
            features=arrays["features"],
            logits=arrays["logits"],
            tokens=tuple(arrays["tokens"].tolist()),
        )


class Pipeline:
    """One model's graphs, run through `run`."""

    def __init__(
        self,
        run: RunGraph,
        *,
        cfg: ModelConfig,
        specs: Mapping[str, GraphSpec],
        prompt: PromptFormat,
        embed: Callable[[np.ndarray], np.ndarray],
        layout: KVLayout,
        keep_ratio: float = 0.5,
    ) -> None:
        """`embed`: token ids [n] to embeddings f32 [n, width]."""
        self._run, self._cfg, self._specs, self._prompt = run, cfg, specs, prompt
        self._embed, self._layout, self._keep_ratio = embed, layout, keep_ratio

    def stream(
        self, clip: Clip, num_tokens: int = NUM_TOKENS, *, anew: bool = False
    ) -> PipelineResult:
        """Frame by frame; with `FRAME` attention the language model too takes one at a time.

        `anew`: through the graph that computes changed cells, as if all of them had changed.
        """
        vision, policy = self._cfg.vision, self._policy()
        prev = np.zeros((1, vision.num_cells, vision.width), np.float32)
        kept, features, last_kept = [], [], LastKept(vision.num_cells)
        for i, picture in enumerate(clip.pictures):
            pixels = to_pixel_values(picture, vision)[None]
            hidden, cells, scores = self._stem(pixels, prev, first=i == 0, anew=anew)
            prev = cells[-1:]
            kept.append(self._choose(policy, last_kept, cells[0], scores[0], picture, i == 0))
            features.append(self._trunk(hidden, kept[-1:]))
        at_once = self._cfg.attention is VisionAttention.ALL
        logits, past = self._read(clip, kept, features, at_once)
        return self._answer(kept, features, logits, past, num_tokens)

    @property
    def reuses(self) -> bool:
        """There is a graph that computes changed cells."""
        return VIT_STEM_REUSE in self._specs

    def whole(self, clip: Clip, num_tokens: int = NUM_TOKENS) -> PipelineResult:
        """As many frames per vision call as it takes, and the language model takes all of them in
        one."""
        vision, policy = self._cfg.vision, self._policy()
        prev = np.zeros((1, vision.num_cells, vision.width), np.float32)
        most = self._specs["vit_stem"].dims["F"].max
        kept, features, last_kept = [], [], LastKept(vision.num_cells)
        for start in range(0, len(clip.pictures), most):
            pictures = clip.pictures[start : start + most]
            pixels = np.stack([to_pixel_values(picture, vision) for picture in pictures])
            hidden, cells, scores = self._stem(pixels, prev, first=start == 0)
            prev = cells[-1:]
            chosen = [
                self._choose(policy, last_kept, cells[i], row, picture, start + i == 0)
                for i, (row, picture) in enumerate(zip(scores, pictures, strict=True))
            ]
            joined = self._trunk(hidden, chosen)
            features += np.split(joined, np.cumsum([len(cells) for cells in chosen])[:-1])
            kept += chosen
        logits, past = self._read(clip, kept, features, at_once=True)
        return self._answer(kept, features, logits, past, num_tokens)

    # ---- vision --------------------------------------------------------------------------------

    def _policy(self) -> KeepPolicy:
        if not self._cfg.has_scores:
            return make_policy("keep_all", 1.0)
        return make_policy("stream", self._keep_ratio)

    def _choose(
        self,
        policy: KeepPolicy,
        last_kept: LastKept,
        scored: np.ndarray,
        scores: np.ndarray,
        picture: np.ndarray,
        first: bool,
    ) -> np.ndarray:
        if self._cfg.change is not None:
            scores = last_kept.scores(scored)
        cells = policy.select(scores, picture, first)
        last_kept.keep(cells)
        return cells

    def _stem(
        self, pixels: np.ndarray, prev: np.ndarray, first: bool, *, anew: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = {"pixels": pixels}
        if self._cfg.scorer is not None:
            inputs["prev_cells"] = prev
            inputs["is_first"] = np.arange(len(pixels)) == (0 if first else -1)
        if anew:
            whole = whole_frame(self._specs[VIT_STEM_REUSE], inputs)
            out = self._checked(VIT_STEM_REUSE, whole)
        else:
            out = self._checked("vit_stem", inputs)
        if self._cfg.change is not None:
            return out["hidden"], out["scored"], np.ones(self._cells_of(pixels), np.float32)
        if self._cfg.scorer is None:
            cells = np.repeat(prev, len(pixels), 0)
            return out["hidden"], cells, np.ones(cells.shape[:2], np.float32)
        return out["hidden"], out["cells"], out["scores"]

    def _cells_of(self, pixels: np.ndarray) -> tuple[int, int]:
        return len(pixels), self._cfg.vision.num_cells

    def _trunk(self, hidden: np.ndarray, kept: Sequence[np.ndarray]) -> np.ndarray:
        num_cells = self._cfg.vision.num_cells
        idx = np.concatenate([cells + i * num_cells for i, cells in enumerate(kept)])
        frame = np.repeat(np.arange(len(kept)), [len(cells) for cells in kept])
        if not len(idx):
            return np.empty((0, self._cfg.language.width), np.float32)
        inputs = {
            "hidden": hidden,
            "cell_idx": idx.astype(np.int32),
            "frame_id": frame.astype(np.int32),
        }
        return self._checked("vit_trunk", inputs)["features"]

    # ---- language ------------------------------------------------------------------------------

    def _read(
        self,
        clip: Clip,
        kept: Sequence[np.ndarray],
        features: Sequence[np.ndarray],
        at_once: bool,
    ) -> tuple[np.ndarray, Past]:
        """Logits after begin token, frames and question."""
        everything_sees = self._cfg.attention is VisionAttention.ALL
        segments = [(self._embed(self._prompt.bos_ids), np.array([CAUSAL]))]
        for i, (cells, feature) in enumerate(zip(kept, features, strict=True)):
            ids = self._prompt.frame_ids(i / clip.fps, len(cells), first=i == 0)
            embeds = self._embed(ids)
            embeds[ids == self._prompt.patch_id] += feature
            block = np.where(self._prompt.vision_mask(ids), 0 if everything_sees else i, CAUSAL)
            segments.append((embeds, block))
        question = self._prompt.question_ids(QUESTION)
        segments.append((self._embed(question), np.full(len(question), CAUSAL)))
        if at_once:
            embeds, block = (np.concatenate(side) for side in zip(*segments, strict=True))
            segments = [(embeds, block)]
        past = self._new_past()
        for embeds, block in segments:
            logits = self._forward(past, embeds, block)
        return logits, past

    def _answer(
        self,
        kept: Sequence[np.ndarray],
        features: Sequence[np.ndarray],
        logits: np.ndarray,
        past: Past,
        num_tokens: int,
    ) -> PipelineResult:
        first, tokens = logits, []
        for i in range(num_tokens):
            tokens.append(int(logits.argmax()))
            if i + 1 < num_tokens:
                embeds = self._embed(np.array(tokens[-1:]))
                logits = self._forward(past, embeds, np.array([CAUSAL]))
        return PipelineResult(
            kept=tuple(kept),
            features=np.concatenate(features),
            logits=first,
            tokens=tuple(tokens),
        )

    def _new_past(self) -> Past:
        lm, spec = self._cfg.language, self._specs["llm"]
        dtype = next(t.dtype for t in spec.inputs if t.name.startswith("past_"))
        return Past(lm.num_layers, lm.num_kv_heads, lm.head_dim, dtype, self._layout)

    def _forward(self, past: Past, embeds: np.ndarray, block: np.ndarray) -> np.ndarray:
        s, p = len(embeds), past.length
        cos, sin = (table[p:] for table in rope_table(self._cfg.language, p + s))
        name = "llm_decode" if s == 1 and "llm_decode" in self._specs else "llm"
        inputs = {
            "inputs_embeds": embeds.astype(np.float32),
            "cos": cos,
            "sin": sin,
            "last_idx": np.array([s - 1], np.int32),
            **past.inputs(s),
        }
        if any(tensor.name == "mask_rule" for tensor in self._specs[name].inputs):
            inputs["mask_rule"] = block_rule(block)
        else:
            inputs["attn_bias"] = block_bias(block, p)
        out = self._checked(name, inputs)
        past.take(out, s)
        logits: np.ndarray = out["logits"][0]
        return logits

    def _checked(self, name: str, inputs: Arrays) -> Arrays:
        out = self._run(name, inputs)
        for tensor in self._specs[name].outputs:
            array = out[tensor.name]
            if tensor.name.startswith("present_"):
                array = array[:, :, : inputs["attn_bias"].shape[1]]
            if not np.isfinite(array).all():
                remedy = None
                if tensor.dtype == "float16":
                    remedy = "export with base=float32 and without cache=float16"
                raise NonFinite(
                    f"{tensor.name} is not finite on the clip", where=name, remedy=remedy
                )
        return out


def whole_frame(spec: GraphSpec, stem_inputs: Arrays) -> Arrays:
    """What the graph of changed cells is given where every cell of the stem's first frame has
    changed and nothing was kept."""
    pixels_NP = stem_inputs["pixels"][0]
    num_cells = len(pixels_NP) // CELL**2
    inputs = {tensor.name: spec.zeros(tensor, {"M": num_cells}) for tensor in spec.inputs}
    inputs["pixels"] = pixels_NP[cell_table(math.isqrt(num_cells))]
    inputs["cell_idx"] = np.arange(num_cells, dtype=np.int32)
    for name in ("prev_cells", "is_first"):
        if name in inputs:
            inputs[name] = stem_inputs[name][:1]
    return inputs


class Past:
    """Keys and values in either layout; an in-place buffer grows by steps."""

    STEP = 256

    def __init__(
        self, num_layers: int, num_heads: int, head_dim: int, dtype: str, layout: KVLayout
    ) -> None:
        self.length = 0
        self._in_place = layout is KVLayout.HEAD_MAJOR
        shape = (1, num_heads, 0, head_dim) if self._in_place else (0, num_heads, head_dim)
        names = [f"{kind}_{i}" for i in range(num_layers) for kind in ("k", "v")]
        self._tensors = {name: np.zeros(shape, dtype) for name in names}

    def inputs(self, num_new: int) -> Arrays:
        if self._in_place:
            for name, tensor in self._tensors.items():
                lacking = self.length + num_new - tensor.shape[2]
                if lacking > 0:
                    rows = -(-lacking // self.STEP) * self.STEP
                    more = np.zeros((*tensor.shape[:2], rows, tensor.shape[3]), tensor.dtype)
                    self._tensors[name] = np.concatenate([tensor, more], 2)
        return {f"past_{name}": tensor for name, tensor in self._tensors.items()}

    def take(self, outputs: Arrays, num_new: int) -> None:
        for name, tensor in self._tensors.items():
            self._tensors[name] = (
                outputs[f"present_{name}"]
                if self._in_place
                else np.concatenate([tensor, outputs[f"new_{name}"]])
            )
        self.length += num_new


def drawn_clip(image_size: int, num_pictures: int = 3) -> Clip:
    """A square that moves over a slope of grey: the same on every machine, from nothing."""
    y, x = np.mgrid[:image_size, :image_size]
    pictures = []
    for i in range(num_pictures):
        picture = np.stack([x, y, x + y], -1) * (160 / (2 * image_size))
        side = image_size // 4
        left, top = (image_size // 8) * (1 + i), image_size // 3
        picture[top : top + side, left : left + side] = (250, 40 + 60 * i, 20)
        pictures.append(picture.astype(np.uint8))
    return Clip(pictures=pictures)
