"""How much memory a run of the language model takes, and how much there is."""

from __future__ import annotations

from pathlib import Path

from edge_vlm.config import LanguageConfig
from edge_vlm.formats.graph_spec import GraphSpec

QUERIES_AT_ONCE = 64
"""Of a graph that attends in chunks."""
PROGRAM_BYTES = 400_000_000
"""Python, ONNX Runtime and the graphs themselves, without weights."""


def row_bytes(language: LanguageConfig, spec: GraphSpec) -> int:
    """Keys and values of one token in a cache for this graph."""
    kind = next(tensor.dtype for tensor in spec.inputs if tensor.name == "past_k_0")
    size = 2 if kind == "float16" else 4
    return 2 * size * language.num_layers * language.num_kv_heads * language.head_dim


def attends_in_chunks(spec: GraphSpec) -> bool:
    return any(tensor.name == "mask_rule" for tensor in spec.inputs)


def run_bytes(language: LanguageConfig, spec: GraphSpec, new: int, past: int) -> int:
    """What one run holds at its largest besides weights and cache: `new` tokens after `past` ones.

    Three copies of the scores of the queries that are looked at together, of what the MLP widens,
    and of the tokens; measured within 10 % on a CPU from 352 to 2,816 tokens of 4B's width.
    """
    queries = min(new, QUERIES_AT_ONCE) if attends_in_chunks(spec) else new
    scores = language.num_heads * queries * (past + new)
    mask = 0 if attends_in_chunks(spec) else new * (past + new)
    rows = new * (language.mlp_width + language.width)
    return 4 * (3 * (scores + rows) + mask)


def free_memory() -> int | None:
    """Bytes that may still be allocated, on Linux: of the machine, or of this control group."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        found += [int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found) if found else None
