"""What of a record of `edge-vlm eval` is worth keeping: a line of figures a run, no answers.

edge-vlm eval ... --json table.json
python -m benchmarks.summarise table.json benchmarks/results/policies.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FIGURES = (
    *("path", "policy", "keep_ratio", "attention", "kept_percent", "clips", "questions"),
    *("mean_percent", "mean_interval_95", "points_over_keep_all", "points_over_random"),
)


def summary_row(row: Mapping[str, Any]) -> Row:
    """The figures of a run, and of each kind the share right in percent."""
    figures = {name: row[name] for name in FIGURES if name in row}
    return figures | {"kinds": {kind: score["percent"] for kind, score in row["kinds"].items()}}


def summarised(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its rows as a table: `columns` names, `rows` lists of values; null where a
    row has no such figure."""
    rows = [summary_row(row) for row in record["rows"]]
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    table = [
        [*(row.get(name) for name in FIGURES), *(row["kinds"].get(kind) for kind in kinds)]
        for row in rows
    ]
    head = {key: value for key, value in record.items() if key not in ("rows", "wrong")}
    return head | {"columns": [*FIGURES, *kinds], "rows": table}


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows by column, of a summary or of the evaluation's own record."""
    if "columns" not in record:
        return list(record["rows"])
    return [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]


def write_summary(path: Path, record: Mapping[str, Any]) -> None:
    """One line a row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in record["rows"])
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    path.write_text(head.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="what --json wrote")
    parser.add_argument("summary", type=Path, help="file to write")
    args = parser.parse_args(argv)
    write_summary(args.summary, summarised(json.loads(args.table.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
