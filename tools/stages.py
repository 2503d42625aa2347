"""Stages of a training step, a traced step, and a step of all ranks; used by `profile.py`.

The time of a stage is wall-clock time on a CPU, and the busy time of its kernels and copies on a
GPU.
"""

import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bt_fast import train
from bt_fast.build import TrainingSetup, build
from bt_fast.config import Config
from bt_fast.distributed.collectives import World, barrier, broadcast_object
from bt_fast.loss import weighted_sum
from bt_fast.plan import step_costs
from bt_fast.prefetch import augment_batch, prefetch
from bt_fast.runtime import Runtime, synchronise
from bt_fast.step import measure_step_seconds
from pipelines.augment import Draw
from pipelines.crop import crop_and_resize
from pipelines.loading.native import IMAGES_PER_TASK, NativeBackend
from tools.breakdown import AUGMENT, Breakdown, Work, activities, breakdown
from tools.timing import Stage, images_per_second, seconds_of_parts, seconds_per_call


def loader_stages(setup: TrainingSetup, budget: float) -> Iterator[Stage]:
    """Times read, decode, crop and the complete loader, with the threads of the run.

    On a GPU each worker is a process; times are those of one thread, divided by the workers.
    read fetches the bytes from the disk or the page cache and verifies their checksum.
    """
    n, cpu = setup.config.batch_size, torch.device("cpu")
    has_processes = setup.runtime.device.type == "cuda"
    num_processes = setup.num_threads if has_processes else 1
    backend = NativeBackend(setup.dataset, num_threads=setup.num_threads // num_processes)
    # Enough images to divide them evenly among threads; times are scaled to a batch.
    num_batches = -(-64 // n)
    requests = list(setup.loader.sampler.requests(0, num_batches))
    samples = np.concatenate([request.samples for request in requests])
    boxes = np.concatenate([request.boxes for request in requests])

    def threaded(function, items) -> Callable[[], list]:
        def task(first: int) -> list:
            return [function(item) for item in items[first : first + IMAGES_PER_TASK]]

        tasks = range(0, len(items), IMAGES_PER_TASK)
        return lambda: [result for part in backend.pool.map(task, tasks) for result in part]

    def seconds(function, items) -> float:
        return (
            seconds_per_call(threaded(function, items), cpu, budget)[0]
            / num_batches
            / num_processes
        )

    indices = range(min(len(setup.dataset), 20 * n))
    started = time.perf_counter()
    threaded(setup.dataset.checksum_ok, indices)()
    per_image = (time.perf_counter() - started) / len(indices) / num_processes
    num_bytes = sum(len(setup.dataset.image(i)) for i in indices) * n / len(indices)
    yield Stage(name="read", seconds=per_image * n, bytes=num_bytes)
    yield Stage(name="decode", seconds=seconds(backend.decoder.decode, samples))

    images = threaded(backend.decoder.decode, samples)()
    side = setup.config.size
    crops = np.empty((2, len(samples), side, side, 3), np.uint8)

    def crop(row: int) -> None:
        for view in range(2):
            crop_and_resize(images[row], boxes[row, view], out=crops[view, row])

    yield Stage(name="crop", seconds=seconds(crop, range(len(samples))))
    rate = images_per_second(setup.loader.batches(0, 1 << 40), n, cpu, 2 * budget)
    yield Stage(name="loader", seconds=n / rate)


def device_stages(setup: TrainingSetup, work: Work, budget: float) -> Iterator[Stage]:
    """Times copy, augment, forward, backward, optimizer and loss, each alone.

    The optimizer precedes the loss: with CUDA graphs, another compiled function may overwrite the
    gradients of the backward pass.
    """
    runtime, device = setup.runtime, setup.runtime.device
    branches = setup.config.view_a, setup.config.view_b
    batch = next(setup.loader.batches(0, 1))

    def stage(name: str, function: Callable[[], object], ceiling: str = "", **counted) -> Stage:
        seconds, _ = seconds_per_call(function, device, budget)
        return Stage(name=name, seconds=seconds, ceiling=ceiling, **counted)

    if device.type == "cuda":
        host = batch.views.cpu().pin_memory()
        batch = replace(batch, views=host.to(device))
        yield stage("copy", lambda: host.to(device, non_blocking=True), "link", bytes=host.nbytes)
    counted = work.bytes["augmentation"]
    yield stage("augment", lambda: augment_batch(batch, branches, runtime), "memory", bytes=counted)

    views, z = augment_batch(batch, branches, runtime), torch.empty(0)
    gradient = torch.randn(len(views), setup.config.projector[-1], device=device)
    setup.drop_paths.draw(0, len(views) // 2)
    setup.drop_paths.use()

    def forward() -> None:
        nonlocal z
        setup.optimizer.zero_grad(set_to_none=True)
        with setup.autocast:
            z = setup.embed(views)

    parts = [forward, lambda: z.backward(gradient.to(z.dtype))]
    (first, _), (second, _) = seconds_of_parts(parts, device, budget)
    yield Stage(name="forward", seconds=first, flop=work.forward, ceiling="flops")
    yield Stage(name="backward", seconds=second, flop=work.backward, ceiling="flops")

    leaf = z.detach().clone().requires_grad_()
    train.set_learning_rates(setup, 0)
    guard, counted = torch.zeros((), device=device), work.bytes["optimizer"]
    yield stage("optimizer", lambda: setup.optimizer.step(guard=guard), "memory", bytes=counted)
    setup.optimizer.zero_grad(set_to_none=True)

    def loss() -> None:
        leaf.grad = None
        on_diagonal, off_diagonal = setup.objective(*leaf.chunk(2))
        weighted_sum(on_diagonal, off_diagonal, setup.config.lambd).backward()

    flop = step_costs.auto_loss_flop(len(views) // 2, setup.config.projector[-1], 1)
    yield stage("loss", loss, flop=flop)  # no ceiling: another precision


def step_alone(setup: TrainingSetup, budget: float) -> float:
    """Seconds of a step on views on the device."""
    n, device = setup.config.batch_size, setup.runtime.device
    return n / images_per_second(steps(setup, repeat(views_of(setup))), n, device, budget)


def step_from_jpegs(setup: TrainingSetup, budget: float) -> float:
    """Seconds of a step with loader, copy and augmentation."""
    n, branches = setup.config.batch_size, (setup.config.view_a, setup.config.view_b)
    batches = prefetch(setup.loader.batches(0, 1 << 40), branches, setup.runtime)
    return n / images_per_second(steps(setup, batches), n, setup.runtime.device, budget)


def views_of(setup: TrainingSetup) -> torch.Tensor:
    branches = setup.config.view_a, setup.config.view_b
    return augment_batch(next(setup.loader.batches(0, 1)), branches, setup.runtime)


def steps(setup: TrainingSetup, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Training steps on views from `prefetch`."""
    for views in batches:
        train.set_learning_rates(setup, 0)
        setup.drop_paths.draw(0, len(views) // 2)
        train.update(setup, views)
        yield


def trace(setup: TrainingSetup, work: Work, num_steps: int = 3) -> Breakdown | None:
    """Breakdown of a step without the loader. None if this user may not trace the GPU.

    Every rank of the setup must call it.
    """
    config, ranks = setup.config, setup.world.size
    on_gpu = setup.runtime.device.type == "cuda"
    runtime = _Ranged(**dataclasses.asdict(setup.runtime))
    crops = repeat(next(setup.loader.batches(0, 1)))
    running = steps(setup, prefetch(crops, (config.view_a, config.view_b), runtime))
    _seconds_per_step(setup, running, 2)
    seconds = _seconds_per_step(setup, running, 10 if on_gpu else 2)
    activity = torch.profiler.ProfilerActivity
    traced = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=traced, acc_events=True) as profile:
        _seconds_per_step(setup, running, num_steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        done = activities(json.loads(path.read_bytes())["traceEvents"], on_gpu=on_gpu)
    flop = dict(work.flop)
    flop["products"] += step_costs.auto_loss_flop(config.batch_size, config.projector[-1], ranks)
    return breakdown(done, num_steps, seconds, flop, work.bytes) if done else None


def _seconds_per_step(setup: TrainingSetup, running: Iterator[None], count: int) -> float:
    started = time.perf_counter()
    for _ in islice(running, count):
        pass
    synchronise(setup.runtime.device)
    return (time.perf_counter() - started) / count


class _Ranged(Runtime):
    """Adds the named range of the augmentation to a trace."""

    def augmentation(self) -> Callable[[torch.Tensor, Draw], torch.Tensor]:
        return torch.profiler.record_function(AUGMENT)(super().augmentation())


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """A step of all ranks, measured by the first rank."""

    world_size: int
    alone: float  # seconds of a step of one rank without a process group
    step: float  # seconds of a step of all ranks with the same local batch, both without loader
    efficiency: float
    breakdown: Breakdown | None


def together(
    config: Config, world: World, budget: float, alone: tuple[float, Work] | None = None
) -> Together:
    """Measures all ranks and compares with one alone. Every rank calls it and waits for the first.

    Args:
        config: configuration with the batch of one rank.
        alone: seconds and work of a step of the first rank alone; None on the other ranks.
    """
    torch._dynamo.reset()
    gc.collect()  # frees memory of functions compiled for the first rank alone
    seconds, work = broadcast_object(alone, world.group)
    setup = build(replace(config, batch_size=config.batch_size * world.size), world)
    measure_step_seconds(setup)
    running, count = steps(setup, repeat(views_of(setup))), max(2, min(20, round(budget / seconds)))
    times = []
    for _ in range(4):
        barrier(world.group)
        times.append(_seconds_per_step(setup, running, count))
    step = median(times[1:])
    return Together(
        world_size=world.size,
        alone=seconds,
        step=step,
        efficiency=seconds / step,
        breakdown=trace(setup, work),
    )
