"""What runs a graph. A backend runs tensors and nothing else."""

from __future__ import annotations
