"""`python -m edge_vlm` is `edge-vlm`: the form that launchers such as `torchrun -m` take."""

from __future__ import annotations

import sys

from edge_vlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
