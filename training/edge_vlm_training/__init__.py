"""The rendered world and the code that trains and measures a model on it."""

from __future__ import annotations
