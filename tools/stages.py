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
from bt_fast.build import TrainingSetup, build, rehearse
from bt_fast.config import Config
from bt_fast.distributed.collectives import World, all_sum, from_first, wait_for_all
from bt_fast.plan import step_costs
from bt_fast.prefetch import distort, feed
from bt_fast.runtime import Runtime, synchronise
from pipelines.augment import Draw
from pipelines.crop import cut
from pipelines.loading.native import IMAGES_PER_TASK
from tools.breakdown import AUGMENT, LOSS, Breakdown, activities, breakdown
from tools.timing import Stage, images_per_second, seconds_of_parts, seconds_per_call

_IMAGES_FOR_THREADS = 64


def loader_stages(setup: TrainingSetup, budget: float) -> Iterator[Stage]:
    """read, decode, crop, and the loader as a whole, by as many threads as the run has.

    read is fetching the bytes, from the disk or its cache, and their checksum.
    """
    n, cutter, cpu = setup.config.batch_size, setup.loader.cutter, torch.device("cpu")
    # Enough images to share them evenly among threads; times are brought to a batch.
    num_batches = -(-_IMAGES_FOR_THREADS // n)
    requests = list(setup.loader.steps.requests(0, num_batches))
    samples = np.concatenate([request.samples for request in requests])
    boxes = np.concatenate([request.boxes for request in requests])

    def threaded(function, items) -> Callable[[], list]:
        def some(first: int) -> list:
            return [function(item) for item in items[first : first + IMAGES_PER_TASK]]

        tasks = range(0, len(items), IMAGES_PER_TASK)
        return lambda: [result for part in cutter.pool.map(some, tasks) for result in part]

    def seconds(function, items) -> float:
        return seconds_per_call(threaded(function, items), cpu, budget)[0] / num_batches

    some = range(min(len(setup.reader), 20 * n))
    started = time.perf_counter()
    threaded(setup.reader.checksum_ok, some)()
    per_image = (time.perf_counter() - started) / len(some)
    num_bytes = sum(len(setup.reader.image(i)) for i in some) * n / len(some)
    yield Stage(name="read", seconds=per_image * n, bytes=num_bytes)
    yield Stage(name="decode", seconds=seconds(cutter.decode, samples))

    images = threaded(cutter.decode, samples)()
    side = setup.config.size
    crops = torch.empty((2, len(samples), side, side, 3), dtype=torch.uint8)

    def crop(row: int) -> None:
        for view in range(2):
            cut(images[row], boxes[row, view], out=crops[view, row])

    yield Stage(name="crop", seconds=seconds(crop, range(len(samples))))
    rate = images_per_second(setup.loader.batches(0, 1 << 40), n, cpu, 2 * budget)
    yield Stage(name="loader", seconds=n / rate)


def device_stages(setup: TrainingSetup, work: step_costs.Work, budget: float) -> Iterator[Stage]:
    """copy, augment, forward, backward, optimizer, loss, each alone.

    The optimizer comes before the loss: with CUDA graphs another compiled function may write over
    the gradients that the backward pass left.
    """
    runtime, device = setup.runtime, setup.runtime.device
    branches = setup.config.view_a, setup.config.view_b
    batch = next(setup.loader.batches(0, 1))

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
        lambda: distort(batch, branches, runtime),
        bytes=work.bytes["augmentation"],
        ceiling="memory",
    )

    views, z = distort(batch, branches, runtime), torch.empty(0)
    gradient = torch.randn(len(views), setup.config.projector[-1], device=device)

    def forward() -> None:
        nonlocal z
        setup.optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            z = setup.embed(views)

    parts = [forward, lambda: z.backward(gradient.to(z.dtype))]
    (first, _), (second, _) = seconds_of_parts(parts, device, budget)
    yield Stage(name="forward", seconds=first, flop=work.forward, ceiling="flops")
    yield Stage(name="backward", seconds=second, flop=work.backward, ceiling="flops")

    leaf = z.detach().clone().requires_grad_()
    train.set_learning_rates(setup, 0)
    guard = torch.zeros((), device=device)
    yield stage(
        "optimizer",
        lambda: setup.optimizer.step(guard=guard),
        bytes=work.bytes["optimizer"],
        ceiling="memory",
    )
    setup.optimizer.zero_grad(set_to_none=True)

    def loss() -> None:
        leaf.grad = None
        on_diagonal, off_diagonal = setup.objective(*leaf.chunk(2))
        (on_diagonal + setup.config.lambd * off_diagonal).backward()

    flop = step_costs.loss_flop_of_ranks(len(views) // 2, setup.config.projector[-1], 1)
    yield stage("loss", loss, flop=flop)  # in another precision than the ceiling's


def step_alone(setup: TrainingSetup, budget: float) -> float:
    """Seconds of a step on views that are on the device already."""
    n, device = setup.config.batch_size, setup.runtime.device
    return n / images_per_second(steps(setup, repeat(views_of(setup))), n, device, budget)


def step_from_jpegs(setup: TrainingSetup, budget: float) -> float:
    """Seconds of a step with the loader, the copy and the augmentation beside it."""
    n, branches = setup.config.batch_size, (setup.config.view_a, setup.config.view_b)
    batches = feed(setup.loader.batches(0, 1 << 40), branches, setup.runtime)
    return n / images_per_second(steps(setup, batches), n, setup.runtime.device, budget)


def views_of(setup: TrainingSetup) -> torch.Tensor:
    branches = setup.config.view_a, setup.config.view_b
    return distort(next(setup.loader.batches(0, 1)), branches, setup.runtime)


def steps(setup: TrainingSetup, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Steps of training, on views as `feed` gives them."""
    for views in batches:
        train.set_learning_rates(setup, 0)
        train.update(setup, views)
        yield


def trace(
    setup: TrainingSetup, work: step_costs.Work, path: Path, num_steps: int = 3
) -> Breakdown | None:
    """A step's breakdown: the whole step on crops that are there, everything but the loader. None
    where this user may not trace the GPU.

    Every rank of the setup must call it. Leaves the Chrome trace of `num_steps` steps in `path`.
    """
    config, device, ranks = setup.config, setup.runtime.device, setup.world.size
    on_gpu = device.type == "cuda"
    setup = replace(setup, objective=_within(LOSS, setup.objective))
    runtime = _Ranged(**dataclasses.asdict(setup.runtime))
    crops = repeat(next(setup.loader.batches(0, 1)))
    running = steps(setup, feed(crops, (config.view_a, config.view_b), runtime))
    _seconds_per_step(setup, running, 2)
    seconds = _seconds_per_step(setup, running, 10 if on_gpu else 2)
    kind = torch.profiler.ProfilerActivity
    kinds = [kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        _seconds_per_step(setup, running, num_steps)
    profile.export_chrome_trace(str(path))
    done = activities(json.loads(path.read_bytes())["traceEvents"], on_gpu=on_gpu)
    flop = dict(work.flop)
    flop["products"] += step_costs.loss_flop_of_ranks(
        config.batch_size, config.projector[-1], ranks
    )
    return breakdown(done, num_steps, seconds, flop, work.bytes) if done else None


def _seconds_per_step(setup: TrainingSetup, running: Iterator[None], count: int) -> float:
    started = time.perf_counter()
    for _ in islice(running, count):
        pass
    synchronise(setup.runtime.device)
    return (time.perf_counter() - started) / count


class _Ranged(Runtime):
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
    config: Config,
    world: World,
    budget: float,
    scratch: Path,
    alone: tuple[float, step_costs.Work] | None = None,
) -> Together:
    """All ranks beside the first alone. Every rank calls it and waits here for the first.

    Args:
        config: of one rank, whose batch every rank gets.
        alone: of the first rank: seconds of a step, and its work.
    """
    torch._dynamo.reset()
    gc.collect()  # what was compiled for the first rank alone makes room
    seconds, work = from_first(alone, world.group)
    setup = build(replace(config, batch_size=config.batch_size * world.size), world)
    rehearse(setup)
    running, count = steps(setup, repeat(views_of(setup))), max(2, min(20, round(budget / seconds)))
    spells = []
    for _ in range(4):
        wait_for_all(world.group)
        spells.append(_seconds_per_step(setup, running, count))
    step = median(spells[1:])
    return Together(
        world_size=world.size,
        alone=seconds,
        step=step,
        efficiency=seconds / step,
        latency=_latency(config, world, setup.runtime.device),
        breakdown=trace(setup, work, scratch / f"trace-{world.rank}.json"),
    )


def _latency(config: Config, world: World, device: torch.device) -> dict[str, float]:
    """Seconds of an all-reduce of two sums per channel, as batch norm sends them: medians."""
    group = world.new_group(device, size=config.bn_group, timeout=config.patience)
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
