"""Calibration: what a checkpoint's scores and activations look like on real footage."""

from __future__ import annotations
