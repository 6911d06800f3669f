"""Calibration of precision and thresholds from real footage; the fp32 bundle needs none."""

from __future__ import annotations
