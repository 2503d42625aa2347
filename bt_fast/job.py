"""Everything a run is made of, built from its configuration, tried out, and described."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bt_fast import perf
from bt_fast.config import Config
from bt_fast.evaluate.knn import KnnData, choose_data
from bt_fast.lars import LARS
from bt_fast.log import duration
from bt_fast.loss import correlation_terms
from bt_fast.model import BarlowTwins, flatten_batch_statistics
from bt_fast.perf import Performance
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loader import NativeLoader


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run is made of, built from its configuration."""

    config: Config
    performance: Performance
    reader: BetonReader
    data_facts: dict[str, int | str | None]  # what a resumed run's order depends on
    loader: NativeLoader
    knn_data: KnnData | None
    model: BarlowTwins
    statistics: torch.Tensor  # all batch statistics of the model, one tensor
    optimizer: LARS
    last_step: int


def build(settings: Config) -> Job:
    """Everything but the run directory. Raises ValueError for what cannot be trained."""
    if settings.gpus not in (None, 1):
        raise ValueError(f"--gpus {settings.gpus}: only one process is supported so far")
    if settings.loader not in ("auto", "native"):
        raise ValueError(f"--loader {settings.loader} is not available yet; use native")
    performance = perf.choose(settings.device, settings.precision, settings.compile)
    perf.apply()

    reader = open_data(settings.data, "--data")
    val = open_val(settings.data, settings.val_data)
    loader = NativeLoader(
        reader,
        RandomResizedCrop(size=settings.size, scale=(settings.min_scale, 1.0)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_threads=settings.num_threads,
        pin_memory=performance.device.type == "cuda",
        cache_bytes=int(settings.cache_gb * 1e9),
    )

    torch.manual_seed(settings.seed)  # the initialisation; drawn on the CPU, alike everywhere
    model = BarlowTwins(settings.encoder, settings.projector, small_images=settings.small_images)
    perf.prepare(model, performance)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return Job(
        config=settings,
        performance=performance,
        reader=reader,
        data_facts={"images": len(reader), "sha256": reader.sha256()},
        loader=loader,
        knn_data=choose_data(reader, val, settings.seed, settings.probe_images),
        model=model,
        statistics=flatten_batch_statistics(model),
        optimizer=LARS(
            [{"params": matrices}, {"params": vectors}],
            lr=0.0,
            weight_decay=settings.weight_decay,
        ),
        last_step=min(
            settings.epochs * loader.steps_per_epoch,
            settings.max_steps if settings.max_steps is not None else 2**62,
        ),
    )


def open_data(path: Path, flag: str) -> BetonReader:
    if not path.exists():
        raise ValueError(
            f"{flag} {path} does not exist; make it with: bt-convert IMAGE_FOLDER {path}"
        )
    return BetonReader(path)


def open_val(data: Path, val_data: Path | None) -> BetonReader | None:
    """The held-out images: the ones named, else what bt-convert left beside the training file."""
    if val_data is not None:
        return open_data(val_data, "--val-data")
    beside = data.with_suffix(f".val{data.suffix}")
    return BetonReader(beside) if beside.exists() else None


def rehearse(job: Job) -> float:
    """Run forward and backward on noise and forget it -> expected seconds per step.

    On a GPU it compiles, allocates, and finds out before the run starts whether a step fits in
    memory. A CPU rehearses with a part of the batch, ten 224 px images' worth, and scales the time.
    """
    settings, device = job.config, job.performance.device
    n = settings.batch_size
    if device.type == "cpu":
        n = min(n, max(2, 10 * 224**2 // settings.size**2))
    noise = torch.randn(n, 3, settings.size, settings.size, device=device)
    noise = noise.to(job.performance.view_dtype, memory_format=torch.channels_last)
    before = job.statistics.clone()
    for _ in range(2):
        perf.synchronise(device)
        started = time.perf_counter()
        with job.performance.autocast():
            z_a, z_b = job.model(noise), job.model(noise)
        invariance, redundancy = correlation_terms(z_a, z_b)
        (invariance + redundancy).backward()
        job.optimizer.zero_grad(set_to_none=True)
        perf.synchronise(device)
        seconds = time.perf_counter() - started
    with torch.no_grad():
        job.statistics.copy_(before)
    for name, buffer in job.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return seconds * settings.batch_size / n


def describe(job: Job, seconds_per_step: float) -> dict[str, str]:
    """The rows of the table shown before a run starts."""
    settings, performance = job.config, job.performance
    parameters = [sum(p.numel() for p in part.parameters()) / 1e6 for part in job.model.children()]
    schedule = f"{settings.epochs} epochs x {job.loader.steps_per_epoch} steps"
    if job.last_step < settings.epochs * job.loader.steps_per_epoch:
        schedule += f", stopping after {job.last_step}"
    warmup = f"{settings.effective_warmup_epochs:g} epochs"
    if settings.effective_warmup_epochs != settings.warmup_epochs:
        warmup += f" (--warmup-epochs {settings.warmup_epochs:g} is not shorter than the run)"
    projector = "-".join(map(str, settings.projector))
    return {
        "recipe": settings.recipe,
        "data": f"{len(job.reader)} images, {job.reader.num_classes} classes in {settings.data}",
        "views": f"2 x {settings.size} px, crops from {settings.min_scale:g} of the area",
        "model": f"{settings.encoder} ({parameters[0]:.1f} M) +"
        f" projector {projector} ({parameters[1]:.1f} M)",
        "batch": f"{settings.batch_size} images",
        "steps": schedule,
        "warm-up": warmup,
        "device": f"{performance.device.type}, {performance.precision},"
        f" {'compiled' if performance.compile else 'not compiled'},"
        f" {settings.num_threads} decoding threads",
        "kNN probe": job.knn_data.description if job.knn_data else "none (no classes)",
        "estimated time": f"{duration(seconds_per_step * job.last_step)}"
        f" ({settings.batch_size / seconds_per_step:.0f} images/s, without data and probes)",
    }
