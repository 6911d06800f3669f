"""How fast a run is, against what its device could do.

Model FLOP utilisation counts the matrix products that the step needs: forward once and backward
twice that, on the cells that were kept; recomputation is not work done (arXiv 2204.02311).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from edge_vlm.config import ModelConfig
from edge_vlm.flops import language_flops, vision_flops

_KNOWN_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.2,
    "A10": 125.0,
    "Orin": 43.0,
}
"""Dense bfloat16, as the vendor states it."""


def training_flops(
    cfg: ModelConfig,
    kept_F: Sequence[int],
    row_tokens: Sequence[int],
    num_trained: int,
    *,
    frozen: bool = False,
) -> float:
    """Forward and backward pass of a batch; `row_tokens` are the lengths of its rows.

    With `frozen` matrices there are no gradients of them, which are half of the backward pass;
    what adapters and scorer add is not counted.
    """
    forward = float(vision_flops(cfg, kept_F))
    forward += sum(language_flops(cfg.language, tokens) for tokens in row_tokens)
    forward += 2.0 * num_trained * cfg.language.width * cfg.language.base_vocab
    return (2 if frozen else 3) * forward


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device can do: known for common GPUs in bfloat16, else measured on one product."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, value in _KNOWN_TFLOPS.items():
            if known in name:
                return value
    side = 4096 if device.type == "cuda" else 1024
    best = float("inf")
    # Not every CPU is faster in bfloat16: the better of both is what it can do.
    for kind in {dtype, torch.float32}:
        a = torch.ones(side, side, dtype=kind, device=device)
        for _ in range(10):
            start = time.perf_counter()
            b = a @ a
            b[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12
