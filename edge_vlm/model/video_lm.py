"""The whole model: frames in, kept cells' features, language model states out.

The methods are the cuts at which the model is exported: `vit_stem` (with the scorer and the biased
block), selection by the caller, `vit_trunk` (with the connector), `llm`.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells over all frames, D ViT
width, E language width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edge_vlm.config import CELL, ConnectorConfig, ModelConfig
from edge_vlm.model.layers import CellPooler, SwiGLU
from edge_vlm.model.llm import LanguageModel
from edge_vlm.model.ragged import Layout, Method, lay_out
from edge_vlm.model.scorer import TokenScorer
from edge_vlm.model.vit import VisionTransformer


class Connector(nn.Module):
    """Pools the patches of a window (a cell's nine, an image token's four) and projects them to
    the language model's width."""

    def __init__(self, cfg: ConnectorConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.pool = CellPooler(in_width, cfg.num_heads, cfg.head_dim, cfg.width)
        self.project = SwiGLU(cfg.width, cfg.mlp_width, out_width)

    def forward(self, patches_GWD: Tensor, valid_GW: Tensor | None = None) -> Tensor:
        """[G, W, 2 D] -> [G, E] for windows of any size; `valid` (bool) marks real patches."""
        out: Tensor = self.project(self.pool(patches_GWD, valid_GW))
        return out


class VideoLM(nn.Module):
    """Molmo2 with STTS pruning, at any size (`edge_vlm.config`)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        vision = cfg.vision
        self.vit = VisionTransformer(vision)
        self.scorer = None if cfg.scorer is None else TokenScorer(cfg.scorer, vision.width)
        in_width = vision.width * len(vision.feature_layers)
        self.connector = Connector(cfg.connector, in_width, cfg.language.width)
        self.llm = LanguageModel(cfg.language)

    def init_weights(self, generator: torch.Generator | None = None) -> VideoLM:
        """Truncated normal with std sqrt(1 / fan in), zero biases (as the STTS scorer is set up).

        Layers that write into a residual stream start smaller by sqrt(2 blocks), so that the stream
        keeps its size however many blocks add to it.
        """
        depth = {}
        for blocks in (self.vit.blocks, self.llm.blocks):
            for name, module in blocks.named_modules():
                if name.endswith(("attn.o", "fc2", "mlp.down")):
                    depth[module] = math.sqrt(2 * len(blocks))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features) / depth.get(module, 1.0)
                nn.init.trunc_normal_(module.weight, 0, std, -3 * std, 3 * std, generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, 0, 0.02, generator)
        nn.init.normal_(self.vit.pos_embed, 0, 0.02, generator)
        return self

    @property
    def trunk_start(self) -> int:
        """First block that sees only kept cells; all of them are kept without scores."""
        return self.cfg.whole_blocks

    def vit_stem(
        self, pixels_FNP: Tensor, prev_cells_1CD: Tensor, is_first_F: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores every cell of consecutive frames and runs all blocks before the drop.

        Frame i's previous cells are frame i-1's; `prev_cells` [1, C, D] continues an earlier call;
        frames with `is_first` (bool [F]) start a clip. Returns `hidden` [F, N, D] after the biased
        block, `cells` [F, C, D] for the next call and fp32 `scores` [F, C].
        """
        x = self.embed_frames(pixels_FNP)
        cells, scores = self.score_frames(x, prev_cells_1CD, is_first_F)
        return self.biased_block(x, scores, is_first_F), cells, scores

    def embed_frames(self, pixels_FNP: Tensor) -> Tensor:
        """What is scored, [F, N, D]: the output of block `scored_after`; without scores that of no
        block at all."""
        x: Tensor = self.vit.embed(pixels_FNP)
        last = self.cfg.scored_after
        for block in self.vit.blocks[: 0 if last is None else last + 1]:
            x = block(x)
        return x

    def change_stem(self, pixels_FNP: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks before the drop, for a model that is scored by change: `hidden` behind them
        and what is scored, one block earlier; both [F, N, D]."""
        assert self.cfg.change is not None
        scored = self.embed_frames(pixels_FNP)
        hidden: Tensor = self.vit.blocks[self.cfg.change.after_block + 1](scored)
        return hidden, scored

    def score_by_change(self, after_block: int | None = None) -> None:
        """From now on without its own scorer, if any: see `ModelConfig.scored_by_change`."""
        self.cfg, self.scorer = self.cfg.scored_by_change(after_block), None

    def score_frames(
        self, x_FND: Tensor, prev_cells_1CD: Tensor, is_first_F: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pooled cells [F, C, D] and scores [F, C]; arguments as in `vit_stem`."""
        assert self.scorer is not None
        cells = self.scorer.pool_cells(self.vit.cells(x_FND))
        prev = torch.cat([prev_cells_1CD, cells[:-1]])
        prev = torch.where(is_first_F[:, None, None], torch.zeros_like(prev), prev)
        return cells, self.scorer(prev, cells)

    def biased_block(self, x_FND: Tensor, scores_FC: Tensor, is_first_F: Tensor) -> Tensor:
        """Block `prune_at + 1`: all patches take part, low-scored ones as weak keys."""
        assert self.scorer is not None
        bias = self.vit.spread(self.scorer.key_bias(scores_FC, is_first_F))
        out: Tensor = self.vit.blocks[self.scorer.cfg.prune_at + 1](x_FND, bias)
        return out

    def vit_trunk(
        self,
        hidden_FND: Tensor,
        cell_idx_G: Tensor,
        frame_id_G: Tensor,
        *,
        method: Method | None = None,
    ) -> Tensor:
        """Runs the remaining blocks and the connector on kept cells only: features [G, E].

        `cell_idx` = frame * C + cell, ascending; `frame_id` is the frame of each. All methods of
        keeping frames apart give the same result; by default the fastest one is taken.
        """
        layout = self.lay_out(frame_id_G, hidden_FND, method)
        patches = self.vit.cells(hidden_FND).flatten(0, 1)
        return layout.restore(self._trunk(patches[layout.arrange(cell_idx_G)], layout))

    def lay_out(
        self, frame_id_G: Tensor, hidden_FND: Tensor, method: Method | None = None
    ) -> Layout:
        """How the patches of cells [G] of these frames are laid out for the remaining blocks."""
        return lay_out(
            frame_id_G,
            num_frames=hidden_FND.shape[0],
            num_cells=self.cfg.vision.num_cells,
            tokens_per_cell=CELL * CELL,
            dtype=hidden_FND.dtype,
            method=method,
        )

    def _trunk(self, patches_G9D: Tensor, layout: Layout) -> Tensor:
        x = patches_G9D.flatten(0, 1)
        taps = {self.trunk_start - 1: x}
        for i in range(self.trunk_start, self.cfg.vision.num_layers):
            x = self.vit.block(i).forward_ragged(x, layout)
            if i in self.cfg.vision.feature_layers:  # the others' outputs need not be held
                taps[i] = x
        joined = torch.cat([taps[i] for i in self.cfg.vision.feature_layers], -1)
        out: Tensor = self.connector(joined.unflatten(0, (-1, CELL * CELL)))
        return out
