"""Checkpoint in, bundle of ONNX graphs out."""

from __future__ import annotations
