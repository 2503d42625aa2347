"""A training step: its stages alone, the whole traced, all ranks together; used by `profile.py`.

On a CPU a stage's time is what the clock says. On a GPU it is the time its kernels and copies keep
the device busy.
"""

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product, repeat
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bt_fast import train
from bt_fast.build import Job, build, rehearse
from bt_fast.config import Config
from bt_fast.distributed.collectives import World, all_sum, from_first, wait_for_all
from bt_fast.plan import step_costs
from bt_fast.prefetch import distort, feed
from bt_fast.runtime import Performance, synchronise
from pipelines.augment import Draw
from pipelines.crop import cut
from pipelines.loading.native import IMAGES_PER_TASK
from tools.breakdown import AUGMENT, LOSS, Breakdown, activities, breakdown
from tools.timing import Stage, images_per_second, seconds_of_parts, seconds_per_call

_IMAGES_FOR_THREADS = 64


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


def device_stages(job: Job, work: step_costs.Work, budget: float) -> Iterator[Stage]:
    """copy, augment, forward, backward, optimizer, loss, each alone.

    The optimizer comes before the loss: with CUDA graphs another compiled function may write over
    the gradients that the backward pass left.
    """
    performance, device = job.performance, job.performance.device
    branches = job.config.view_a, job.config.view_b
    batch = next(job.loader.batches(0, 1))

    def stage(name: str, function: Callable[[], object], **counted) -> Stage:
        return Stage(name=name, seconds=seconds_per_call(function, device, budget)[0], **counted)

    if device.type == "cuda":
        yield stage(
            "copy",
            lambda: batch.views.to(device, non_blocking=True),
            bytes=batch.views.nbytes,
            ceiling="link",
        )
        batch = replace(batch, views=batch.views.to(device))
    yield stage(
        "augment",
        lambda: distort(batch, branches, performance),
        bytes=work.bytes["augmentation"],
        ceiling="memory",
    )

    views, z = distort(batch, branches, performance), torch.empty(0)
    gradient = torch.randn(len(views), job.config.projector[-1], device=device)

    def forward() -> None:
        nonlocal z
        job.optimizer.zero_grad(set_to_none=True)
        with performance.autocast():
            z = job.embed(views)

    parts = [forward, lambda: z.backward(gradient.to(z.dtype))]
    (first, _), (second, _) = seconds_of_parts(parts, device, budget)
    yield Stage(name="forward", seconds=first, flop=work.forward, ceiling="flops")
    yield Stage(name="backward", seconds=second, flop=work.backward, ceiling="flops")

    leaf = z.detach().clone().requires_grad_()
    train.set_learning_rates(job, 0)
    guard = torch.zeros((), device=device)
    yield stage(
        "optimizer",
        lambda: job.optimizer.step(guard=guard),
        bytes=work.bytes["optimizer"],
        ceiling="memory",
    )
    job.optimizer.zero_grad(set_to_none=True)

    def loss() -> None:
        leaf.grad = None
        invariance, redundancy = job.objective(*leaf.chunk(2))
        (invariance + job.config.lambd * redundancy).backward()

    flop = step_costs.loss_flop_of_ranks(len(views) // 2, job.config.projector[-1], 1)
    yield stage("loss", loss, flop=flop)  # in another precision than the ceiling's


def step_alone(job: Job, budget: float) -> float:
    """Seconds of a step on views that are on the device already."""
    n, device = job.config.batch_size, job.performance.device
    return n / images_per_second(steps(job, repeat(views_of(job))), n, device, budget)


def step_from_jpegs(job: Job, budget: float) -> float:
    """Seconds of a step with the loader, the copy and the augmentation beside it."""
    n, branches = job.config.batch_size, (job.config.view_a, job.config.view_b)
    batches = feed(job.loader.batches(0, 1 << 40), branches, job.performance)
    return n / images_per_second(steps(job, batches), n, job.performance.device, budget)


def views_of(job: Job) -> torch.Tensor:
    branches = job.config.view_a, job.config.view_b
    return distort(next(job.loader.batches(0, 1)), branches, job.performance)


def steps(job: Job, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Steps of training, on views as `feed` gives them."""
    for views in batches:
        train.set_learning_rates(job, 0)
        train.update(job, views)
        yield


def trace(job: Job, work: step_costs.Work, path: Path, num_steps: int = 3) -> Breakdown | None:
    """A step's breakdown: the whole step on crops that are there, everything but the loader. None
    where this user may not trace the GPU.

    Every rank of the job must call it. Leaves the Chrome trace of `num_steps` steps in `path`.
    """
    config, device, ranks = job.config, job.performance.device, job.world.size
    on_gpu = device.type == "cuda"
    job = replace(job, objective=_within(LOSS, job.objective))
    performance = _Ranged(**dataclasses.asdict(job.performance))
    crops = repeat(next(job.loader.batches(0, 1)))
    running = steps(job, feed(crops, (config.view_a, config.view_b), performance))
    _seconds_per_step(job, running, 2)
    seconds = _seconds_per_step(job, running, 10 if on_gpu else 2)
    kind = torch.profiler.ProfilerActivity
    kinds = [kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        _seconds_per_step(job, running, num_steps)
    profile.export_chrome_trace(str(path))
    done = activities(json.loads(path.read_bytes())["traceEvents"], on_gpu=on_gpu)
    flop = dict(work.flop)
    flop["products"] += step_costs.loss_flop_of_ranks(
        config.batch_size, config.projector[-1], ranks
    )
    return breakdown(done, num_steps, seconds, flop, work.bytes) if done else None


def _seconds_per_step(job: Job, running: Iterator[None], count: int) -> float:
    started = time.perf_counter()
    for _ in islice(running, count):
        pass
    synchronise(job.performance.device)
    return (time.perf_counter() - started) / count


class _Ranged(Performance):
    """Names the augmentation in a trace."""

    def augment(self, images: torch.Tensor, parameters: Draw) -> torch.Tensor:
        return _within(AUGMENT, super().augment)(images, parameters)


def _within(name: str, function: Callable) -> Callable:
    def named(*arguments):
        with torch.profiler.record_function(name):
            return function(*arguments)

    return named


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Steps of all ranks, seen by the first."""

    world_size: int
    alone: float  # seconds of a step of one rank without a process group
    step: float  # of all of them, each with as many images; neither with the loader
    efficiency: float
    latency: dict[str, float]  # seconds of a small all-reduce, by its size
    breakdown: Breakdown | None


def together(
    settings: Config,
    world: World,
    budget: float,
    scratch: Path,
    alone: tuple[float, step_costs.Work] | None = None,
) -> Together:
    """All ranks beside the first alone. Every rank calls it and waits here for the first.

    Args:
        settings: of one rank, whose batch every rank gets.
        alone: of the first rank: seconds of a step, and its work.
    """
    torch._dynamo.reset()
    gc.collect()  # what was compiled for the first rank alone makes room
    seconds, work = from_first(alone, world.group)
    job = build(replace(settings, batch_size=settings.batch_size * world.size), world)
    rehearse(job)
    running, count = steps(job, repeat(views_of(job))), max(2, min(20, round(budget / seconds)))
    spells = []
    for _ in range(4):
        wait_for_all(world.group)
        spells.append(_seconds_per_step(job, running, count))
    step = median(spells[1:])
    return Together(
        world_size=world.size,
        alone=seconds,
        step=step,
        efficiency=seconds / step,
        latency=_latency(settings, world, job.performance.device),
        breakdown=trace(job, work, scratch / f"trace-{world.rank}.json"),
    )


def _latency(settings: Config, world: World, device: torch.device) -> dict[str, float]:
    """Seconds of an all-reduce of two sums per channel, as batch norm sends them: medians."""
    group = world.new_group(device, size=settings.bn_group, timeout=settings.patience)
    found: dict[str, float] = {}
    if group is None:  # batch norm needs no other rank
        return found
    for channels, dtype in product((64, 512, 2048), (torch.float64, torch.float32)):
        sums = torch.zeros(2 * channels, dtype=dtype, device=device)

        def in_a_row(sums: torch.Tensor = sums) -> float:
            wait_for_all(world.group)
            synchronise(device)
            started = time.perf_counter()
            for _ in range(10):
                sums = all_sum(sums, group)
            synchronise(device)
            return (time.perf_counter() - started) / 10

        name = f"2 x {channels} {str(dtype).removeprefix('torch.')}"
        found[name] = median(in_a_row() for _ in range(20))
    return found
