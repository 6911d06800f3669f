"""A session of the real library leaves nothing in the user's home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import tiny_bundle

OPEN = """
import sys
from edge_vlm_runtime import LoadedBundle
LoadedBundle.open(sys.argv[1], threads=1).close()
"""


def test_the_engines_write_nothing_into_the_home(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run(
        [sys.executable, "-c", OPEN, str(tiny_bundle())], env=environment, check=True, timeout=120
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
