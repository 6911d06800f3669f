"""Other software beside ours, in one run and in turn: what each needs for the same work.

    python -m benchmarks.peers                              # every part that is installed
    python -m benchmarks.peers --parts transformers --frames 4 8
    python -m benchmarks.peers --parts llama.cpp --node-modules DIR

- `transformers`: its Molmo2 and ours with the same made-up weights and the same pictures. A
  question costs it every frame again; a session has them in memory.
- `openvino`: the graphs of one ONNX bundle by ONNX Runtime and by OpenVINO.
- `llama.cpp`: the language model of Molmo2-4B in `--layers` layers at full width, made-up weights
  in four bits and a head of eight, by it (Q4_0, Q8_0) and by our int4 bundle. DIR is where
  `npm install node-llama-cpp@3.21.1` was run, which brings it prebuilt; the Python package `gguf`
  writes its file.

Processor seconds of all threads. A part that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    RESULTS,
    made_folder,
    progress,
    result_head,
    script_parser,
    write_result,
)
from benchmarks.peers import by_llama_cpp, by_openvino, by_transformers
from benchmarks.peers.missing import NotInstalled

PARTS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "transformers": by_transformers.measure,
    "openvino": by_openvino.measure,
    "llama.cpp": by_llama_cpp.measure,
}


def main(argv: list[str] | None = None) -> int:
    """1 when no part could be measured."""
    parser = script_parser(__doc__, RESULTS / "peers.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--frames", nargs="+", type=int, default=[4, 8, 16], metavar="N")
    parser.add_argument("--layers", type=int, default=2, help="of the language model in full width")
    parser.add_argument("--past", nargs="+", type=int, default=[0, 512, 2048], metavar="TOKENS")
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script itself")
    parser.add_argument("--node-modules", type=Path, metavar="DIR", help="where npm installed")
    parser.add_argument("--scratch", type=made_folder, help="folder for bundles, which stay there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        **result_head(__file__, argv, torch.device("cpu")),
        "unit": "processor s",
        "skipped": {},
        "parts": {},
    }
    with ExitStack() as stack:
        scratch = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.mkdir(parents=True, exist_ok=True)
        for name in args.parts:
            progress(f"{name} ...")
            try:
                result["parts"][name] = PARTS[name](args, scratch)
            except NotInstalled as missing:
                progress(f"{name} left out: {missing}")
                result["skipped"][name] = str(missing)
            write_result(args.out, result)  # part by part: what was measured is kept
    return 0 if result["parts"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
