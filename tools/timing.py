"""Timing on a CPU or a GPU, and peak rates of the machine."""

import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from bt_fast.runtime import synchronise

_CLOCK = 2_000_000_000  # cycles per second of a GPU, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Measured peak rates of this machine."""

    flops: float  # FLOP/s of a matrix product in the run's precision
    memory: float  # bytes read and written per second by a device-to-device copy
    link: float  # bytes per second from page-locked memory to the device; 0 on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Time and work of a part of a step."""

    name: str
    seconds: float
    flop: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""  # field of `Ceilings` with which the rate is compared
    alone: float = 0.0  # for a class of work: seconds in which no kernel of another class runs
    launches: float = 0.0

    def reached(self, ceilings: Ceilings | None) -> float:
        """Fraction of the ceiling that the rate reaches; 0 if unknown."""
        if ceilings is None or not self.ceiling or not self.seconds:
            return 0.0
        return (self.flop or self.bytes) / self.seconds / getattr(ceilings, self.ceiling)


def cpu_seconds() -> float:
    """CPU time used so far by this process and those it started that still run."""
    times: dict[int, float] = {os.getpid(): time.process_time()}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):  # nothing on systems without /proc
        with contextlib.suppress(OSError):  # the process has ended
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            times.setdefault(pid, sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"))

    def is_own(pid: int) -> bool:
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid != 0

    return sum(seconds for pid, seconds in times.items() if is_own(pid))


def seconds_per_call(
    function: Callable[[], object], device: torch.device, budget: float
) -> tuple[float, float]:
    """Median seconds per call in which the device is busy and, on a GPU, of the host."""
    return seconds_of_parts([function], device, budget)[0]


def seconds_of_parts(
    functions: Sequence[Callable[[], object]], device: torch.device, budget: float
) -> list[tuple[float, float]]:
    """`seconds_per_call` of each of several functions that run in sequence."""
    num_warmup = 2
    host: list[list[float]] = []
    deadline = 0.0
    while len(host) < 5 or (time.perf_counter() < deadline and len(host) < 100):
        if len(host) == num_warmup:
            deadline = time.perf_counter() + budget
        synchronise(device)
        host.append([_seconds(function) for function in functions])
    host = host[num_warmup:]
    medians = [median(part) for part in zip(*host, strict=True)]
    if device.type != "cuda":
        return [(seconds, 0.0) for seconds in medians]

    # The device first sleeps until the host has queued every launch, so that it is never idle
    # between two kernels. (The host queues at most about a thousand launches ahead.)
    ahead = round(1.5 * sum(medians) * _CLOCK) + _CLOCK // 100
    busy = []
    for _ in range(max(3, min(len(host), 20))):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        synchronise(device)
        torch.cuda._sleep(ahead)
        marks[0].record()
        for function, mark in zip(functions, marks[1:], strict=True):
            function()
            mark.record()
        synchronise(device)
        busy.append([a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)])
    on_device = [median(part) for part in zip(*busy, strict=True)]
    return list(zip(on_device, medians, strict=True))


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def images_per_second(batches: Iterable, n: int, device: torch.device, budget: float) -> float:
    """Rate of an iterator of batches of n images without its first three: median of five intervals.

    Two intervals are measured if a few steps take longer than the budget.
    """
    batches = iter(batches)
    for _ in islice(batches, 3):
        pass
    rates: list[float] = []
    deadline = time.perf_counter() + 2 * budget
    while len(rates) < 2 or (len(rates) < 5 and time.perf_counter() < deadline):
        synchronise(device)
        count, started = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - started < budget / 5:
            next(batches)
            count += 1
        synchronise(device)
        rates.append(count * n / (time.perf_counter() - started))
    return median(rates)


def measure_ceilings(device: torch.device, dtype: torch.dtype, budget: float) -> Ceilings:
    """Measure the ceilings; `dtype` is that of the matrix product."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(a)
    product, _ = seconds_per_call(lambda: torch.mm(a, a, out=out), device, budget)
    source = torch.randn(256 * 1024**2 // 4, device=device)
    target = torch.empty_like(source)
    copy, _ = seconds_per_call(lambda: target.copy_(source), device, budget)
    link = 0.0
    if device.type == "cuda":
        pinned = torch.randn(64 * 1024**2 // 4).pin_memory()
        on_device = torch.empty_like(pinned, device=device)
        seconds, _ = seconds_per_call(
            lambda: on_device.copy_(pinned, non_blocking=True), device, budget
        )
        link = pinned.nbytes / seconds
    return Ceilings(flops=2 * side**3 / product, memory=2 * source.nbytes / copy, link=link)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the allocator on a GPU, of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
