"""A TensorRT module with exactly the names one release has, and just enough behaviour.

Every public attribute that is read or set must be in tests/data/trt_api.json for that release;
anything else is an AttributeError, as it would be there.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm_runtime.engines.compile import DTYPES
from edge_vlm_runtime.engines.cuda import Gpu
from edge_vlm_runtime.engines.trt import ALIGNMENT
from edge_vlm_runtime.engines.trt_library import TrtLibrary
from edge_vlm_runtime.engines.trt_profiles import profiles_of

API: dict[str, dict[str, list[str]]] = json.loads(
    (Path(__file__).parents[2] / "data" / "trt_api.json").read_text()
)
Arrays = dict[str, np.ndarray]
Compute = Callable[[Arrays], Arrays]
ENUMS = (
    *("ComputeCapability", "DataType", "ErrorCode", "MemoryPoolType"),
    "NetworkDefinitionCreationFlag",
)


def _strict(names: list[str], behaviour: dict[str, Any]) -> type:
    """A class with the part of `behaviour` that `names` has; recorded properties are settable."""
    methods = {name[:-2] for name in names if name.endswith("()")}
    allowed = frozenset(names) - {name + "()" for name in methods}

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in allowed:
            raise AttributeError(f"this release has no attribute {name}")
        object.__setattr__(self, name, value)

    kept = {n: value for n, value in behaviour.items() if n[0] == "_" or n in allowed | methods}
    for name, value in kept.items():
        assert name[0] == "_" or callable(value) == (name in methods), f"{name} is of another kind"
    return type("Strict", (), {**kept, "__setattr__": __setattr__})


class FakeTrt:
    """`library` is what the code under test gets. Graphs are "parsed" from `spec`.

    `engines` says what the bytes of an engine file are: a graph, and how it computes. Any other
    bytes are an engine of `spec` whose every output is the sum of all inputs, in each element.
    """

    def __init__(self, release: str, spec: GraphSpec) -> None:
        self.api = API[release]
        self.spec = spec
        self.build_result: bytes | None = b"engine"
        self.accepts_cache = True
        self.caches: list[bytes] = []
        self.parse_errors: list[Any] = []
        self.says: list[tuple[str, str]] = []
        self.flags: int | None = None
        self.config: Any = None
        self.profiles: list[dict[str, Any]] = []
        self.profile_runs: list[int] = []
        self.device_memory = 1000
        self.refuses_engine = False
        self.engines: dict[bytes, tuple[GraphSpec, Compute]] = {}
        version = release.partition("==")[2]
        module = SimpleNamespace(__version__=version, ILogger=object, IProgressMonitor=object)
        for name in ENUMS:
            if name in self.api:
                values = {n: i for i, n in enumerate(self.api[name]) if n.isupper()}
                setattr(module, name, SimpleNamespace(**values))
        self.module = module
        self._classes()
        name = "tensorrt_rtx" if "rtx" in release else "tensorrt"
        self.library = TrtLibrary(name, module)

    def _class(self, name: str, **behaviour: Any) -> Callable[..., Any]:
        return _strict(self.api[name], behaviour)

    def _log(self) -> None:
        for severity, text in self.says:
            self.library.logger.log(f"Severity.{severity}", text)

    def _classes(self) -> None:
        fake, module, spec = self, self.module, self.spec

        def tensors(side: Any) -> list[Any]:
            made = []
            for tensor in side:
                item = tensor_class()
                item.name, item.dtype = tensor.name, getattr(module.DataType, DTYPES[tensor.dtype])
                made.append(item)
            return made

        def build(self: Any, network: Any, config: Any) -> bytes | None:
            fake._log()
            config.progress_monitor.phase_start("Building", None, 2)
            assert config.progress_monitor.step_complete("Building", 0)
            config.progress_monitor.phase_finish("Building")
            return fake.build_result

        def create_network(self: Any, flags: int) -> Any:
            fake.flags = flags
            return network_class()

        def create_config(self: Any) -> Any:
            fake.config = config_class()
            return fake.config

        def add_profile(self: Any, profile: Any) -> int:
            fake.profiles.append(profile._shapes)
            return len(fake.profiles) - 1

        def parse(self: Any, path: str) -> bool:
            return not fake.parse_errors

        def make_cache(self: Any, known: bytes) -> Any:
            fake.caches.append(known)
            return cache_class()

        tensor_class = self._class("ITensor")
        network_class = self._class(
            "INetworkDefinition",
            num_inputs=len(spec.inputs),
            num_outputs=len(spec.outputs),
            get_input=lambda self, i: tensors(spec.inputs)[i],
            get_output=lambda self, i: tensors(spec.outputs)[i],
        )
        profile_class = self._class(
            "IOptimizationProfile",
            __init__=lambda self: setattr(self, "_shapes", {}),
            set_shape=lambda self, name, *shapes: self._shapes.update({name: shapes}),
        )
        cache_class = self._class("ITimingCache", serialize=lambda self: b"timings")
        config_class = self._class(
            "IBuilderConfig",
            add_optimization_profile=add_profile,
            create_timing_cache=make_cache,
            set_timing_cache=lambda self, cache, ignore: fake.accepts_cache,
            set_memory_pool_limit=lambda self, pool, size: setattr(self, "_pool", (pool, size)),
            set_compute_capability=lambda self, cc, i: setattr(self, f"_target_{i}", cc),
        )
        module.Builder = self._class(
            "Builder",
            __init__=lambda self, logger: None,
            create_network=create_network,
            create_builder_config=create_config,
            create_optimization_profile=lambda self: profile_class(),
            build_serialized_network=build,
        )
        module.OnnxParser = self._class(
            "OnnxParser",
            __init__=lambda self, network, logger: None,
            parse_from_file=parse,
            num_errors=property(lambda self: len(fake.parse_errors)),
            get_error=lambda self, i: fake.parse_errors[i],
        )
        self._running_classes()

    def error(self, code: str, desc: str, **where: str) -> Any:
        return self._class(
            "ParserError",
            code=lambda _: getattr(self.module.ErrorCode, code),
            desc=lambda _: desc,
            node_name=lambda _: where.get("node_name", ""),
            node_operator=lambda _: where.get("node_operator", ""),
        )()

    def _running_classes(self) -> None:
        fake = self

        def deserialize(self: Any, data: bytes) -> Any:
            fake._log()
            if fake.refuses_engine:
                return None
            return fake._engine(*fake.engines.get(data, (fake.spec, None)))

        self.module.Runtime = self._class(
            "Runtime", __init__=lambda self, logger: None, deserialize_cuda_engine=deserialize
        )

    def _engine(self, spec: GraphSpec, compute: Compute | None) -> Any:
        fake = self
        names = [tensor.name for tensor in spec.tensors]

        def set_profile(self: Any, index: int, stream: int) -> bool:
            fake.profile_runs.append(index)
            self._profile = index
            return True

        def set_input_shape(self: Any, name: str, shape: tuple[int, ...]) -> bool:
            tensor = next(t for t in spec.inputs if t.name == name)
            low, _, high = profiles_of(spec)[self._profile].shapes(tensor)
            self._shapes[name] = shape
            return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

        def set_address(self: Any, name: str, address: int) -> bool:
            self._addresses[name] = address
            return address != 0 and address % ALIGNMENT == 0

        def execute(self: Any, stream: int) -> bool:
            inputs = {
                t.name: _view(self._addresses[t.name], self._shapes[t.name], t.dtype)
                for t in spec.inputs
            }
            if compute is not None:
                for name, array in compute(inputs).items():
                    tensor = next(t for t in spec.outputs if t.name == name)
                    _view(self._addresses[name], array.shape, tensor.dtype)[...] = array
                return True
            sizes = {
                axis: self._shapes[tensor.name][i]
                for tensor in spec.inputs
                for i, axis in enumerate(tensor.shape)
                if isinstance(axis, str)
            }
            for tensor in spec.outputs:
                view = _view(self._addresses[tensor.name], tensor.resolve(sizes), tensor.dtype)
                view[...] = sum(float(array.sum()) for array in inputs.values())
            return True

        def init(self: Any) -> None:
            self._shapes, self._addresses, self._profile = {}, {}, 0

        context_class = self._class(
            "IExecutionContext",
            __init__=init,
            set_optimization_profile_async=set_profile,
            set_input_shape=set_input_shape,
            set_tensor_address=set_address,
            execute_async_v3=execute,
        )
        return self._class(
            "ICudaEngine",
            num_io_tensors=len(names),
            get_tensor_name=lambda self, i: names[i],
            num_optimization_profiles=len(profiles_of(spec)),
            device_memory_size_v2=property(lambda self: fake.device_memory),
            create_execution_context=lambda self: context_class(),
        )()


def _view(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * count).from_address(address)
    return np.frombuffer(memoryview(buffer), dtype).reshape(shape)


class FakeDevice:
    """ "Device" memory that is the host's, of which it knows every byte."""

    stream = 7

    def __init__(self, free: int = 10**6, gpu: Gpu | None = None) -> None:
        self.gpu = gpu or Gpu(name="NVIDIA GeForce RTX 4090", capability="sm_89")
        self.blocks: dict[int, tuple[Any, int]] = {}
        self.free_bytes = free
        self.copies = 0
        self.copied_bytes = 0
        """Across, to the device or back."""
        self.moved_bytes = 0
        """Within the device."""
        self.entered = 0

    def enter(self) -> None:
        self.entered += 1

    def memory(self) -> tuple[int, int]:
        return self.free_bytes, self.free_bytes

    def alloc(self, num_bytes: int) -> int:
        block = ctypes.create_string_buffer(num_bytes + ALIGNMENT)
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = block, num_bytes
        return address

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        assert self._holds(target, num_bytes)
        assert self._holds(source, num_bytes)
        assert abs(target - source) >= num_bytes, "the two overlap"
        ctypes.memmove(target, source, num_bytes)
        self.moved_bytes += num_bytes

    def to_device(self, target: int, source: int, num_bytes: int) -> None:
        assert self._holds(target, num_bytes)
        assert not self.is_device_memory(source)
        self._across(target, source, num_bytes)

    def to_host(self, target: int, source: int, num_bytes: int) -> None:
        assert self._holds(source, num_bytes)
        assert not self.is_device_memory(target)
        self._across(target, source, num_bytes)

    def _across(self, target: int, source: int, num_bytes: int) -> None:
        ctypes.memmove(target, source, num_bytes)
        self.copies += 1
        self.copied_bytes += num_bytes

    def synchronize(self) -> None: ...

    def is_device_memory(self, pointer: int) -> bool:
        return self._holds(pointer, 1)

    def _holds(self, pointer: int, num_bytes: int) -> bool:
        return any(
            start <= pointer and pointer + num_bytes <= start + size
            for start, (_, size) in self.blocks.items()
        )
