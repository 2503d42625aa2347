"""The stages of a training step, each run alone and timed; used by `profile.py`.

On a CPU a stage's time is what the clock says. On a GPU it is the time its kernels and copies keep
the device busy; the host's share is timed apart, because it only counts where it is the longer one.
"""

import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from bt_fast import costs, train
from bt_fast.feed import distort, feed
from bt_fast.job import Job
from bt_fast.loss import choose_method
from bt_fast.perf import synchronise
from pipelines.crop import cut, random_boxes

_SLEEP_CYCLES = 50_000_000  # some 30 ms of a GPU's clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage alone, for a batch of n images."""

    name: str
    seconds: float
    host: float = 0.0  # seconds the host is busy with it, where that is not the same
    flop: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""  # which of the device's ceilings its rate is compared with


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


def measure_ceilings(job: Job, budget: float) -> Ceilings:
    device = job.performance.device
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(job.performance.view_dtype)
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


def loader_stages(job: Job, budget: float) -> Iterator[Stage]:
    """read, decode, crop, and the loader as a whole, by as many threads as the run has."""
    n, cutter, device = job.config.batch_size, job.loader.cutter, torch.device("cpu")
    samples = next(job.loader.batches(0, 1)).samples
    with open(job.reader.path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read

    def threaded(function, items) -> Callable[[], list]:
        return lambda: list(cutter.pool.map(function, items, chunksize=1))

    started = time.perf_counter()
    some = range(min(len(job.reader), 20 * n))
    threaded(job.reader.checksum_ok, some)()
    seconds = (time.perf_counter() - started) * n / len(some)
    num_bytes = sum(len(job.reader.image(i)) for i in some) * n / len(some)
    yield Stage(name="read", seconds=seconds, bytes=num_bytes)

    seconds, _ = seconds_per_call(threaded(cutter.decode, samples), device, budget)
    yield Stage(name="decode", seconds=seconds)

    images = threaded(cutter.decode, samples)()
    keys = next(job.loader.batches(0, 1)).keys
    sizes = job.loader.sizes[samples].T
    boxes = [random_boxes(job.loader.crop, key, *sizes) for key in keys]
    side = job.config.size
    crops = torch.empty((2, n, side, side, 3), dtype=torch.uint8)

    def crop(row: int) -> None:
        for view in range(2):
            cut(images[row], boxes[view][row], out=crops[view, row])

    seconds, _ = seconds_per_call(threaded(crop, range(n)), device, budget)
    yield Stage(name="crop", seconds=seconds)

    rate = images_per_second(job.loader.batches(0, 1 << 40), n, device, 2 * budget)
    yield Stage(name="loader", seconds=n / rate)


def device_stages(job: Job, budget: float) -> Iterator[Stage]:
    """copy, augment, forward, loss, backward, optimizer, each alone."""
    performance, device, n = job.performance, job.performance.device, job.config.batch_size
    branches = job.config.view_a, job.config.view_b
    batch = next(job.loader.batches(0, 1))

    def stage(name: str, function: Callable[[], object], **counted) -> Stage:
        seconds, host = seconds_per_call(function, device, budget)
        return Stage(name=name, seconds=seconds, host=host, **counted)

    if device.type == "cuda":
        yield stage(
            "copy",
            lambda: batch.views.to(device, non_blocking=True),
            bytes=batch.views.nbytes,
            ceiling="link",
        )
        batch = type(batch)(
            step=batch.step,
            samples=batch.samples,
            keys=batch.keys,
            views=batch.views.to(device),
        )
    moved = costs.augment_bytes(2 * n, job.config.size, performance.view_dtype)
    yield stage(
        "augment",
        lambda: distort(batch, branches, performance),
        bytes=moved,
        ceiling="memory",
    )

    views = distort(batch, branches, performance)

    z = torch.empty(0)
    gradient = torch.randn(len(views), job.config.projector[-1], device=device)

    def forward() -> None:
        nonlocal z
        job.optimizer.zero_grad(set_to_none=True)
        with performance.autocast():
            z = job.embed(views)

    parts = [forward, lambda: z.backward(gradient.to(z.dtype))]
    flops = encoder_flop(job, views)
    for name, flop, (seconds, host) in zip(
        ("forward", "backward"), flops, seconds_of_parts(parts, device, budget), strict=True
    ):
        yield Stage(name=name, seconds=seconds, host=host, flop=flop, ceiling="flops")

    leaf = z.detach().requires_grad_()

    def loss() -> None:
        leaf.grad = None
        invariance, redundancy = job.objective(*leaf.chunk(2))
        (invariance + job.config.lambd * redundancy).backward()

    width = job.config.projector[-1]
    flop = costs.loss_flop(choose_method(n, width), n, width)
    yield stage("loss", loss, flop=flop, ceiling="flops")

    train.set_learning_rates(job, 0)
    guard = torch.zeros((), device=device)
    parameters = sum(p.numel() for p in job.model.parameters())
    yield stage(
        "optimizer",
        lambda: job.optimizer.step(guard=guard),
        bytes=costs.lars_bytes(parameters),
        ceiling="memory",
    )
    job.optimizer.zero_grad(set_to_none=True)


def encoder_flop(job: Job, views: torch.Tensor) -> tuple[int, int]:
    """(forward, backward) of encoder and projector for these views."""
    some = views[:4]
    with FlopCounterMode(display=False) as counter, job.performance.autocast():
        z = job.model(some)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        z.sum().backward()
    job.optimizer.zero_grad(set_to_none=True)
    scale = len(views) / len(some)
    return round(forward * scale), round(counter.get_total_flops() * scale)


def whole(job: Job, budget: float) -> tuple[float, float]:
    """Seconds of a step: (with the loader, on views that are already on the device)."""
    n, device = job.config.batch_size, job.performance.device
    branches = job.config.view_a, job.config.view_b

    def steps(batches: Iterable[torch.Tensor]) -> Iterator[None]:
        for views in batches:
            train.set_learning_rates(job, 0)
            train.update(job, views)
            yield

    batches = job.loader.batches(0, 1 << 40)
    with_loader = images_per_second(
        steps(feed(batches, branches, job.performance)), n, device, budget
    )
    batch = next(job.loader.batches(0, 1))
    views = distort(batch, branches, job.performance)
    without = images_per_second(steps(repeat(views)), n, device, budget)
    return n / with_loader, n / without


def peak_memory(job: Job) -> int:
    """Bytes: on a GPU what its allocator held at most, on a CPU the process's largest size."""
    if job.performance.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.performance.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def chrome_trace(job: Job, path: Path) -> None:
    """Three whole steps, for chrome://tracing or Perfetto."""
    branches = job.config.view_a, job.config.view_b
    with torch.profiler.profile() as profile:
        for views in feed(job.loader.batches(0, 3), branches, job.performance):
            train.update(job, views)
        synchronise(job.performance.device)
    profile.export_chrome_trace(str(path))
