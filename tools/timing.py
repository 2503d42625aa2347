"""Timing on a CPU or a GPU, and what the machine reaches at best."""

import itertools
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch

from bt_fast.runtime import synchronise

_CLOCK = 2_000_000_000  # cycles per second of a GPU, or a few more


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this machine reaches on the simplest work there is."""

    flops: float  # matrix product in the run's precision, FLOP/s
    memory: float  # bytes read and written per second by a device-to-device copy
    link: float  # bytes per second from page-locked memory to the device; 0 on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a step: seconds, and what is done in them."""

    name: str
    seconds: float
    flop: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""  # of `Ceilings`, with which its rate is compared
    alone: float = 0.0  # of a class of work: seconds in which no other class's kernel runs
    launches: float = 0.0

    def reached(self, ceilings: Ceilings | None) -> float:
        """The share of the ceiling; 0 where that is not known."""
        if ceilings is None or not self.ceiling or not self.seconds:
            return 0.0
        return (self.flop or self.bytes) / self.seconds / getattr(ceilings, self.ceiling)


def seconds_per_call(
    function: Callable[[], object], device: torch.device, budget: float
) -> tuple[float, float]:
    """(seconds the device is busy, seconds until the host is free again), medians over calls."""
    return seconds_of_parts([function], device, budget)[0]


def seconds_of_parts(
    functions: Sequence[Callable[[], object]], device: torch.device, budget: float
) -> list[tuple[float, float]]:
    """`seconds_per_call` of functions that run one after the other, for each of them."""
    turns = [[0.0] * len(functions) for _ in range(2)]
    host: list[list[float]] = []
    deadline = 0.0
    while len(host) < 5 or (time.perf_counter() < deadline and len(host) < 100):
        if len(host) == len(turns):  # after two turns to warm up
            deadline = time.perf_counter() + budget
        synchronise(device)
        host.append([_seconds(function) for function in functions])
    host = host[len(turns) :]
    medians = [median(part) for part in zip(*host, strict=True)]
    if device.type != "cuda":
        return [(seconds, 0.0) for seconds in medians]

    # On the device: it first waits until the host has queued every launch, so that it is never idle
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
    """Of an iterator of batches of n images, after its first three: the median of five spells.

    Where a few steps take longer than the budget, two spells must do.
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
    """dtype: of the matrix product."""
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
        there = torch.empty_like(pinned, device=device)
        seconds, _ = seconds_per_call(
            lambda: there.copy_(pinned, non_blocking=True), device, budget
        )
        link = pinned.nbytes / seconds
    return Ceilings(flops=2 * side**3 / product, memory=2 * source.nbytes / copy, link=link)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what its allocator held at most, on a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
