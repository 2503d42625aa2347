"""The parts of `gpu_suite.py` that are benchmarks of single rooms: kernels and loader.

python tools/suite_parts.py NAME RESULT.json [DATA.beton]
"""

import _checkout  # noqa: F401  # isort: skip

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bt_fast import costs, perf
from bt_fast.cli import parse_pretrain
from bt_fast.feed import feed
from bt_fast.job import Job, build
from bt_fast.lars import LARS, parameter_groups
from bt_fast.model import BarlowTwins
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.flags import usable_cores
from pipelines.loader import NativeLoader
from pipelines.order import view_keys
from tools import reference, synthetic
from tools.stages import steps
from tools.timing import images_per_second, seconds_per_call

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BUDGET = 0.7 if ON_GPU else 0.05


class Results:
    """{table: {row: figures}}, written after every row; what fails is a row with its reason."""

    def __init__(self, path: Path) -> None:
        self.path, self.tables, self.num_failed = path, {}, 0

    def measure(self, table: str, row: str, function: Callable[[], dict[str, float]]) -> dict:
        try:
            figures = function()
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:300].replace("\n", " ")}
            self.num_failed += 1
        if ON_GPU:
            torch.cuda.empty_cache()
        print(f"{table}, {row}: {figures}", flush=True)
        self.tables.setdefault(table, {})[row] = figures
        self.path.write_text(json.dumps(self.tables))
        return figures


def kernels(results: Results) -> None:
    """Augmentation and LARS: every way there is, what counts most first."""
    augmentations(results)
    optimizers(results)
    if ON_GPU:
        tiles(results)


def batch_of_views() -> tuple[torch.Tensor, augment.Draw, int]:
    n, size = (512, 224) if ON_GPU else (8, 32)
    images = torch.randint(0, 256, (n, size // 8, size // 8, 3), dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2).contiguous()
    keys = view_keys(np.arange(n // 2), seed=0, epoch=0, view=0)
    draws = [augment.draw(branch, keys) for branch in (augment.VIEW_A, augment.VIEW_B)]
    return images.to(DEVICE), augment.join(*draws), n


def augmentations(results: Results) -> None:
    images, parameters, n = batch_of_views()

    def per_view(way: Callable[[], object]) -> dict[str, float]:
        seconds, host = seconds_per_call(way, DEVICE, BUDGET)
        return {"us per view": 1e6 * seconds / n, "host us per view": 1e6 * host / n}

    def fused() -> dict[str, float]:
        from pipelines import augment_triton

        return per_view(lambda: augment_triton.apply(images, parameters, dtype=torch.bfloat16))

    def compiled() -> dict[str, float]:
        there, function = parameters.to(DEVICE), torch.compile(augment.apply, dynamic=False)
        return per_view(lambda: function(images, there, dtype=torch.bfloat16))

    title = f"Augmentation, {n} views of {images.shape[1]} px, half of them view A"
    if ON_GPU:
        results.measure(title, "fused", fused)
    results.measure(
        title,
        "definition",
        lambda: per_view(lambda: augment.apply(images, parameters, dtype=torch.bfloat16)),
    )
    results.measure(title, "definition, compiled", compiled)


def tiles(results: Results) -> None:
    """The fused kernels at other tile sizes and numbers of warps."""
    from pipelines import augment_triton

    images, parameters, n = batch_of_views()
    for tile, warps in ((64, 4), (64, 8), (64, 16), (32, 4), (32, 2), (128, 8), (128, 16)):
        augment_triton.TILE, augment_triton.INNER = tile, tile - 2 * augment_triton.REACH
        augment_triton.NUM_WARPS = warps

        def way() -> dict[str, float]:
            seconds, _ = seconds_per_call(
                lambda: augment_triton.apply(images, parameters, dtype=torch.bfloat16),
                DEVICE,
                BUDGET / 2,
            )
            return {"us per view": 1e6 * seconds / n}

        results.measure("The fused augmentation otherwise", f"tile {tile}, {warps} warps", way)


def optimizers(results: Results) -> None:
    """One LARS step of ResNet-50 and its projector."""
    projector = (8192, 8192, 8192) if ON_GPU else (64, 64, 64)
    model = BarlowTwins("resnet50", projector).to(DEVICE).to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)

    ways = {
        "foreach": lambda: LARS(parameter_groups(parameters), 1e-6, weight_decay=1e-6, fused=False),
        "plain loop": lambda: reference.Lars(parameter_groups(parameters), 1e-6, weight_decay=1e-6),
    }
    if ON_GPU:
        ways = {
            "fused": lambda: LARS(parameter_groups(parameters), 1e-6, weight_decay=1e-6, fused=True)
        } | ways
    num_bytes = costs.lars_bytes(sum(p.numel() for p in parameters))
    for name, make in ways.items():

        def step_of(make=make) -> dict[str, float]:
            optimizer = make()
            seconds, host = seconds_per_call(optimizer.step, DEVICE, BUDGET)
            figures = {"ms": 1e3 * seconds, "host ms": 1e3 * host}
            return figures | {"GB/s": num_bytes / seconds / 1e9, "launches": launches(optimizer)}

        results.measure("LARS, ResNet-50 and its projector", name, step_of)


def launches(optimizer: torch.optim.Optimizer) -> int:
    """Kernels that one step launches, copies left out; 0 without a GPU."""
    if not ON_GPU:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
        for event in profile.events()
    )


def loader(results: Results, data: Path | None) -> None:
    """The native loader at 1, 2, 4 ... threads, and how far from linear."""
    with tempfile.TemporaryDirectory() as scratch:
        reader = BetonReader(data or synthetic.images(Path(scratch), 512))
        n = min(256, len(reader))
        alone: list[float] = []  # the rate of one thread
        for threads in [t for t in (1, 2, 4, 8, 16, 32) if t <= usable_cores()]:

            def way(threads=threads, alone=alone) -> dict[str, float]:
                native = NativeLoader(
                    reader,
                    RandomResizedCrop(),
                    batch_size=n,
                    num_threads=threads,
                    pin_memory=ON_GPU,
                )
                batches, cpu = native.batches(0, 1 << 40), torch.device("cpu")
                rate = images_per_second(batches, n, cpu, 5.0 if ON_GPU else 0.5)
                batches.close()  # type: ignore[attr-defined]
                native.cutter.pool.shutdown(cancel_futures=True)
                alone.append(rate)
                return {"images/s": rate, "efficiency": rate / (alone[0] * threads)}

            results.measure("The native loader", f"{threads} threads", way)


def dali(results: Results, data: Path | None) -> None:
    """Loading and training with DALI and with native: rates, and the cores kept busy meanwhile."""
    toy = ["--recipe=demo", "--size=32", "--batch-size=4", "--projector", "32", "32"]
    flags = ["--batch-size=256"] if ON_GPU else [*toy, "--device=cpu"]
    with tempfile.TemporaryDirectory() as scratch:
        path = data or synthetic.images(Path(scratch), 512)
        for name in ("native", "dali"):

            def built(name=name) -> Job:
                return build(parse_pretrain([*flags, "--data", str(path), "--loader", name]))

            def loading(built=built) -> dict[str, float]:
                job = built()
                return busy(job, job.loader.batches(0, 1 << 40))

            def training(built=built) -> dict[str, float]:
                job = built()
                branches = job.config.view_a, job.config.view_b
                views = feed(job.loader.batches(0, 1 << 40), branches, job.performance)
                return busy(job, steps(job, views))

            results.measure("Both views from JPEGs, nothing else going on", name, loading)
            results.measure("Training from JPEGs", name, training)


def busy(job: Job, batches: Iterator) -> dict[str, float]:
    """Images/s of an iterator of the job's batches, and CPU seconds a second meanwhile."""
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    device = job.performance.device
    rate = images_per_second(batches, job.config.batch_size, device, 8 * BUDGET)
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    batches.close()  # type: ignore[attr-defined]
    return {"images/s": rate, "cores": cores, "images per core and s": rate / cores}


def main() -> int:
    name, results = sys.argv[1], Results(Path(sys.argv[2]))
    data = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    perf.apply()
    parts = {
        "kernels": kernels,
        "loader": functools.partial(loader, data=data),
        "dali": functools.partial(dali, data=data),
    }
    parts[name](results)
    return min(results.num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
