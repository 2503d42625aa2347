"""All ranks of a launcher together, beside one of them alone; used by `profile.py`."""

import dataclasses
import gc
import itertools
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from bt_fast.config import Config
from bt_fast.dist import World, all_sum, from_first, wait_for_all
from bt_fast.job import build, rehearse
from bt_fast.perf import synchronise
from tools import stages
from tools.breakdown import Breakdown

_CHANNELS = (64, 512, 2048)  # of batch norms
_IN_A_ROW = 10  # collectives between two looks at the clock


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Steps of all ranks, seen by the first."""

    world_size: int
    alone: float  # seconds of a step of one rank without a process group
    step: float  # of all of them, each with as many images; neither with the loader
    latency: dict[str, float]  # seconds of a small all-reduce, by its size
    breakdown: Breakdown

    @property
    def efficiency(self) -> float:
        return self.alone / self.step


def measure(
    settings: Config, world: World, alone: float | None, budget: float, scratch: Path
) -> Together:
    """Every rank calls it; the others wait here until the first has measured a step alone.

    settings: of one rank, whose batch every rank gets.
    """
    torch._dynamo.reset()
    gc.collect()
    alone = from_first(alone, world.group)
    batch = settings.batch_size * world.size
    job = build(dataclasses.replace(settings, batch_size=batch), world)
    rehearse(job)
    device, count = job.performance.device, max(2, min(20, round(budget / alone)))
    running = stages.steps(job, itertools.repeat(stages.views_of(job)))

    def seconds_per_step() -> float:
        wait_for_all(world.group)
        started = time.perf_counter()
        for _ in islice(running, count):
            pass
        synchronise(device)
        return (time.perf_counter() - started) / count

    seconds = [seconds_per_step() for _ in range(4)][1:]
    return Together(
        world_size=world.size,
        alone=alone,
        step=median(seconds),
        latency=latency(settings, world, device),
        breakdown=stages.trace(job, scratch / f"trace-{world.rank}.json"),
    )


def latency(settings: Config, world: World, device: torch.device) -> dict[str, float]:
    """Seconds of an all-reduce of two sums per channel, as batch norm sends them: medians."""
    group = world.new_group(device, size=settings.bn_group, timeout=settings.patience)
    found = {}
    for channels, dtype in itertools.product(_CHANNELS, (torch.float64, torch.float32)):
        sums, seconds = torch.zeros(2 * channels, dtype=dtype, device=device), []
        for _ in range(20):
            wait_for_all(world.group)
            synchronise(device)
            started = time.perf_counter()
            for _ in range(_IN_A_ROW):
                sums = all_sum(sums, group)
            synchronise(device)
            seconds.append((time.perf_counter() - started) / _IN_A_ROW)
        found[f"2 x {channels} {str(dtype).removeprefix('torch.')}"] = median(seconds)
    return found
