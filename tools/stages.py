"""The stages of a training step, each run alone and timed; used by `profile.py`.

On a CPU a stage's time is what the clock says. On a GPU it is the time its kernels and copies keep
the device busy; the host's share is timed apart, because it only counts where it is the longer one.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bt_fast import costs, train
from bt_fast.feed import distort, feed
from bt_fast.job import Job
from bt_fast.loss import choose_method
from bt_fast.perf import synchronise
from pipelines.crop import cut
from pipelines.loader import IMAGES_PER_TASK
from tools.timing import images_per_second, seconds_of_parts, seconds_per_call

_IMAGES_FOR_THREADS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage alone, for a batch of n images."""

    name: str
    seconds: float
    host: float = 0.0  # seconds the host is busy with it, where that is not the same
    flop: float = 0.0
    bytes: float = 0.0
    ceiling: str = ""  # which of the device's ceilings its rate is compared with


def loader_stages(job: Job, budget: float) -> Iterator[Stage]:
    """read, decode, crop, and the loader as a whole, by as many threads as the run has.

    read is fetching the bytes, from the disk or its cache, and their checksum.
    """
    n, cutter, cpu = job.config.batch_size, job.loader.cutter, torch.device("cpu")
    # Enough images to share them evenly among threads; times are brought to a batch.
    num_batches = -(-_IMAGES_FOR_THREADS // n)
    requests = list(job.loader.steps.requests(0, num_batches))
    samples = np.concatenate([request.samples for request in requests])
    boxes = np.concatenate([request.boxes for request in requests])

    def threaded(function, items) -> Callable[[], list]:
        def some(first: int) -> list:
            return [function(item) for item in items[first : first + IMAGES_PER_TASK]]

        tasks = range(0, len(items), IMAGES_PER_TASK)
        return lambda: [result for part in cutter.pool.map(some, tasks) for result in part]

    def seconds(function, items) -> float:
        return seconds_per_call(threaded(function, items), cpu, budget)[0] / num_batches

    some = range(min(len(job.reader), 20 * n))
    started = time.perf_counter()
    threaded(job.reader.checksum_ok, some)()
    per_image = (time.perf_counter() - started) / len(some)
    num_bytes = sum(len(job.reader.image(i)) for i in some) * n / len(some)
    yield Stage(name="read", seconds=per_image * n, bytes=num_bytes)
    yield Stage(name="decode", seconds=seconds(cutter.decode, samples))

    images = threaded(cutter.decode, samples)()
    side = job.config.size
    crops = torch.empty((2, len(samples), side, side, 3), dtype=torch.uint8)

    def crop(row: int) -> None:
        for view in range(2):
            cut(images[row], boxes[row, view], out=crops[view, row])

    yield Stage(name="crop", seconds=seconds(crop, range(len(samples))))
    rate = images_per_second(job.loader.batches(0, 1 << 40), n, cpu, 2 * budget)
    yield Stage(name="loader", seconds=n / rate)


def device_stages(job: Job, budget: float) -> Iterator[Stage]:
    """copy, augment, forward, backward, optimizer, loss, each alone.

    The optimizer comes before the loss: with CUDA graphs another compiled function may write over
    the gradients that the backward pass left.
    """
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

    leaf = z.detach().clone().requires_grad_()
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

    def loss() -> None:
        leaf.grad = None
        invariance, redundancy = job.objective(*leaf.chunk(2))
        (invariance + job.config.lambd * redundancy).backward()

    width = job.config.projector[-1]
    flop = costs.loss_flop(choose_method(n, width), n, width)
    yield stage("loss", loss, flop=flop)  # in another precision than the ceiling's


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


def step_alone(job: Job, budget: float) -> float:
    """Seconds of a step on views that are on the device already."""
    n, device = job.config.batch_size, job.performance.device
    return n / images_per_second(steps(job, repeat(_views(job))), n, device, budget)


def step_from_jpegs(job: Job, budget: float) -> float:
    """Seconds of a step with the loader, the copy and the augmentation beside it."""
    n, branches = job.config.batch_size, (job.config.view_a, job.config.view_b)
    batches = feed(job.loader.batches(0, 1 << 40), branches, job.performance)
    return n / images_per_second(steps(job, batches), n, job.performance.device, budget)


def _views(job: Job) -> torch.Tensor:
    branches = job.config.view_a, job.config.view_b
    return distort(next(job.loader.batches(0, 1)), branches, job.performance)


def steps(job: Job, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Steps of training, on views as `feed` gives them."""
    for views in batches:
        train.set_learning_rates(job, 0)
        train.update(job, views)
        yield


def longest_kernels(job: Job, count: int = 20) -> dict:
    """The kernels that take longest in a step on views that are there; torch's operations on a CPU.

    {"ms", "launches", "longest": [{"name", "ms", "launches", "share"}]}, all per step. The shares
    are of the time of all kernels.
    """
    num_steps, device = 3, job.performance.device
    running = steps(job, repeat(_views(job)))
    next(running)
    synchronise(device)
    kind = torch.profiler.ProfilerActivity
    activity = kind.CUDA if device.type == "cuda" else kind.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in islice(running, num_steps):
            pass
        synchronise(device)
    seconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profile.events():
        if device.type == "cpu":
            seconds[event.name] += event.self_cpu_time_total / 1e6
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6
        else:
            continue
        launches[event.name] += 1
    total = seconds.total()
    return {
        "ms": 1e3 * total / num_steps,
        "launches": launches.total() / num_steps,
        "longest": [
            {
                "name": name,
                "ms": 1e3 * value / num_steps,
                "launches": launches[name] / num_steps,
                "share": value / total,
            }
            for name, value in seconds.most_common(count)
        ],
    }


def chrome_trace(job: Job, path: Path) -> None:
    """Three whole steps, for chrome://tracing or Perfetto."""
    branches = job.config.view_a, job.config.view_b
    with torch.profiler.profile() as profile:
        for views in feed(job.loader.batches(0, 3), branches, job.performance):
            train.update(job, views)
        synchronise(job.performance.device)
    profile.export_chrome_trace(str(path))
