"""The house rules that an import can break, read from the source with `ast`.

1. Every stage may import `edge_vlm`; no stage imports another stage.
2. torch: in edge_vlm only under model/, in the runtime nowhere.
3. An optional library is imported in one module of its package; where a newcomer may lack it
   (the runtime, and edge_vlm outside the model), under a `try` that raises the typed error naming
   the extra.
4. The runtime's rooms import downwards only; those of the session and the protocol do no I/O, use
   no threads and read no clock.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = "edge_vlm"
STAGES = {
    "edge_vlm_calibration": ROOT / "calibration",
    "edge_vlm_export": ROOT / "export",
    "edge_vlm_runtime": ROOT / "runtime",
    "edge_vlm_training": ROOT / "training",
}
RUNTIME = "edge_vlm_runtime"

OPTIONAL = {
    *("PIL", "aiomqtt", "av", "bitsandbytes", "httpx", "llguidance", "mcp", "msgspec", "onnx"),
    *("huggingface_hub", "onnxruntime", "rich", "safetensors", "segno", "tensorrt", "tensorrt_rtx"),
    *("starlette", "tokenizers", "tomli", "transformers", "uvicorn", "websockets"),
}
GUARDED_PACKAGES = (CORE, RUNTIME)
MODEL = "model"  # of edge_vlm: whoever imports it has torch, and with it the extra it came by

# Rooms of the runtime from the ground up: a room imports itself and what stands below it.
FLOORS = (
    {"engines", "protocol"},
    {"inference", "sources"},
    {"session", "client", "alert_sinks"},
    {"engine_thread", "recording", "home_assistant"},
    {"openai", "cameras"},
    {"server"},
    {"evaluation", "demo", "doctor", "mcp", "bench", "planning"},
    {"cli"},
)
PURE_ROOMS = {"session", "protocol"}
IMPURE_LIBRARIES = {"asyncio", "threading", "socket", "selectors", "select", "subprocess", "time"}


@dataclass(frozen=True)
class Import:
    package: str
    module: str  # dotted path below the package, "" for its __init__
    target: str  # absolute dotted name of what is imported
    line: int
    guarded: bool  # inside a try whose handlers name ImportError or ModuleNotFoundError

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.package}.{self.module}:{self.line} imports {self.target}"


@cache
def modules(package: str) -> tuple[tuple[str, ast.Module], ...]:
    return tuple(_parsed(package))


def _parsed(package: str) -> Iterator[tuple[str, ast.Module]]:
    folder = STAGES.get(package, ROOT) / package
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(folder).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(parts), ast.parse(path.read_text(), str(path))


@cache
def imports(package: str) -> tuple[Import, ...]:
    return tuple(
        found
        for module, tree in modules(package)
        for found in _imports_below(package, module, tree, guarded=False)
    )


def _imports_below(package: str, module: str, node: ast.AST, guarded: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(package, module, alias.name, child.lineno, guarded)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{package}.{module}:{child.lineno}: import by full name"
            for alias in child.names:
                target = f"{child.module}.{alias.name}"
                yield Import(package, module, target, child.lineno, guarded)
        elif isinstance(child, ast.Try):
            handled = " ".join(ast.dump(h.type) for h in child.handlers if h.type is not None)
            caught = "ImportError" in handled or "ModuleNotFoundError" in handled
            for statement in child.body:
                yield from _imports_below(
                    package, module, ast.Module([statement], []), guarded or caught
                )
            rest = [*child.handlers, *child.orelse, *child.finalbody]
            for part in rest:
                yield from _imports_below(package, module, part, guarded)
        else:
            yield from _imports_below(package, module, child, guarded)


def test_no_stage_imports_another() -> None:
    wrong = [
        str(found)
        for package in (CORE, *STAGES)
        for found in imports(package)
        if found.library in STAGES and found.library != package
    ]
    assert not wrong, wrong


def test_torch_stays_in_the_model() -> None:
    def allowed(found: Import) -> bool:
        if found.package == CORE:
            return found.module.partition(".")[0] == MODEL
        return found.package != RUNTIME

    wrong = [
        str(found)
        for package in (CORE, *STAGES)
        for found in imports(package)
        if (found.library == "torch" or found.target.startswith("edge_vlm.model"))
        and not allowed(found)
    ]
    assert not wrong, wrong


def test_importing_the_runtime_loads_no_torch() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(STAGES[RUNTIME])!r}]; "
        "import edge_vlm, edge_vlm.cli, edge_vlm_runtime, edge_vlm_runtime.cli.serve; "
        "print([m for m in ('torch', 'onnxruntime', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_each_optional_library_has_one_home() -> None:
    homes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for package in (CORE, *STAGES):
        for found in imports(package):
            if found.library in OPTIONAL:
                homes[package, found.library].add(found.module)
    crowded = {key: places for key, places in homes.items() if len(places) > 1}
    assert not crowded, crowded


def test_optional_libraries_are_guarded() -> None:
    bare = [
        str(found)
        for package in GUARDED_PACKAGES
        for found in imports(package)
        if found.library in OPTIONAL
        and not found.guarded
        and (found.package, found.module.partition(".")[0]) != (CORE, MODEL)
    ]
    assert not bare, bare


def test_runtime_imports_downwards() -> None:
    level = {name: depth for depth, names in enumerate(FLOORS) for name in names}
    wrong = []
    for found in imports(RUNTIME):
        if found.library != RUNTIME or not found.module:
            continue
        source = found.module.partition(".")[0]
        parts = found.target.split(".")
        target = parts[1] if len(parts) > 1 else ""
        assert source in level, f"give {RUNTIME}.{source} a place in FLOORS"
        if target in level and level[target] > level[source]:
            wrong.append(str(found))
    assert not wrong, wrong


def test_session_logic_is_pure() -> None:
    wrong = [
        str(found)
        for found in imports(RUNTIME)
        if found.module.partition(".")[0] in PURE_ROOMS and found.library in IMPURE_LIBRARIES
    ]
    for module, tree in modules(RUNTIME):
        if module.partition(".")[0] in PURE_ROOMS:
            wrong += [
                f"{RUNTIME}.{module}:{node.lineno} opens a file"
                for node in ast.walk(tree)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "open"
            ]
    assert not wrong, wrong
