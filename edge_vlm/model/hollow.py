"""A model of names and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from edge_vlm.config import ModelConfig
from edge_vlm.model.video_lm import VideoLM


def hollow(cfg: ModelConfig) -> VideoLM:
    """A model whose parameters are on the meta device; the buffer that is computed is real."""
    with torch.device("meta"), _Unfilled():
        return VideoLM(cfg)


class _Unfilled(TorchFunctionMode):
    """Parameters are not filled with random numbers: on the meta device that changes nothing, but
    torch loads its compiler to do it, which takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return named["tensor"] if "tensor" in named else args[0]
        if func is torch.arange:
            named["device"] = "cpu"
        return func(*args, **named)
