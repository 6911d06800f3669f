"""Draws the log of a training on rendered clips: what it got right over the minutes, as PNG.

    python -m benchmarks.training.training_curves run/log.jsonl docs/images/demo_training.png

Needs matplotlib (`pip install 'edge-vlm[figures]'`). Accuracies are the log's running means,
smoothed over some minutes: harder clips come with the later stages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError, MissingExtraError

SMOOTHED = 11
"""Lines of the log in a running mean."""
PROBES = {
    "kind": "kind of a cell",
    "heading": "heading",
    "appeared": "time of appearance",
    "counted": "number of things",
    "colours": "all colours there",
    "last": "what was there last",
    "gone": "whether it is gone",
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines with accuracies. Raises ConfigError for a file that has none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"not a training's log: {error}", where=path) from error
    found = [line for line in lines if "accuracy" in line]
    if not found:
        raise ConfigError("no line of the log has accuracies", where=path)
    return found


def smooth(values: Sequence[float]) -> list[float]:
    """Means over `SMOOTHED` neighbours, fewer at the ends."""
    half = SMOOTHED // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(log: list[dict[str, Any]], out: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.for_library("matplotlib", "figures") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [line["minutes"] for line in log]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    left.plot(minutes, smooth([line["answer_loss"] for line in log]), color="black")
    left.set(title="loss of the answers", yscale="log")
    for kind in log[-1]["accuracy"]:
        right_share = [100 * line["accuracy"][kind] for line in log]
        middle.plot(minutes, smooth(right_share), label=kind)
    middle.set(title="questions, % right", ylim=(0, 100))
    for name, label in PROBES.items():
        if name in log[-1]:  # a probe may have joined a run on its way
            known = smooth([100 * line.get(name, math.nan) for line in log])
            right.plot(minutes, known, label=label)
    right.set(title="probes, % right", ylim=(0, 100))
    for panel in (middle, right):
        panel.legend(fontsize="small", loc="lower right")
    for panel in (left, middle, right):
        panel.set_xlabel("minutes")
        panel.grid(alpha=0.3)
        for before, line in itertools.pairwise(log):
            if before["stage"] != line["stage"]:
                panel.axvline(line["minutes"], color="grey", linestyle=":", linewidth=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a run's folder")
    parser.add_argument("out", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    draw(read_log(args.log), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
