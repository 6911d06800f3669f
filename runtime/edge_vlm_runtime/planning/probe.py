"""How fast this machine copies, multiplies and starts a node, measured in the runtime that is used.

Rates are taken at a few sizes and read between them: a product of few rows is bound by reading its
weights, and small weights stay in a cache where large ones do not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.ort import ModelInMemory
from edge_vlm_runtime.planning.costs import Kind, Product, Work
from edge_vlm_runtime.planning.onnx_bytes import Node, chain, model

ROWS = (1, 8, 24, 81, 144, 369, 729)
SIDES = {
    "small": ((192, 512), (512, 192), 8),
    "middle": ((1152, 1152), (1152, 1152), 24),
    "wide": ((2560, 9728), (9728, 2560), 1),
}
"""Weights [k, n], the next ones, and how many pairs stand behind each other: 6, 255 and 199 MB in
fp32 (weights of 0.4, 5.3 and 100 MB each); of the last so many that no cache holds them."""
MOST_PAIRS = 4
TENSORS = (1 << 15, 1 << 18, 1 << 21, 1 << 23)
"""Values of what stands between products: 128 kB to 32 MB."""
NODES = 200
COPY_BYTES = 128 << 20
LEAST_S = 0.03
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one machine, one library, one number of threads."""

    copy_gb_s: float
    """Bytes read and bytes written, both counted, by numpy on one thread."""
    read_gb_s: float
    """Weights of a product with one row, by the runtime."""
    products: Mapping[float, Mapping[int, float]]
    """GFLOP/s by the number of weights of a product and its rows."""
    attention: Mapping[int, float]
    """GFLOP/s of products of two activations, by the side of a cube of as many operations."""
    passes: Mapping[Kind, Mapping[int, float]]
    """10^9 values a second of what stands between products, by the values of a tensor."""
    node_us: float

    @property
    def matrix_gflop_s(self) -> float:
        """The best that was seen."""
        return max(max(rates.values()) for rates in self.products.values())

    def product_s(self, m: int, k: int, n: int) -> float:
        """Seconds of one product with fp32 weights."""
        sizes = sorted(self.products)
        place = _place(math.log(k * n), [math.log(size) for size in sizes])
        rate = _between(place, [_at(self.products[size], m) for size in sizes])
        return 2 * m * k * n / (rate * 1e9)

    def _weighted_s(self, product: Product) -> float:
        """Fewer bits are read faster and multiplied no faster than fp32 at best."""
        m, k, n = product.m, product.k, product.n
        taken = self.product_s(m, k, n)
        if product.weight_bytes >= 4:
            return taken
        reading = self.product_s(1, k, n) * product.weight_bytes / 4
        return max(reading, 2 * m * k * n / (self.matrix_gflop_s * 1e9))

    def seconds(self, work: Work) -> float:
        """What a run of this work is expected to take."""
        total = work.nodes * self.node_us * 1e-6
        for product in work.products:
            if product.weight_bytes:
                total += product.count * self._weighted_s(product)
            else:
                side = round((product.m * product.k * product.n) ** (1 / 3))
                total += product.flops / (_at(self.attention, side) * 1e9)
        for each in work.passes:
            total += each.values / (_at(self.passes[each.kind], each.at_once) * 1e9)
        return total


def _at(rates: Mapping[int, float], size: float) -> float:
    known = sorted(rates)
    place = _place(math.log(max(size, 1)), [math.log(each) for each in known])
    return _between(place, [rates[each] for each in known])


def _place(value: float, ascending: list[float]) -> float:
    """Where a value stands among others: 1.5 is half way from the second to the third."""
    if value <= ascending[0]:
        return 0.0
    for index, (low, high) in enumerate(pairwise(ascending)):
        if value <= high:
            return index + (value - low) / (high - low)
    return float(len(ascending) - 1)


def _between(place: float, values: list[float]) -> float:
    """Geometric, as rates go."""
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return math.exp(
        math.log(values[low]) + (math.log(values[high]) - math.log(values[low])) * (place - low)
    )


def median_s(run: Callable[[], object], clock: Clock, times: int = 5) -> float:
    """Seconds of one call; each of `times` samples holds as many calls as fill LEAST_S."""
    return statistics.median(samples_s(run, clock, times))


def samples_s(run: Callable[[], object], clock: Clock, times: int) -> list[float]:
    """As `median_s`, every sample."""
    run()
    begin = clock()
    run()
    calls = max(1, math.ceil(LEAST_S / max(clock() - begin, 1e-7)))
    found = []
    for _ in range(times):
        begin = clock()
        for _ in range(calls):
            run()
        found.append((clock() - begin) / calls)
    return found


def measure_rates(threads: int, clock: Clock = time.perf_counter) -> Rates:
    """Takes some ten seconds of a processor. Raises MissingExtraError."""
    rng = np.random.default_rng(0)

    def weights(shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5)

    products: dict[float, dict[int, float]] = {}
    read_gb_s = 0.0
    for name, (first, second, pairs) in SIDES.items():
        if name == "wide":
            in_cache = cache_bytes() / (8 * first[0] * first[1])
            pairs = min(MOST_PAIRS, max(1, math.ceil(1.25 * in_cache)))
        ops: list[tuple[str, np.ndarray | None]] = []
        for _ in range(pairs):
            ops += [("MatMul", weights(first)), ("MatMul", weights(second))]
        graph = ModelInMemory(chain(ops, ["m", first[0]]), threads)
        huge_pages.gather()
        values = 2 * pairs * first[0] * first[1]
        rates = {}
        for rows in ROWS if name != "wide" else ROWS[:6]:
            x = weights((rows, first[0]))
            times = 1 if name != "small" and rows > 24 else 3
            taken = median_s(partial(graph.run, {"x": x}), clock, times)
            rates[rows] = 2 * rows * values / taken / 1e9
            if name == "wide" and rows == 1:
                read_gb_s = 4 * values / taken / 1e9
        products[first[0] * first[1]] = rates
        graph.close()
    return Rates(
        copy_gb_s=copy_gb_s(clock),
        read_gb_s=read_gb_s,
        products=products,
        attention=_attention(threads, clock),
        passes=_passes(threads, clock),
        node_us=_node_us(threads, clock),
    )


def cache_bytes() -> int:
    """The largest of the first processor's caches; 0 where the system does not say."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text().strip() for path in found]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)


def copy_gb_s(clock: Clock, num_bytes: int = COPY_BYTES) -> float:
    """By numpy on one thread, bytes read and written both counted."""
    source = np.ones(num_bytes // 8, np.float64)
    target = np.empty_like(source)
    return 2 * num_bytes / min(samples_s(lambda: np.copyto(target, source), clock, 5)) / 1e9


def _attention(threads: int, clock: Clock) -> dict[int, float]:
    graph = ModelInMemory(model([Node("MatMul", ("x", "x"), "y")], {}, ["h", "m", "m"]), threads)
    rates = {}
    for rows in (4, 16, 81, 144, 369):
        x = np.full((8, rows, rows), 0.01, np.float32)
        taken = median_s(partial(graph.run, {"x": x}), clock)
        rates[rows] = 2 * 8 * rows**3 / taken / 1e9
    graph.close()
    return rates


def _node_us(threads: int, clock: Clock) -> float:
    small = np.full(16, 0.5, np.float32)
    mix: list[tuple[str, np.ndarray | None]] = [
        *(("Add", small), ("Softmax", None), ("Mul", small), ("Sqrt", None)),
        *(("Transpose", None), ("Transpose", None), ("Sigmoid", None), ("Relu", None)),
    ]
    made = chain(mix * (NODES // len(mix)), ["m", 16])
    return _run_s(made, (3, 16), threads, clock) / NODES * 1e6


def _passes(threads: int, clock: Clock) -> dict[Kind, dict[int, float]]:
    row = np.full(1152, 0.5, np.float32)
    sums = chain([("Add", row), ("Mul", row), ("Sigmoid", None)], ["m", 1152])
    turns = [Node("Transpose", ("x",), "t", (1, 0, 2)), Node("Transpose", ("t",), "y", (1, 0, 2))]
    turned = model(turns, {}, ["s", "h", 72])
    gelu = chain([("Erf", None)] * 2, ["m", 1152])
    softmax = chain([("Softmax", None)] * 2, ["h", "m", "m"])

    def rate(values: float, made: bytes, *shape: int) -> float:
        return values * math.prod(shape) / _run_s(made, shape, threads, clock) / 1e9

    found: dict[Kind, dict[int, float]] = {}
    for size in TENSORS:
        rows = size // 1152
        at_size: dict[Kind, float] = {
            "moved": rate(3 * 2, sums, rows, 1152),
            "copied": rate(2 * 2, turned, rows, 16, 72),
            "joined": copy_gb_s(clock, 4 * size) / 4,
            "softmax": rate(2, softmax, 8, *[round((size / 8) ** 0.5)] * 2),
            "gelu": rate(2, gelu, rows, 1152),
        }
        for kind, value in at_size.items():
            found.setdefault(kind, {})[size] = value
    return found


def _run_s(made: bytes, shape: tuple[int, ...], threads: int, clock: Clock) -> float:
    graph = ModelInMemory(made, threads)
    x = np.full(shape, 0.5, np.float32)
    taken = median_s(lambda: graph.run({"x": x}), clock)
    graph.close()
    return taken
