"""Timing on a CPU or a GPU, and what the machine reaches at best."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch

from bt_fast.perf import synchronise

_SLEEP_CYCLES = 50_000_000  # some 30 ms of a GPU's clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What this machine reaches on the simplest work there is."""

    flops: float  # matrix product in the run's precision, FLOP/s
    memory: float  # bytes read and written per second by a device-to-device copy
    link: float  # bytes per second from page-locked memory to the device; 0 on a CPU


def seconds_per_call(
    function: Callable[[], object], device: torch.device, budget: float
) -> tuple[float, float]:
    """(seconds the device is busy, seconds until the host is free again), medians over calls."""
    return seconds_of_parts([function], device, budget)[0]


def seconds_of_parts(
    functions: Sequence[Callable[[], object]], device: torch.device, budget: float
) -> list[tuple[float, float]]:
    """`seconds_per_call` of functions that run one after the other, for each of them."""
    on_gpu = device.type == "cuda"
    busy: list[list[float]] = [[] for _ in functions]
    host: list[list[float]] = [[] for _ in functions]
    deadline, turn = 0.0, -2  # two turns to warm up
    while turn < 3 or (time.perf_counter() < deadline and turn < 100):
        if turn == 0:
            deadline = time.perf_counter() + budget
        synchronise(device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        if on_gpu:  # let the device wait until the host is ahead, so that it is never idle
            torch.cuda._sleep(_SLEEP_CYCLES)
            marks[0].record()
        for part, function in enumerate(functions):
            started = time.perf_counter()
            function()
            seconds = time.perf_counter() - started
            if on_gpu:
                marks[part + 1].record()
            if turn >= 0:
                host[part].append(seconds)
                busy[part].append(seconds)
        synchronise(device)
        if on_gpu and turn >= 0:
            for part in range(len(functions)):
                busy[part][-1] = marks[part].elapsed_time(marks[part + 1]) / 1e3
        turn += 1
    return [(median(b), median(h) if on_gpu else 0.0) for b, h in zip(busy, host, strict=True)]


def images_per_second(batches: Iterable, n: int, device: torch.device, budget: float) -> float:
    """Of an iterator of batches of n images, after its first three."""
    batches = iter(batches)
    for _ in islice(batches, 3):
        pass
    synchronise(device)
    count, started = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - started < budget:
        next(batches)
        count += 1
    synchronise(device)
    return count * n / (time.perf_counter() - started)


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
