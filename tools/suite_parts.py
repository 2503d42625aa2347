"""Parts of `gpu_suite.py`.

python tools/suite_parts.py NAME RESULT.json DATA.beton
"""

import _checkout  # noqa: F401  # isort: skip

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bt_fast import cli
from bt_fast.build import TrainingSetup, build
from bt_fast.cli import parse_pretrain
from bt_fast.config import Config, load_config
from bt_fast.lars import LARS, parameter_groups
from bt_fast.models.networks import BarlowTwins
from bt_fast.plan import step_costs
from bt_fast.prefetch import prefetch
from bt_fast.run.directory import read_metrics
from bt_fast.run.probe import READOUTS
from bt_fast.runtime import apply_switches
from bt_fast.step import measure_step_seconds
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.common.cpu import usable_cores
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.order import view_keys
from tools import bench_loss, bench_norm, profile, reference, rivals, stages
from tools.gpu_suite import is_installed
from tools.results import Results
from tools.timing import cpu_seconds, images_per_second, peak_memory, seconds_per_call

ON_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BUDGET = 0.5 if ON_GPU else 0.02
LEARNING_SECONDS = 240  # of training, without start and probes
TOY = ["--recipe=demo", "--size=32", "--batch-size=4", "--projector", "32", "32", "--device=cpu"]


def correctness(results: Results, data: Path) -> None:
    """Compare every CUDA implementation with its definition."""
    run_tests(results, 70, "tests/test_cuda.py", "-m", "not compiled")


def compiled(results: Results, data: Path) -> None:
    """Compare compiled functions with their definitions."""
    # The compilation caches of several processes are empty.
    run_tests(results, 150, "tests/test_cuda.py", "-m", "compiled")


def run_tests(results: Results, seconds: int, *arguments: str) -> None:
    """Run pytest in several processes; `seconds` is the timeout of a test."""
    import pytest

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")
    flags = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    if results.path is not None:
        flags += [f"--junitxml={results.path.with_name('junit.xml')}"]
    if is_installed("xdist"):
        flags += ["-n", str(min(12, usable_cores()))]
    if is_installed("pytest_timeout"):
        flags += [f"--timeout={seconds}"]
    else:  # prints where a test hangs; the time limit of the part ends it
        flags += ["-o", f"faulthandler_timeout={seconds}"]
    status = pytest.main([*flags, *arguments], plugins=[Outcomes(results)])
    results.num_failed += status != pytest.ExitCode.OK


class Outcomes:
    """A pytest plugin that records tests as they end and prints failures immediately."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            figures = {"outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                print(report.longreprtext, flush=True)
                figures["error"] = report.longreprtext.strip().splitlines()[-1]
            self.results.record("tests", report.nodeid, figures)


def kernels(results: Results, data: Path) -> None:
    """All implementations of norms, LARS and augmentation. Compiled functions come last."""
    if ON_GPU or INTERPRETS:
        bench_norm.measure(results, DEVICE, BUDGET / 20)
    optimizers(results)
    augmentations(results)


def batch_of_views() -> tuple[torch.Tensor, augment.Draw, int]:
    n, size = (512, 224) if ON_GPU else (8, 32)
    images = torch.randint(0, 256, (n, size // 8, size // 8, 3), dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2).contiguous()
    keys = view_keys(np.arange(n // 2), seed=0, epoch=0, view=0)
    parameters = augment.draw_views((augment.VIEW_A, augment.VIEW_B), (keys, keys))
    return images.to(DEVICE), parameters, n


def augmentations(results: Results) -> None:
    images, parameters, n = batch_of_views()

    def per_view(function: Callable[[], object]) -> dict[str, float]:
        seconds, host = seconds_per_call(function, DEVICE, BUDGET)
        return {"us per view": 1e6 * seconds / n, "host us per view": 1e6 * host / n}

    def fused() -> dict[str, float]:
        from pipelines.augment import triton as augment_triton

        return per_view(lambda: augment_triton.apply(images, parameters, dtype=torch.bfloat16))

    def compiled() -> dict[str, float]:
        on_device, function = parameters.to(DEVICE), torch.compile(augment.apply, dynamic=False)
        return per_view(lambda: function(images, on_device, dtype=torch.bfloat16))

    def kornia() -> dict[str, float]:
        views = [view.permute(0, 3, 1, 2).float() / 255 for view in images.chunk(2)]
        branches = [rivals.kornia_branch(branch) for branch in (augment.VIEW_A, augment.VIEW_B)]
        pairs = list(zip(branches, views, strict=True))
        return per_view(lambda: [branch(view) for branch, view in pairs])

    def definition() -> dict[str, float]:
        return per_view(lambda: augment.apply(images, parameters, dtype=torch.bfloat16))

    implementations = {"fused": fused} if ON_GPU else {}
    implementations["definition"] = definition
    if is_installed("kornia"):
        implementations["kornia"] = kornia
    implementations["definition, compiled"] = compiled
    title = f"Augmentation, {n} views of {images.shape[1]} px, half of them view A"
    for name, implementation in implementations.items():
        results.measure(title, name, implementation)


def optimizers(results: Results) -> None:
    """One LARS step of ResNet-50 and its projector."""
    config = Config() if ON_GPU else Config(encoder="resnet18", projector=(64, 64, 64))
    model = BarlowTwins(config).to(DEVICE).to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)

    groups = parameter_groups(parameters)
    implementations: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "foreach": lambda: LARS(groups, 1e-6, weight_decay=1e-6, fused=False),
        "plain loop": lambda: reference.Lars(groups, 1e-6, weight_decay=1e-6),
    }
    if ON_GPU:
        fused = {"fused": lambda: LARS(groups, 1e-6, weight_decay=1e-6, fused=True)}
        implementations = fused | implementations
    num_bytes = step_costs.lars_bytes(sum(p.numel() for p in parameters))

    def figures(make: Callable[[], torch.optim.Optimizer]) -> dict[str, float]:
        seconds, host = seconds_per_call(make().step, DEVICE, BUDGET)
        return {"ms": 1e3 * seconds, "host ms": 1e3 * host, "GB/s": num_bytes / seconds / 1e9}

    for name, make in implementations.items():
        results.measure("LARS, encoder and projector", name, partial(figures, make))


def variants(results: Results, data: Path) -> None:
    """Steps with other flags, and the default again for a comparison in the same process."""
    step_variant(results, data, "--norm=fused", "--compile=reduce-overhead")
    step_variant(results, data, "--norm=fused", "--compile=default")
    step_variant(results, data, "--norm=compiled", "--compile=default")
    step_variant(results, data, "--norm=compiled", "--compile=off")


def step_variant(results: Results, data: Path, *flags: str) -> None:
    """Time a step on views on the device with these flags; on a CPU one step, not compiled."""
    if not ON_GPU and (flags[-1] != "--compile=off" or ("fused" in flags[0] and not INTERPRETS)):
        return

    def figures() -> dict[str, float]:
        torch._dynamo.reset()
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        setup = setup_of(data, *flags, *([] if ON_GPU else ["--size=8", "--batch-size=2"]))
        measure_step_seconds(setup) if ON_GPU else next(
            stages.steps(setup, [stages.views_of(setup)])
        )
        prepared = time.perf_counter() - started
        seconds = stages.step_alone(setup, 3 * BUDGET) if ON_GPU else prepared
        return {
            "ms": 1e3 * seconds,
            "views/s": 2 * setup.config.batch_size / seconds,
            "peak GB": peak_memory(DEVICE) / 1e9,
            "s to prepare": prepared,
        }

    results.measure("Step variants, views on the device", " ".join(flags), figures)


def setup_of(data: Path, *flags: str) -> TrainingSetup:
    sizes = ["--batch-size=256"] if ON_GPU else TOY
    return build(parse_pretrain([*sizes, f"--data={data}", "--probe-every=0", *flags]))


def loader(results: Results, data: Path) -> None:
    """Rate and parallel efficiency of the native loader with 1, 2, 4 ... threads."""
    reader = BetonReader(data)
    n = min(256, len(reader))
    rates: list[float] = []  # the first is that of one thread

    def rate_of(threads: int) -> dict[str, float]:
        native = open_loader(
            "native", reader, RandomResizedCrop(), batch_size=n, num_threads=threads, device=DEVICE
        )
        batches = native.batches(0, 1 << 40)
        rate = images_per_second(batches, n, torch.device("cpu"), BUDGET)
        batches.close()  # type: ignore[attr-defined]
        rates.append(rate)
        return {"images/s": rate, "efficiency": rate / (rates[0] * threads)}

    for threads in [t for t in (1, 2, 4, 8, 16, 32) if t <= usable_cores()]:
        results.measure("The native loader", f"{threads} threads", partial(rate_of, threads))


def step(results: Results, data: Path) -> None:
    """A profile of the default step: profile.json, profile.png."""
    assert results.path is not None
    flags = [f"--data={data}", f"--out={results.path.parent}", f"--seconds={BUDGET}"]
    arguments = [*flags, *([] if ON_GPU else TOY)]
    results.num_failed += profile.profile(profile.parse(arguments))


def loss(results: Results, data: Path) -> None:
    """The objective and its gradient: dense, and from Gram matrices."""
    toy = ["--samples=64", "--dimensions", "256", "512"]
    flags = [f"--out={results.path}", f"--seconds={BUDGET}"]
    results.num_failed += bench_loss.main([*flags, *([] if ON_GPU else toy)])


def released_code(results: Results, data: Path) -> None:
    """The released code's stages, on the same images and device."""
    setup = setup_of(data, "--compile=off")
    n = setup.config.batch_size
    for name, seconds in rivals.reference_stages(setup, BUDGET):
        figures = {"ms": 1e3 * seconds, "images/s": n / seconds}
        results.record("The same stages of the released code", name, figures)


def evaluations(results: Results, data: Path) -> None:
    """Training from the command line, and every evaluation of its encoder: complete commands."""
    folder = Path(data.parent if results.path is None else results.path.parent, "evaluations")
    folder.mkdir()
    num_train, num_val, num_steps = (12_288, 2_048, 64) if ON_GPU else (64, 32, 2)
    images = folder / "images.beton"
    repeat_images(BetonReader(data), images, num_train)
    repeat_images(BetonReader(data), images.with_suffix(".val.beton"), num_val)
    sizes = ["--batch-size=256"] if ON_GPU else TOY
    run = str(folder / "run")
    training = ["pretrain", f"--data={images}", f"--run-dir={run}", "--probe-every=0"]
    commands = {
        "pretrain": ([*training, f"--max-steps={num_steps}", *sizes], num_steps * 256),
        "eval knn": (["eval", "knn", run], num_train + num_val),
        "eval linear --cached": (["eval", "linear", run, "--cached"], num_train + num_val),
        "eval linear, one epoch": (["eval", "linear", run, "--epochs=1"], num_train + num_val),
        "eval semi --percent 10, two epochs": (
            ["eval", "semi", run, "--percent=10", "--epochs=2"],
            2 * (num_train // 10 + num_val),
        ),
    }

    def complete(arguments: list[str], num_images: int) -> dict[str, float]:
        started = time.perf_counter()
        if status := cli.main(arguments):
            raise RuntimeError(f"exit status {status}")
        seconds = time.perf_counter() - started
        return {"s": seconds, "images/s": num_images / seconds}

    for name, (arguments, num_images) in commands.items():
        results.measure("Complete commands", name, partial(complete, arguments, num_images))


def learning(results: Results, data: Path) -> None:
    """Recipe cifar10 on `data`: rates of compile modes, then accuracies against training time."""
    folder = Path(data.parent if results.path is None else results.path.parent, "learning")
    flags = [f"--data={data}", *(["--recipe=cifar10"] if ON_GPU else TOY)]
    rates: dict[str, float] = {}

    def train(name: str, *more: str) -> list[dict]:
        run = str(folder / name)
        if status := cli.main(["pretrain", *flags, f"--run-dir={run}", *more]):
            raise RuntimeError(f"exit status {status}")
        return [record for _, record in read_metrics(folder / name / "metrics.jsonl")]

    def rate_of(mode: str) -> dict[str, float]:
        records = train(mode, "--max-steps=200", "--probe-every=0", f"--compile={mode}")
        rates[mode] = records[-1]["images_per_s"]
        return {"images/s": rates[mode]}

    for mode in ("default", "reduce-overhead") if ON_GPU else ("off",):
        results.measure("Recipe cifar10, 200 steps", f"--compile={mode}", partial(rate_of, mode))
    if not rates:
        return
    mode = max(rates, key=rates.__getitem__)
    num_images = len(BetonReader(data))
    fitting = int(LEARNING_SECONDS * rates[mode] / num_images)
    epochs = min(200, max(5, fitting)) if ON_GPU else 2
    every = max(1, epochs // 5)
    records = train("run", f"--epochs={epochs}", f"--compile={mode}", f"--probe-every={every}")
    batch_size = load_config(folder / "run", "learning").batch_size
    title = f"Recipe cifar10, {epochs} epochs of {num_images:,} images, --compile {mode}"
    seconds, step = 0.0, 0
    for record in records:
        if record["kind"] == "train":
            seconds += (record["step"] - step) * batch_size / record["images_per_s"]
            step = record["step"]
        else:
            readouts = {name: record[name] for name in READOUTS if name in record}
            figures = {"s of training": seconds} | readouts
            results.record(title, f"epoch {record['epoch']:g}", figures)
    shutil.copy(folder / "run" / "curves.png", folder.parent / "learning.png")


def repeat_images(reader: BetonReader, path: Path, count: int) -> None:
    """Write a data set of `count` images, those of the reader repeated, with ten classes."""
    names = [str(label) for label in range(10)]
    with BetonWriter(path, num_samples=count, class_names=names) as writer:
        for i in range(count):
            index = i % len(reader)
            jpeg = bytes(reader.image(index))
            writer.add(jpeg, *reader.size(index), index % 10, f"{i}.jpg")


def dali(results: Results, data: Path) -> None:
    """Rates and busy cores of loading and training with DALI and native."""

    def loading(name: str) -> dict[str, float]:
        setup = setup_of(data, f"--loader={name}")
        return throughput(setup, setup.loader.batches(0, 1 << 40))

    def training(name: str) -> dict[str, float]:
        setup = setup_of(data, f"--loader={name}")
        branches = setup.config.view_a, setup.config.view_b
        views = prefetch(setup.loader.batches(0, 1 << 40), branches, setup.runtime)
        return throughput(setup, stages.steps(setup, views))

    for name in ("native", "dali"):
        results.measure("Both views from JPEGs, loader alone", name, partial(loading, name))
        results.measure("Training from JPEGs", name, partial(training, name))


def throughput(setup: TrainingSetup, batches: Iterator) -> dict[str, float]:
    """Images/s of an iterator of the setup's batches, and CPU seconds per second."""
    next(batches)
    wall, cpu = time.perf_counter(), cpu_seconds()
    device = setup.runtime.device
    rate = images_per_second(batches, setup.config.batch_size, device, 8 * BUDGET)
    cores = (cpu_seconds() - cpu) / (time.perf_counter() - wall)
    batches.close()  # type: ignore[attr-defined]
    return {"images/s": rate, "cores": cores, "images per core and s": rate / cores}


PARTS: dict[str, Callable[[Results, Path], None]] = {
    "correctness": correctness,
    "step": step,
    "kernels": kernels,
    "variants": variants,
    "rivals": released_code,
    "loader": loader,
    "loss": loss,
    "evaluations": evaluations,
    "compiled": compiled,
    "dali": dali,
    "learning": learning,
}


def main() -> int:
    name, path, data = sys.argv[1:]
    results = Results(Path(path))
    apply_switches()
    PARTS[name](results, Path(data))
    return min(results.num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
