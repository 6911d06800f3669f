"""How an exported language graph attends to its past: four forms of the model's `attend_past`.

Queries of one key-value head are computed as one product instead of repeating the keys, so that a
long past is read once. Graphs have batch 1, and `squeeze` takes it away for nothing: an index
would become a Gather, which copies.

Shape letters: s new tokens, p past tokens, t = p + s, H heads, h key-value heads, g = H / h, d head
width, C rows that an in-place cache has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_vlm.model.llm import KeyValue
from edge_vlm.text.masks import MASKED


def concat_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """Joins past and new keys and values, [1, t, h, d], before the products."""
    assert past is not None
    keys, values = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    weights = (_queries(q, k.shape[2]) @ _columns(keys) + _rows_of(bias, q, k)).softmax(-1)
    return _heads(weights @ _matrix(values), q), (k, v)


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """Joins scores, and splits the weights again: keys and values are never copied."""
    assert past is not None
    queries, p = _queries(q, k.shape[2]), past[0].shape[1]
    scores = torch.cat([queries @ _columns(past[0]), queries @ _columns(k)], -1)
    weights = (scores + _rows_of(bias, q, k)).softmax(-1)
    old, new = weights[..., :p], weights[..., p:]
    return _heads(old @ _matrix(past[1]) + new @ _matrix(v), q), (k, v)


def in_place_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """ONNX Runtime's GroupQueryAttention over a head-major cache [1, h, C, d] that it adds to.

    Outside of an export the same is computed with torch; the returned cache is a copy then.
    """
    assert past is not None
    if torch.compiler.is_exporting():
        return _group_query_attention(q, k, v, bias, past)
    p = bias.shape[-1] - q.shape[1]
    known = tuple(buffer[:, :, :p].transpose(1, 2) for buffer in past)
    out, _ = concat_attention(q, k, v, bias, (known[0], known[1]))
    present = tuple(buffer.clone() for buffer in past)
    for buffer, new in zip(present, (k, v), strict=True):
        buffer[:, :, p : p + new.shape[1]] = new.transpose(1, 2)
    return out, (present[0], present[1])


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """As `split_attention` for a few queries at a time, so that scores never are [s, t].

    `rule`: i32 [2, s], see `edge_vlm.text.masks.Rule`. In an export it is one node, which
    `trace.chunks` replaces by a loop; outside of one it is computed at once.
    """
    assert past is not None
    if not torch.compiler.is_exporting():
        return split_attention(q, k, v, _bias_of(rule, past[0].shape[1])[None], past)
    out = torch.onnx.ops.symbolic(
        CHUNKED_ATTENTION,
        [*(x.squeeze(0) for x in (q, k, v, past[0], past[1])), rule],
        {"num_heads": q.shape[2], "kv_num_heads": k.shape[2], "head_dim": q.shape[3]},
        dtype=q.dtype,
        shape=q.shape[1:],
        version=1,
    )
    return out[None], (k, v)


CHUNKED_ATTENTION = "edge_vlm::ChunkedAttention"


def _bias_of(rule_2s: Tensor, num_past: int) -> Tensor:
    """f32 [s, p + s]"""
    first, blocks = rule_2s[:, :, None]
    places = torch.arange(rule_2s.shape[1])
    visible = (first <= places) & (places <= places[:, None])
    visible |= (blocks == rule_2s[1]) & (blocks >= 0)
    bias = torch.where(visible, 0.0, MASKED)
    return torch.nn.functional.pad(bias, (num_past, 0))


def _group_query_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, past: KeyValue
) -> tuple[Tensor, KeyValue]:
    symbolic, symbolic_multi_out = torch.onnx.ops.symbolic, torch.onnx.ops.symbolic_multi_out
    total_1 = symbolic(
        "Shape", [bias], {"start": 2, "end": 3}, dtype=torch.int64, shape=[1], version=20
    ).to(torch.int32)
    # `causal` is off because tokens of one frame see each other both ways: the bias is the mask.
    out, keys, values = symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [q.flatten(2), k.flatten(2), v.flatten(2), past[0], past[1], total_1 - 1, total_1[0]]
        + [None] * 3
        + [bias[:, None]],
        {"num_heads": q.shape[2], "kv_num_heads": k.shape[2], "causal": 0},
        dtypes=[q.dtype, k.dtype, v.dtype],
        shapes=[q.flatten(2).shape, past[0].shape, past[1].shape],
        version=1,
    )
    return out.unflatten(2, (q.shape[2], q.shape[3])), (keys, values)


def _queries(q_1sHd: Tensor, num_kv_heads: int) -> Tensor:
    """[h, g s, d], scaled; heads of one group stand together, as the model repeats its keys."""
    scaled = q_1sHd.squeeze(0) * q_1sHd.shape[-1] ** -0.5
    out: Tensor = scaled.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    return out


def _columns(keys_1thd: Tensor) -> Tensor:
    """[h, d, t]"""
    return keys_1thd.squeeze(0).permute(1, 2, 0)


def _matrix(values_1thd: Tensor) -> Tensor:
    """[h, t, d]"""
    return values_1thd.squeeze(0).permute(1, 0, 2)


def _rows_of(bias_1st: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask for every head of a group: [g s, t]."""
    group = q.shape[2] // k.shape[2]
    bias = bias_1st.squeeze(0)
    return bias if group == 1 else bias.repeat(group, 1)


def _heads(out_hrd: Tensor, q_1sHd: Tensor) -> Tensor:
    """[h, g s, d] -> [1, s, H, d]"""
    h, _, d = out_hrd.shape
    group = q_1sHd.shape[2] // h
    out: Tensor = out_hrd.unflatten(1, (group, -1)).permute(2, 0, 1, 3).reshape(1, -1, h * group, d)
    return out
