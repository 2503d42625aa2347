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
from bt_fast.runtime import Runtime, apply_switches, choose_runtime, prepare, synchronise
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
class TrainingSetup:
    """Everything a run is made of, built from its configuration."""

    config: Config  # the loader settled
    world: World
    runtime: Runtime
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


def build(config: Config, world: World = ALONE) -> TrainingSetup:
    """Everything but the run directory. Raises ValueError for what cannot be trained."""
    runtime = choose_runtime(config.device, config.precision, config.compile, world.local_rank)
    apply_switches(deterministic=config.deterministic)

    num_threads = config.num_threads(world.local_size)
    reader = open_data(config.data, "--data")
    val = open_val(config.data, config.val_data)
    loader, choice, config = choose_loader(config, world, reader, runtime.device)

    torch.manual_seed(config.seed)  # the initialisation; drawn on the CPU, alike everywhere
    model = build_model(config)
    prepare(model, runtime)
    norm_group, loss_group = communicators(config, world, runtime.device)
    batch_norm.over_ranks(model, norm_group)
    if batch_norm.choose(config.norm, runtime.device) == "fused":
        batch_norm.fuse(model)
    return TrainingSetup(
        config=config,
        world=world,
        num_threads=num_threads,
        runtime=runtime,
        reader=reader,
        data_facts={"images": len(reader), "sha256": reader.sha256()},
        loader=loader,
        loader_choice=choice,
        knn_data=choose_data(reader, val, config.seed, config.probe_images),
        model=model,
        embed=runtime.compiled(data_parallel(model, config, world)),
        objective=runtime.compiled(
            functools.partial(
                objective_terms,
                config.objective,
                temperature=config.temperature,
                group=loss_group,
            )
        ),
        statistics=RunningStatistics(model),
        optimizer=LARS(
            parameter_groups(model.parameters()), lr=0.0, weight_decay=config.weight_decay
        ),
        last_step=last_step_of(config, loader.steps_per_epoch),
    )


def build_model(config: Config) -> BarlowTwins:
    """The configured networks, initialised by torch's generator."""
    return BarlowTwins(
        config.encoder,
        config.projector,
        small_images=config.small_images,
        projector_norm=config.projector_norm,
        predictor=config.predictor,
        stop_gradient=config.stop_gradient,
    )


def choose_loader(
    config: Config, world: World, reader: Data, device: torch.device
) -> tuple[Loader, str, Config]:
    """This rank's loader, why it is that one, and the configuration that names it.

    The first rank measures, if that is asked for, and tells the others.
    """
    make = functools.partial(
        open_loader,
        data=reader,
        crop=RandomResizedCrop(size=config.size, scale=(config.min_scale, 1.0)),
        device=device,
        num_threads=config.num_threads(world.local_size),
        seed=config.seed,
    )
    share = config.batch_size // world.size
    chosen = world.is_first and choose_backend(
        config.loader,
        reader,
        config.batch_size * last_step_of(config, len(reader) // config.batch_size),
        functools.partial(make, batch_size=max(min(BATCH, share, len(reader)), 1)),
        cache=config.cache_gb > 0,
        device=device,
    )
    name, why = from_first(chosen, world.group)
    loader = make(
        name,
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        cache_bytes=int(config.cache_gb * 1e9),
        size_of=config.size_of,
    )
    return loader, why, replace(config, loader=name)


def communicators(config: Config, world: World, device: torch.device) -> tuple[Group, Group]:
    """(batch norm's, the loss's). Gradients travel on the world's own group."""
    timeout = config.patience
    shared = world.group
    if config.separate_communicators:
        shared = world.new_group(device, timeout=timeout)
    if config.bn_group in (0, world.size):
        return shared, shared
    return world.new_group(device, size=config.bn_group, timeout=timeout), shared


def last_step_of(config: Config, steps_per_epoch: int) -> int:
    """Of the run: the schedule's end, or --max-steps."""
    end = config.epochs * steps_per_epoch
    return min(end, config.max_steps if config.max_steps is not None else end)


def data_parallel(model: BarlowTwins, config: Config, world: World) -> torch.nn.Module:
    """The model, its gradients averaged over ranks in buckets while the backward pass goes on."""
    if world.group is None:
        return model
    # Batch statistics are alike on every rank already. (The flag was renamed in torch 2.14.)
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"process_group": world.group, "gradient_as_bucket_view": True}
    options[sync] = False
    parallel = DistributedDataParallel(model, **options)
    if config.compress_gradients:
        parallel.register_comm_hook(world.group, bf16_compress_hook)
    return parallel


def rehearse(setup: TrainingSetup) -> dict[int, float]:
    """Run forward and backward on noise and forget it -> {size: expected seconds per step}.

    On a GPU it compiles, allocates, and finds out before the run starts whether a step fits in
    memory, at every size the views will have. A CPU rehearses only the last size with a part of
    the batch, ten 224 px images' worth, and scales the time.
    """
    config, device = setup.config, setup.runtime.device
    seconds: dict[int, float] = {}
    for size in sorted({config.size_of(epoch) for epoch in range(config.epochs)}, reverse=True):
        if device.type == "cpu" and seconds:
            seconds[size] = seconds[config.size] * (size / config.size) ** 2
            continue
        share = n = config.batch_size // setup.world.size
        if device.type == "cpu":
            n = min(n, max(2, 10 * 224**2 // size**2))
        for _ in range(2 if device.type == "cpu" else 3):  # the first compiles, then graphs record
            synchronise(device)
            started = time.perf_counter()
            _forward_and_backward(setup, n, size)
            synchronise(device)
        seconds[size] = (time.perf_counter() - started) * share / n
    return seconds


def _forward_and_backward(setup: TrainingSetup, n: int, size: int) -> None:
    """On noise, with as much memory taken beside it as the batches that are on their way."""
    noise = torch.randn(2 * n, 3, size, size, device=setup.runtime.device)
    noise = noise.to(setup.runtime.view_dtype, memory_format=torch.channels_last)
    ahead = [torch.empty_like(noise) for _ in range(IN_MEMORY - 1)] if noise.is_cuda else []
    with setup.runtime.autocast():
        z_a, z_b = setup.embed(noise).chunk(2)
    on_diagonal, off_diagonal = setup.objective(z_a, z_b)
    (on_diagonal + off_diagonal).backward()
    setup.optimizer.step(guard=torch.full_like(on_diagonal.detach(), torch.nan))  # changes nothing
    setup.optimizer.zero_grad(set_to_none=True)
    del ahead


def expected_seconds(setup: TrainingSetup, seconds_per_step: dict[int, float]) -> float:
    """Of the whole run, without data and probes."""
    config, per_epoch = setup.config, setup.loader.steps_per_epoch
    return sum(
        seconds_per_step[config.size_of(epoch)]
        * min(per_epoch, setup.last_step - epoch * per_epoch)
        for epoch in range(-(-setup.last_step // per_epoch))
    )


def describe(setup: TrainingSetup, seconds_per_step: dict[int, float]) -> dict[str, str]:
    """The rows of the table shown before a run starts."""
    config, runtime = setup.config, setup.runtime
    parameters = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in setup.model.children()
    ]
    schedule = f"{config.epochs} epochs x {setup.loader.steps_per_epoch} steps"
    if setup.last_step < config.epochs * setup.loader.steps_per_epoch:
        schedule += f", stopping after {setup.last_step}"
    warmup = f"{config.effective_warmup_epochs:g} epochs"
    if config.effective_warmup_epochs != config.warmup_epochs:
        warmup += f" (--warmup-epochs {config.warmup_epochs:g} is not shorter than the run)"
    projector = "-".join(map(str, config.projector))
    seconds = expected_seconds(setup, seconds_per_step)
    form: str = batch_norm.choose(config.norm, runtime.device)
    if form == "compiled" and runtime.compile == "off":
        form = "torch's own"
    return {
        "recipe": config.title,
        "data": f"{len(setup.reader)} images, {setup.reader.num_classes} classes in {config.data}",
        "views": f"2 x {config.resolution or config.size} px,"
        f" crops from {config.min_scale:g} of the area",
        "model": f"{config.encoder} ({parameters[0]:.1f} M) +"
        f" projector {projector} ({parameters[1]:.1f} M)"
        + (f" + predictor ({parameters[2]:.1f} M)" if config.predictor else ""),
        "objective": config.objective + f", lambda {config.lambd:g}",
        "batch": f"{config.batch_size} images"
        + (
            f", {config.batch_size // setup.world.size} on each of {setup.world.size} ranks"
            if setup.world.size > 1
            else ""
        ),
        "steps": schedule,
        "warm-up": warmup,
        "device": f"{runtime.device.type}, {runtime.precision},"
        f" torch.compile {runtime.compile},"
        f" batch norm {form},"
        f" {setup.num_threads} decoding threads",
        "loader": setup.loader_choice,
        "kNN probe": setup.knn_data.description if setup.knn_data else "none (no classes)",
        "estimated time": f"{duration(seconds)}"
        f" ({config.batch_size * setup.last_step / seconds:.0f} images/s, without data and probes)",
    }
