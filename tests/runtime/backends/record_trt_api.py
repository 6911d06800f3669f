"""Writes tests/data/trt_api.json: which names each release of TensorRT has in Python.

    python tests/runtime/backends/record_trt_api.py tensorrt-cu12-bindings==10.3.0 \\
        tensorrt-cu13-bindings==11.4.0.106 tensorrt-rtx-cu13-bindings==1.7.1.116

The names come from NVIDIA's own bindings, in wheels that the Python package index has; it has no
libraries for them. Importing bindings calls nothing, so empty libraries with the few symbols they
ask for are enough (gcc and nm make and name them), and only class attributes are read. A name with
() is a method or a class, one without is a property or a value.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parents[2] / "data" / "trt_api.json"
CLASSES = (
    *("Builder", "BuilderFlag", "ComputeCapability", "DataType", "ErrorCode", "IBuilderConfig"),
    *("ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger", "INetworkDefinition"),
    *("IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "MemoryPoolType"),
    *("NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime"),
)
READ = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
print(json.dumps({
    name: sorted(
        n + "()" * callable(getattr(getattr(module, name), n))
        for n in dir(getattr(module, name)) if n[0] != "_"
    )
    for name in sys.argv[2:] if hasattr(module, name)
}))
"""


def record(requirement: str) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, requirement], check=True)
        (binary,) = Path(folder).glob("*_bindings/tensorrt*.so")
        needed = subprocess.run(
            ["readelf", "-d", binary], capture_output=True, text=True, check=True
        ).stdout
        symbols = subprocess.run(
            ["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True
        ).stdout
        wanted = re.findall(r" U ((?:create|get|init)(?:Infer|Nv|Lib|Builder|Plugin)\w*)", symbols)
        source = Path(folder) / "empty.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
        for library in re.findall(r"\[(lib(?:nv|tensorrt)[^\]]*)\]", needed):
            target = binary.parent / library
            soname = f"-Wl,-soname,{library}"
            command = ["gcc", "-shared", "-fPIC", "-o", target, soname, source]
            subprocess.run(command, check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": folder,
            "LD_LIBRARY_PATH": str(binary.parent),
        }
        output = subprocess.run(
            [sys.executable, "-c", READ, binary.parent.name, *CLASSES],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    names: dict[str, list[str]] = json.loads(output)
    return names


if __name__ == "__main__":
    recorded = {requirement: record(requirement) for requirement in sys.argv[1:]}
    TARGET.write_text(json.dumps(recorded, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    for requirement, names in recorded.items():
        print(f"{requirement}: {sum(map(len, names.values()))} names of {len(names)} classes")
