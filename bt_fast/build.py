"""Everything a run is made of, built from its configuration, tried out, and described."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bt_fast import runtime
from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, Group, World, from_first
from bt_fast.evaluate.knn_classifier import KnnData, choose_data
from bt_fast.lars import LARS, parameter_groups
from bt_fast.loss_variants import objective_terms
from bt_fast.models import batch_norm
from bt_fast.models.batch_norm import RunningStatistics
from bt_fast.models.networks import BarlowTwins
from bt_fast.prefetch import IN_MEMORY
from bt_fast.run.console import duration
from bt_fast.runtime import Performance
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import (
    BATCH,
    Data,
    Loader,
    choose_backend,
    open_data,
    open_loader,
    open_val,
)


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run is made of, built from its configuration."""

    config: Config  # the loader settled
    world: World
    performance: Performance
    num_threads: int  # that decode, of this rank
    reader: Data
    data_facts: dict[str, int | str | None]  # what a resumed run's order depends on
    loader: Loader
    loader_choice: str  # which it is, and why
    knn_data: KnnData | None
    model: BarlowTwins
    embed: Callable[[torch.Tensor], torch.Tensor]  # the model's forward pass, perhaps compiled
    objective: Callable  # the loss's two terms, perhaps compiled
    statistics: RunningStatistics  # of the model's batch norms
    optimizer: LARS
    last_step: int


def build(settings: Config, world: World = ALONE) -> Job:
    """Everything but the run directory. Raises ValueError for what cannot be trained."""
    performance = runtime.choose(
        settings.device, settings.precision, settings.compile, world.local_rank
    )
    runtime.apply(deterministic=settings.deterministic)

    num_threads = settings.num_threads(world.local_size)
    reader = open_data(settings.data, "--data")
    val = open_val(settings.data, settings.val_data)
    loader, choice, settings = choose_loader(settings, world, reader, performance.device)

    torch.manual_seed(settings.seed)  # the initialisation; drawn on the CPU, alike everywhere
    model = build_model(settings)
    runtime.prepare(model, performance)
    norm_group, loss_group = communicators(settings, world, performance.device)
    batch_norm.over_ranks(model, norm_group)
    if batch_norm.choose(settings.norm, performance.device) == "fused":
        batch_norm.fuse(model)
    return Job(
        config=settings,
        world=world,
        num_threads=num_threads,
        performance=performance,
        reader=reader,
        data_facts={"images": len(reader), "sha256": reader.sha256()},
        loader=loader,
        loader_choice=choice,
        knn_data=choose_data(reader, val, settings.seed, settings.probe_images),
        model=model,
        embed=performance.compiled(data_parallel(model, settings, world)),
        objective=performance.compiled(
            functools.partial(
                objective_terms,
                settings.objective,
                temperature=settings.temperature,
                group=loss_group,
            )
        ),
        statistics=RunningStatistics(model),
        optimizer=LARS(
            parameter_groups(model.parameters()), lr=0.0, weight_decay=settings.weight_decay
        ),
        last_step=last_step_of(settings, loader.steps_per_epoch),
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


def choose_loader(
    settings: Config, world: World, reader: Data, device: torch.device
) -> tuple[Loader, str, Config]:
    """This rank's loader, why it is that one, and the configuration that names it.

    The first rank measures, if that is asked for, and tells the others.
    """
    make = functools.partial(
        open_loader,
        data=reader,
        crop=RandomResizedCrop(size=settings.size, scale=(settings.min_scale, 1.0)),
        device=device,
        num_threads=settings.num_threads(world.local_size),
        seed=settings.seed,
    )
    share = settings.batch_size // world.size
    chosen = world.is_first and choose_backend(
        settings.loader,
        reader,
        settings.batch_size * last_step_of(settings, len(reader) // settings.batch_size),
        functools.partial(make, batch_size=max(min(BATCH, share, len(reader)), 1)),
        cache=settings.cache_gb > 0,
        device=device,
    )
    name, why = from_first(chosen, world.group)
    loader = make(
        name,
        batch_size=settings.batch_size,
        rank=world.rank,
        world_size=world.size,
        cache_bytes=int(settings.cache_gb * 1e9),
        size_of=settings.size_of,
    )
    return loader, why, replace(settings, loader=name)


def communicators(settings: Config, world: World, device: torch.device) -> tuple[Group, Group]:
    """(batch norm's, the loss's). Gradients travel on the world's own group."""
    timeout = settings.patience
    shared = world.group
    if settings.separate_communicators:
        shared = world.new_group(device, timeout=timeout)
    if settings.bn_group in (0, world.size):
        return shared, shared
    return world.new_group(device, size=settings.bn_group, timeout=timeout), shared


def last_step_of(settings: Config, steps_per_epoch: int) -> int:
    """Of the run: the schedule's end, or --max-steps."""
    end = settings.epochs * steps_per_epoch
    return min(end, settings.max_steps if settings.max_steps is not None else end)


def data_parallel(model: BarlowTwins, settings: Config, world: World) -> torch.nn.Module:
    """The model, its gradients averaged over ranks in buckets while the backward pass goes on."""
    if world.group is None:
        return model
    # Batch statistics are alike on every rank already. (The flag was renamed in torch 2.14.)
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"process_group": world.group, "gradient_as_bucket_view": True}
    options[sync] = False
    parallel = DistributedDataParallel(model, **options)
    if settings.compress_gradients:
        parallel.register_comm_hook(world.group, bf16_compress_hook)
    return parallel


def rehearse(job: Job) -> dict[int, float]:
    """Run forward and backward on noise and forget it -> {size: expected seconds per step}.

    On a GPU it compiles, allocates, and finds out before the run starts whether a step fits in
    memory, at every size the views will have. A CPU rehearses only the last size with a part of
    the batch, ten 224 px images' worth, and scales the time.
    """
    settings, device = job.config, job.performance.device
    seconds: dict[int, float] = {}
    for size in sorted({settings.size_of(epoch) for epoch in range(settings.epochs)}, reverse=True):
        if device.type == "cpu" and seconds:
            seconds[size] = seconds[settings.size] * (size / settings.size) ** 2
            continue
        share = n = settings.batch_size // job.world.size
        if device.type == "cpu":
            n = min(n, max(2, 10 * 224**2 // size**2))
        for _ in range(2 if device.type == "cpu" else 3):  # the first compiles, then graphs record
            runtime.synchronise(device)
            started = time.perf_counter()
            _forward_and_backward(job, n, size)
            runtime.synchronise(device)
        seconds[size] = (time.perf_counter() - started) * share / n
    return seconds


def _forward_and_backward(job: Job, n: int, size: int) -> None:
    """On noise, with as much memory taken beside it as the batches that are on their way."""
    noise = torch.randn(2 * n, 3, size, size, device=job.performance.device)
    noise = noise.to(job.performance.view_dtype, memory_format=torch.channels_last)
    ahead = [torch.empty_like(noise) for _ in range(IN_MEMORY - 1)] if noise.is_cuda else []
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
    form: str = batch_norm.choose(settings.norm, performance.device)
    if form == "compiled" and performance.compile == "off":
        form = "torch's own"
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
        f" batch norm {form},"
        f" {job.num_threads} decoding threads",
        "loader": job.loader_choice,
        "kNN probe": job.knn_data.description if job.knn_data else "none (no classes)",
        "estimated time": f"{duration(seconds)}"
        f" ({settings.batch_size * job.last_step / seconds:.0f} images/s, without data and probes)",
    }
