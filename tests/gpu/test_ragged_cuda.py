"""On a GPU: the flash kernel agrees with the other methods, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edge_vlm.model.ragged import Method, best_method
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU that this torch can use"
)
COUNTS = (9, 0, 4, 4, 1, 9)
"""Cells kept of each frame: whole, none, equally many, one."""


def features(model: VideoLM, hidden: Tensor, method: Method) -> Tensor:
    num_cells = model.cfg.vision.num_cells
    cells = [i * num_cells + cell for i, count in enumerate(COUNTS) for cell in range(count)]
    cell_idx = torch.tensor(cells, device=hidden.device)
    return model.vit_trunk(hidden, cell_idx, cell_idx // num_cells, method=method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_flash_kernel_is_the_other_methods(dtype: torch.dtype) -> None:
    assert best_method(torch.device("cuda"), dtype) is Method.VARLEN
    cfg = tiny()
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).cuda()
    shape = (len(COUNTS), cfg.vision.num_patches, cfg.vision.width)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1)).cuda()
    exact = hidden.clone().requires_grad_()
    expected = features(model, exact, Method.GROUPED)
    expected.square().sum().backward()
    assert exact.grad is not None
    model = model.to(dtype)
    for method in Method:
        rounded = hidden.to(dtype).requires_grad_()
        found = features(model, rounded, method)
        found.float().square().sum().backward()
        assert rounded.grad is not None
        for mine, theirs in ((found, expected), (rounded.grad, exact.grad)):
            error = (mine.float() - theirs).norm() / theirs.norm()
            assert error < 0.03, (method, float(error))
