"""All methods of keeping frames apart compute the attention of each frame alone."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from edge_vlm.model.ragged import Grouped, Method, Varlen, best_method, lay_out

CELLS, TOKENS, HEADS, WIDTH = 5, 2, 3, 4


def frame_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over one frame [n, H, d], written out."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flash_on_a_cpu(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """What the flash kernel promises; it has no CPU form."""
    assert torch.equal(ends_q, ends_k)
    assert ends_q.dtype == torch.int32
    ends = ends_q.tolist()
    assert ends[0] == 0
    assert ends[-1] == len(q)
    parts = []
    for start, stop in itertools.pairwise(ends):
        assert 0 <= stop - start <= min(longest_q, longest_k)
        parts.append(frame_alone(q[start:stop], k[start:stop], v[start:stop]))
    return torch.cat(parts)


def attention(counts: list[int], method: Method, qkv_PHd: list[Tensor]) -> Tensor:
    """Through the layout and back: cells of `TOKENS` tokens, in frame order on both sides."""
    frame_id = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    layout = lay_out(
        frame_id,
        num_frames=len(counts),
        num_cells=CELLS,
        tokens_per_cell=TOKENS,
        dtype=torch.float32,
        method=method,
    )
    cells = [layout.arrange(x.unflatten(0, (-1, TOKENS))).flatten(0, 1) for x in qkv_PHd]
    return layout.restore(layout.attend(*cells).unflatten(0, (-1, TOKENS))).flatten(0, 1)


@settings(max_examples=30)
@given(st.lists(st.integers(0, CELLS), min_size=1, max_size=7), st.integers(0, 99))
def test_every_method_is_each_frame_alone(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(counts) * TOKENS, HEADS, WIDTH)
    qkv = [torch.randn(shape, generator=generator) for _ in range(3)]
    sizes = [count * TOKENS for count in counts]
    frames = zip(*(x.split(sizes) for x in qkv), strict=True)
    expected = torch.cat([frame_alone(*frame) for frame in frames])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", flash_on_a_cpu)
        for method in Method:
            for gradients in (False, True):  # two forms of the CPU's attention
                with torch.set_grad_enabled(gradients):
                    torch.testing.assert_close(attention(counts, method, qkv), expected)


def test_frames_of_equal_length_share_a_batch() -> None:
    frame_id = torch.tensor([0, 0, 1, 2, 2, 4])
    layout = lay_out(
        frame_id,
        num_frames=5,
        num_cells=CELLS,
        tokens_per_cell=TOKENS,
        dtype=torch.float32,
        method=Method.GROUPED,
    )
    assert isinstance(layout, Grouped)
    assert layout.groups == ((2, 2), (2, 4))
    assert layout.arrange(frame_id).tolist() == [1, 4, 0, 0, 2, 2]


def test_the_flash_kernel_is_told_where_frames_end_without_asking_the_device() -> None:
    layout = lay_out(
        torch.tensor([0, 0, 2]),
        num_frames=4,
        num_cells=CELLS,
        tokens_per_cell=TOKENS,
        dtype=torch.bfloat16,
        method=Method.VARLEN,
    )
    assert isinstance(layout, Varlen)
    assert layout.ends.tolist() == [0, 4, 4, 6, 6]
    assert layout.longest == CELLS * TOKENS


def test_the_fastest_method_of_the_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert best_method(cpu, torch.bfloat16) is Method.GROUPED
    assert best_method(cuda, torch.bfloat16) is Method.VARLEN
    assert best_method(cuda, torch.float16) is Method.VARLEN
    assert best_method(cuda, torch.float32) is Method.GROUPED  # the flash kernel has no fp32
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert best_method(cuda, torch.bfloat16) is Method.GROUPED  # an older torch
