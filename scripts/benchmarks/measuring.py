"""Time, memory and the machine's limit."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.config import Architecture


@dataclass(slots=True)
class Sample:
    """What one step took."""

    cpu: float = 0.0
    """Seconds of processor time of all threads, user and system."""
    wall: float = 0.0
    peak: float = 0.0
    """Bytes: highest resident set during the step minus that before it."""


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def resident() -> int:
    """Bytes of this process that are in memory."""
    return _status("VmRSS")


@contextmanager
def measured() -> Iterator[Sample]:
    """Fills a `Sample`. Memory that the allocator kept from earlier steps is given back first, or it would hide a peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = resident()
    sample = Sample()
    wall, cpu = time.perf_counter(), time.process_time()
    yield sample
    sample.cpu, sample.wall = time.process_time() - cpu, time.perf_counter() - wall
    sample.peak = _status("VmHWM") - before


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that are alive inside, at their most: what a program asks for, without what an allocator adds.

    Example:
        with LiveTensors() as live:
            train()
        live.peak
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[int, str]] = {}
        self._now = 0
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        """Bytes by the operation that made them and their shape, when the most were alive."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (*tree_leaves(args), *tree_leaves(result)):  # what was loaded from files is seen when it is used
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, f"{func} {tuple(tensor.shape)}")
        return result

    def _see(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or storage.nbytes() == 0:
            return
        self._sizes[key] = (storage.nbytes(), name)
        self._now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        if self._now > self.peak:
            self.peak, self.at_peak = self._now, {}
            for size, made_by in self._sizes.values():
                self.at_peak[made_by] = self.at_peak.get(made_by, 0) + size

    def _forget(self, key: int) -> None:
        size, _ = self._sizes.pop(key)
        self._now -= size


def matrix_throughput(model: Architecture, vocabulary: int, dtype: torch.dtype, *, rows: int) -> float:
    """Floating point operations per processor-second in the products of the model's own shapes, each at its best of five."""
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    shapes = [(hidden, heads), (hidden, keys), (hidden, keys), (heads, hidden)]
    shapes += [(hidden, model.intermediate_size)] * 2 + [(model.intermediate_size, hidden), (hidden, vocabulary)]
    operations = seconds = 0.0
    for inner, outer in shapes:
        count = min(rows, 512) if outer == vocabulary else rows
        left, right = torch.randn(count, inner).to(dtype), torch.randn(outer, inner).to(dtype)
        product = torch.empty(count, outer, dtype=dtype)
        weight = 1 if outer == vocabulary else model.num_layers
        operations += weight * 2.0 * count * inner * outer
        seconds += weight * min(_seconds(lambda a=left, b=right, c=product: torch.mm(a, b.T, out=c)) for _ in range(5))
    return operations / seconds


def _seconds(work: Callable[[], Any]) -> float:
    started, repeats = time.process_time(), 0
    while repeats < 2 or time.process_time() - started < 0.02:
        work()
        repeats += 1
    return (time.process_time() - started) / repeats


def ratio_with_interval(peer: Sequence[float], ours: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of the medians and its 95 % bootstrap interval."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(peer, k=len(peer))) / statistics.median(draw.choices(ours, k=len(ours)))
        for _ in range(2000)
    )
    return statistics.median(peer) / statistics.median(ours), (ratios[50], ratios[1949])


def machine() -> dict[str, Any]:
    """What the numbers depend on, without names."""
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return {
        "cores": os.cpu_count(),
        "instructions": sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(flags)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    }
