"""What may run a bundle's graphs, by the names used on the command line. Light to import."""

from __future__ import annotations

import argparse
from enum import Enum
from typing import Any


class Backend(str, Enum):
    """`--backend`"""

    ORT = "ort"
    """ONNX Runtime on the CPU."""
    CUDA = "cuda"
    """ONNX Runtime on an NVIDIA GPU; the cache is on the GPU."""
    TRT = "trt"
    """Engines that `edge-vlm build` made, by TensorRT or TensorRT for RTX; the cache is on the
    GPU."""
    OPENVINO = "openvino"
    """OpenVINO on the CPU."""
    AUTO = "auto"
    """ONNX Runtime or OpenVINO, whichever is faster for each graph on this CPU."""

    @property
    def is_on_gpu(self) -> bool:
        return self in (Backend.CUDA, Backend.TRT)


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """For `LoadedBundle.open` and `Server.open`."""
    options: dict[str, Any] = {"backend": Backend(args.backend), "engines": args.engines}
    if getattr(args, "calibration", None) is not None:
        options["calibration"] = args.calibration
    return options
