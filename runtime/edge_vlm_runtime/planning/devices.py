"""Devices by name: what their makers publish. Dense rates, not those with 2:4 sparsity."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from edge_vlm.errors import ConfigError

THIS = "this"
MATRIX_SHARE = 0.47
"""Of the dense peak that matrix products of this size reach: NVIDIA's published Edge-LLM runs of
Qwen3 on Orin, and the same ratio on an H200."""
READ_SHARE = 0.7
"""Of the bandwidth that reading weights reaches: int4 Qwen3-4B decodes at 50.7 tokens/s on an AGX
Orin whose bandwidth would allow 69 (73 %); expect 60 to 80 %."""
KERNEL_US = 5.0
"""To start a kernel; assumed, not measured."""
RESERVED_GB = 1.0
"""Driver, context and desktop; assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    label: str
    memory_gb: float
    is_unified: bool
    """One memory for processor and GPU."""
    bandwidth_gb_s: float
    fp16_tflop_s: float
    """Dense, sums in fp32 where the maker tells them apart."""
    int8_tflop_s: float
    """Dense, operations a second as 10^12."""
    watts: float
    """Board power at the mode that these figures belong to."""
    source: str

    @property
    def usable_gb(self) -> float:
        return self.memory_gb - RESERVED_GB


DEVICES = (
    # 1024 cores, 32 tensor cores at 1020 MHz: 1024 x 16 x 1.02 GHz = 16.7 TFLOP/s.
    Device(
        name="orin-nano",
        label="Jetson Orin Nano 8 GB, Super mode (25 W)",
        memory_gb=8,
        is_unified=True,
        bandwidth_gb_s=102,
        fp16_tflop_s=17,
        int8_tflop_s=33,
        watts=25,
        source="NVIDIA, Jetson Orin Nano Super developer kit: 67 sparse INT8 TOPS, 102 GB/s",
    ),
    # As the Nano, at 1173 MHz; the rest of its 157 TOPS are the two DLA, which are not used.
    Device(
        name="orin-nx",
        label="Jetson Orin NX 16 GB, Super mode (40 W)",
        memory_gb=16,
        is_unified=True,
        bandwidth_gb_s=102.4,
        fp16_tflop_s=19.2,
        int8_tflop_s=38.4,
        watts=40,
        source="NVIDIA, Jetson Orin NX series data sheet: 1024 cores, 1173 MHz, 102.4 GB/s",
    ),
    # 170 of its 275 sparse INT8 TOPS are the GPU's: 85 dense, half of it in fp16.
    Device(
        name="orin-agx",
        label="Jetson AGX Orin 64 GB (60 W)",
        memory_gb=64,
        is_unified=True,
        bandwidth_gb_s=204.8,
        fp16_tflop_s=42.5,
        int8_tflop_s=85,
        watts=60,
        source="NVIDIA, Jetson AGX Orin series data sheet: 170 sparse INT8 TOPS of the GPU",
    ),
    # 20 multiprocessors x 65,536 operations x 1.57 GHz = 2.06 sparse FP4 PFLOP/s.
    Device(
        name="thor",
        label="Jetson Thor T5000 128 GB (130 W)",
        memory_gb=128,
        is_unified=True,
        bandwidth_gb_s=273,
        fp16_tflop_s=257,
        int8_tflop_s=515,
        watts=130,
        source="NVIDIA, Jetson Thor series data sheet: 2070 sparse FP4 TFLOP/s, 273 GB/s",
    ),
    Device(
        name="rtx4090",
        label="GeForce RTX 4090 24 GB",
        memory_gb=24,
        is_unified=False,
        bandwidth_gb_s=1008,
        fp16_tflop_s=165,
        int8_tflop_s=661,
        watts=450,
        source="NVIDIA, Ada GPU architecture whitepaper, table of the RTX 4090",
    ),
    Device(
        name="rtx5090",
        label="GeForce RTX 5090 32 GB",
        memory_gb=32,
        is_unified=False,
        bandwidth_gb_s=1792,
        fp16_tflop_s=209.5,
        int8_tflop_s=838,
        watts=575,
        source="NVIDIA, RTX Blackwell GPU architecture whitepaper, table of the RTX 5090",
    ),
    Device(
        name="h200",
        label="H200 SXM 141 GB",
        memory_gb=141,
        is_unified=False,
        bandwidth_gb_s=4800,
        fp16_tflop_s=989,
        int8_tflop_s=1979,
        watts=700,
        source="NVIDIA, H200 data sheet: 1,979 sparse FP16 TFLOP/s, 4.8 TB/s",
    ),
)
NAMES = (*(device.name for device in DEVICES), THIS)


def device_named(name: str) -> Device:
    """Raises ConfigError naming the nearest."""
    for device in DEVICES:
        if device.name == name:
            return device
    near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"unknown device {name!r}", remedy=f"{hint}one of {', '.join(NAMES)}")


def device_called(gpu: str) -> Device | None:
    """The one whose GPU calls itself so, as "NVIDIA H200"."""
    words = gpu.lower().replace(" ", "")
    return next((device for device in DEVICES if device.name in words), None)
