"""`edge-vlm serve` in this process, whose Python objects are counted meanwhile.

python -m benchmarks.runtime.loads.counted_server FILE SECONDS serve --config edge-vlm.toml

A line of JSON each so many SECONDS: what the garbage collector follows (what is frozen at the start
apart), and how many there are of the most frequent types.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence

from edge_vlm.cli import main as edge_vlm
from edge_vlm_runtime.server import live_view

MOST = 60
MAX_HAPPENED = 50
"""Alerts that are kept: so few that none are added any more when the measurement begins."""


def count(path: str, period_s: float) -> None:
    while True:
        time.sleep(period_s)
        types = Counter(type(each).__qualname__ for each in gc.get_objects())
        line = {
            "at": time.time(),
            "objects": types.total(),
            "whole_collections": gc.get_stats()[2]["collections"],
            "types": dict(types.most_common(MOST)),
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str]) -> int:
    path, seconds, *command = argv
    live_view.MAX_HAPPENED = MAX_HAPPENED
    threading.Thread(target=count, args=(path, float(seconds)), daemon=True).start()
    return edge_vlm(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
