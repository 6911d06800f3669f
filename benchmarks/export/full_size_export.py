"""`edge-vlm export` at full size: time, memory and files, with weights made up.

    python -m benchmarks.export.full_size_export  # Molmo2-4B, int4, 8 GB of disk
    python -m benchmarks.export.full_size_export --precision fp32  # 20 GB of disk

Runs the command in a process of its own, samples that process's memory, and deletes what it wrote.
Memory is told in two parts: what the process holds itself (anonymous), which has to fit, and pages
of files it has mapped, which the system takes back when it needs the room.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    made_folder,
    result_head,
    script_parser,
    write_result,
)

TOKENIZER = CHECKPOINT / "tokenizer.json"
FIELDS = {"RssAnon": "own", "RssFile": "mapped_files", "VmRSS": "both"}
INTERVAL_S = 0.25


class Memory:
    """Most bytes of each kind that a process was seen to hold."""

    def __init__(self, pid: int) -> None:
        self.most = dict.fromkeys(FIELDS.values(), 0)
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            try:
                text = self._status.read_text()
            except OSError:
                return
            for field, name in FIELDS.items():
                found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
                if found is not None:
                    self.most[name] = max(self.most[name], int(found[1]) * 1024)

    def stop(self) -> dict[str, float]:
        """In GB."""
        self._ended.set()
        self._thread.join()
        return {name: round(size / 1e9, 2) for name, size in self.most.items()}


def run_export(arguments: list[str], limit_s: float) -> dict[str, Any]:
    """What the command printed, and how it went; it is stopped after `limit_s`."""
    code = "import sys; from edge_vlm.cli import main; sys.exit(main(sys.argv[1:]))"
    began, ended_by_us = time.monotonic(), threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    ) as child:
        memory = Memory(child.pid)

        def stop() -> None:
            ended_by_us.set()
            child.terminate()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        assert child.stdout is not None
        lines = []
        for text in child.stdout:
            lines.append(text.rstrip())
            print(lines[-1], flush=True)
        code_of_child = child.wait()
        timer.cancel()
    record: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if ended_by_us.is_set():
        record["stopped_after_s"] = limit_s
    return {**record, "exit_code": code_of_child, "peak_memory_gb": memory.stop(), "printed": lines}


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--shape", default="molmo2_4b")
    parser.add_argument("--precision", default="int4", help="one that needs no footage")
    parser.add_argument("--variant", default="portable")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-minutes", type=float, default=25)
    parser.add_argument("--scratch", type=made_folder, help="folder with room for the bundle")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"export_{args.shape}_{args.precision}.json"
    with tempfile.TemporaryDirectory(prefix="export-", dir=args.scratch) as scratch:
        bundle = Path(scratch) / "bundle"
        command = ["export", "--random-weights", args.shape, "--tokenizer", str(args.tokenizer)]
        command += ["-o", str(bundle), "--precision", args.precision, "--variant", args.variant]
        command += ["--threads", str(args.threads)]
        record = run_export(command, args.limit_minutes * 60)
        files = {
            path.relative_to(bundle).as_posix(): round(path.stat().st_size / 1e6, 1)
            for path in sorted(bundle.rglob("*"))
            if path.is_file() and path.stat().st_size >= 1e6
        }
        record["printed"] = [text.replace(f"{bundle}", "BUNDLE") for text in record["printed"]]
    result = {
        **result_head(__file__, argv, torch.device("cpu")),
        "threads": args.threads,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "shape": args.shape,
        "precision": args.precision,
        "variant": args.variant,
        **record,
        "files_mb": files,
    }
    write_result(out, result)
    return 0 if record["exit_code"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
