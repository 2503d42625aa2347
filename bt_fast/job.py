"""Everything a run is made of, built from its configuration, tried out, and described."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bt_fast import norm, perf
from bt_fast.config import Config
from bt_fast.dist import ALONE, World
from bt_fast.evaluate.knn import KnnData, choose_data
from bt_fast.feed import LEAD
from bt_fast.lars import LARS, parameter_groups
from bt_fast.log import duration
from bt_fast.loss_variants import objective_terms
from bt_fast.model import BarlowTwins, flatten_batch_statistics
from bt_fast.perf import Performance
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loader import NativeLoader


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run is made of, built from its configuration."""

    config: Config
    world: World
    performance: Performance
    num_threads: int  # that decode, of this rank
    reader: BetonReader
    data_facts: dict[str, int | str | None]  # what a resumed run's order depends on
    loader: NativeLoader
    knn_data: KnnData | None
    model: BarlowTwins
    embed: Callable[[torch.Tensor], torch.Tensor]  # the model's forward pass, perhaps compiled
    objective: Callable  # the loss's two terms, perhaps compiled
    statistics: torch.Tensor  # all batch statistics of the model, one tensor
    optimizer: LARS
    last_step: int


def build(settings: Config, world: World = ALONE) -> Job:
    """Everything but the run directory. Raises ValueError for what cannot be trained."""
    if settings.loader not in ("auto", "native"):
        raise ValueError(f"--loader {settings.loader} is not available yet; use native")
    performance = perf.choose(
        settings.device, settings.precision, settings.compile, world.local_rank
    )
    perf.apply(deterministic=settings.deterministic)

    num_threads = settings.num_threads(world.local_size)
    reader = open_data(settings.data, "--data")
    val = open_val(settings.data, settings.val_data)
    loader = NativeLoader(
        reader,
        RandomResizedCrop(size=settings.size, scale=(settings.min_scale, 1.0)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
        num_threads=num_threads,
        pin_memory=performance.device.type == "cuda",
        cache_bytes=int(settings.cache_gb * 1e9),
        size_of=settings.size_of,
    )

    torch.manual_seed(settings.seed)  # the initialisation; drawn on the CPU, alike everywhere
    model = build_model(settings)
    perf.prepare(model, performance)
    norm.over_ranks(model, world.subgroup(settings.bn_group))
    return Job(
        config=settings,
        world=world,
        num_threads=num_threads,
        performance=performance,
        reader=reader,
        data_facts={"images": len(reader), "sha256": reader.sha256()},
        loader=loader,
        knn_data=choose_data(reader, val, settings.seed, settings.probe_images),
        model=model,
        embed=performance.compiled(data_parallel(model, settings, world)),
        objective=performance.compiled(
            functools.partial(
                objective_terms,
                settings.objective,
                temperature=settings.temperature,
                group=world.group,
            )
        ),
        statistics=flatten_batch_statistics(model),
        optimizer=LARS(
            parameter_groups(model.parameters()), lr=0.0, weight_decay=settings.weight_decay
        ),
        last_step=min(
            settings.epochs * loader.steps_per_epoch,
            settings.max_steps if settings.max_steps is not None else 2**62,
        ),
    )


def build_model(settings: Config) -> BarlowTwins:
    """The configured networks, initialised by torch's generator."""
    return BarlowTwins(
        settings.encoder,
        settings.projector,
        small_images=settings.small_images,
        projector_norm=settings.projector_norm,
        predictor=settings.predictor,
        stop_gradient=settings.stop_gradient,
    )


def data_parallel(model: BarlowTwins, settings: Config, world: World) -> torch.nn.Module:
    """The model, its gradients averaged over ranks in buckets while the backward pass goes on."""
    if world.size == 1:
        return model
    # Batch statistics are alike on every rank already. (The flag was renamed in torch 2.14.)
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
    parallel = DistributedDataParallel(model, **options)
    if settings.compress_gradients:
        parallel.register_comm_hook(world.group, bf16_compress_hook)
    return parallel


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


def rehearse(job: Job) -> dict[int, float]:
    """Run forward and backward on noise and forget it -> {size: expected seconds per step}.

    On a GPU it compiles, allocates, and finds out before the run starts whether a step fits in
    memory, at every size the views will have. A CPU rehearses only the last size with a part of
    the batch, ten 224 px images' worth, and scales the time.
    """
    settings, device = job.config, job.performance.device
    before = job.statistics.clone()
    seconds: dict[int, float] = {}
    for size in sorted({settings.size_of(epoch) for epoch in range(settings.epochs)}, reverse=True):
        if device.type == "cpu" and seconds:
            seconds[size] = seconds[settings.size] * (size / settings.size) ** 2
            continue
        share = n = settings.batch_size // job.world.size
        if device.type == "cpu":
            n = min(n, max(2, 10 * 224**2 // size**2))
        for _ in range(2 if device.type == "cpu" else 3):  # the first compiles, then graphs record
            perf.synchronise(device)
            started = time.perf_counter()
            _forward_and_backward(job, n, size)
            perf.synchronise(device)
        seconds[size] = (time.perf_counter() - started) * share / n
    with torch.no_grad():
        job.statistics.copy_(before)
    for name, buffer in job.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return seconds


def _forward_and_backward(job: Job, n: int, size: int) -> None:
    """On noise, with as much memory taken beside it as the batches that are on their way."""
    noise = torch.randn(2 * n, 3, size, size, device=job.performance.device)
    noise = noise.to(job.performance.view_dtype, memory_format=torch.channels_last)
    ahead = [torch.empty_like(noise) for _ in range(LEAD)] if noise.is_cuda else []
    with job.performance.autocast():
        z_a, z_b = job.embed(noise).chunk(2)
    invariance, redundancy = job.objective(z_a, z_b)
    (invariance + redundancy).backward()
    job.optimizer.step(guard=torch.full_like(invariance.detach(), torch.nan))  # changes nothing
    job.optimizer.zero_grad(set_to_none=True)
    del ahead


def expected_seconds(job: Job, seconds_per_step: dict[int, float]) -> float:
    """Of the whole run, without data and probes."""
    settings, per_epoch = job.config, job.loader.steps_per_epoch
    return sum(
        seconds_per_step[settings.size_of(epoch)]
        * min(per_epoch, job.last_step - epoch * per_epoch)
        for epoch in range(-(-job.last_step // per_epoch))
    )


def describe(job: Job, seconds_per_step: dict[int, float]) -> dict[str, str]:
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
    seconds = expected_seconds(job, seconds_per_step)
    return {
        "recipe": settings.title,
        "data": f"{len(job.reader)} images, {job.reader.num_classes} classes in {settings.data}",
        "views": f"2 x {settings.resolution or settings.size} px,"
        f" crops from {settings.min_scale:g} of the area",
        "model": f"{settings.encoder} ({parameters[0]:.1f} M) +"
        f" projector {projector} ({parameters[1]:.1f} M)"
        + (f" + predictor ({parameters[2]:.1f} M)" if settings.predictor else ""),
        "objective": settings.objective + f", lambda {settings.lambd:g}",
        "batch": f"{settings.batch_size} images"
        + (
            f", {settings.batch_size // job.world.size} on each of {job.world.size} ranks"
            if job.world.size > 1
            else ""
        ),
        "steps": schedule,
        "warm-up": warmup,
        "device": f"{performance.device.type}, {performance.precision},"
        f" torch.compile {performance.compile},"
        f" {job.num_threads} decoding threads",
        "kNN probe": job.knn_data.description if job.knn_data else "none (no classes)",
        "estimated time": f"{duration(seconds)}"
        f" ({settings.batch_size * job.last_step / seconds:.0f} images/s, without data and probes)",
    }
