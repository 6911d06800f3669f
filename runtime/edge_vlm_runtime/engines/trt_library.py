"""TensorRT, or TensorRT for RTX: the one module that imports either.

Both have the same class names. What is used of them is the part that 10.3, 10.13 to 10.16 and 11.x
share; a test drives all of it against recorded API lists.
"""

from __future__ import annotations

import platform
import re
from collections import deque
from functools import cache
from typing import Any

from edge_vlm.errors import ConfigError, TrtMissing

LIBRARIES = ("tensorrt", "tensorrt_rtx")
"""In the order in which they are tried."""
OLDEST = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 4)}
KEPT_MESSAGES = 200


class TrtLibrary:
    """An imported library and the logger it keeps for the life of the process.

    Both libraries keep the first logger they are given and ignore later ones, so there is one, and
    operations read what it collected: `clear` before, `messages` after.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module
        self.version = str(module.__version__)
        self._messages: deque[tuple[str, str]] = deque(maxlen=KEPT_MESSAGES)
        self.logger = _logger(module, self._messages)

    def clear(self) -> None:
        self._messages.clear()

    def messages(self, *severities: str) -> list[str]:
        """What was logged since `clear` as "ERROR", "INTERNAL_ERROR" or "WARNING"."""
        return [text for severity, text in list(self._messages) if severity in severities]

    def profiler(self) -> tuple[Any, list[tuple[str, float]]]:
        """What an execution context reports to, and the list that it fills: name and milliseconds
        of each layer, run after run."""
        return _profiler(self.module)

    @property
    def errors(self) -> list[str]:
        return self.messages("ERROR", "INTERNAL_ERROR")


@cache
def load_library(name: str | None = None) -> TrtLibrary:
    """The library of that name, or the first of LIBRARIES that is there.

    Raises TrtMissing (not installed, a stub, or too old), ConfigError for another name.
    """
    if name is None:
        reasons = []
        for candidate in LIBRARIES:
            try:
                return load_library(candidate)
            except TrtMissing as error:
                reasons.append(error.what)
        raise TrtMissing(", and ".join(reasons), remedy=_remedy())
    if name not in LIBRARIES:
        raise ConfigError(f"no TensorRT library {name!r}", remedy=f"one of {', '.join(LIBRARIES)}")
    module = _import(name)
    if not all(hasattr(module, needed) for needed in ("Builder", "OnnxParser", "Runtime")):
        raise TrtMissing(
            f"{name} is here but is not the full library (a stub, or the lean runtime)",
            where=getattr(module, "__file__", None),
            remedy=_remedy(),
        )
    if _release(module) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        raise TrtMissing(
            f"{name} {module.__version__} is too old", remedy=f"need {oldest} or later"
        )
    return TrtLibrary(name, module)


def _import(name: str) -> Any:
    try:
        if name == "tensorrt":
            import tensorrt as module
        else:
            import tensorrt_rtx as module
    except (ImportError, OSError) as error:  # OSError: a shared library of it is not there
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise TrtMissing(f"{name} is not installed", remedy=_remedy()) from error
        raise TrtMissing(f"{name} cannot be loaded: {error}", remedy=_remedy()) from error
    return module


def _release(module: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(module.__version__))[:2])


def _remedy() -> str:
    if platform.machine() == "aarch64":
        return "on a Jetson: sudo apt install python3-libnvinfer, and a venv that sees it"
    return (
        "for RTX cards: pip install 'edge-vlm[trt-rtx]'; else pip install tensorrt "
        "--extra-index-url https://pypi.nvidia.com"
    )


def _profiler(module: Any) -> tuple[Any, list[tuple[str, float]]]:
    layers: list[tuple[str, float]] = []

    class Profiler(module.IProfiler):
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            layers.append((layer_name, ms))

    return Profiler(), layers


def _logger(module: Any, messages: deque[tuple[str, str]]) -> Any:
    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = str(severity).rpartition(".")[2]
            if name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                messages.append((name, msg))

    return Logger()
