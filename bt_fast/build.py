"""Everything a run needs: built from its configuration, timed, and described."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, Group, World, all_reduce, require_divisible_batch
from bt_fast.evaluate.knn_classifier import KnnData, choose_data, missing_classes
from bt_fast.evaluate.subset import Subset
from bt_fast.evaluate.views import Views
from bt_fast.initial_weights import load_initial_weights
from bt_fast.loss_variants import objective_function
from bt_fast.models import batch_norm
from bt_fast.models.batch_norm import RunningStatistics
from bt_fast.models.library_encoders import DropPaths
from bt_fast.models.networks import BarlowTwins
from bt_fast.optimizers import GuardedOptimizer, build_optimizer
from bt_fast.run import checkpoint
from bt_fast.run.console import duration
from bt_fast.runtime import Runtime, apply_switches, choose_runtime, prepare
from bt_fast.schedule import learning_rate
from pipelines.beton import BetonReader
from pipelines.common.console import plural
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.loading.datasets import ImageDataset, open_data, open_val
from pipelines.loading.loader import Loader
from pipelines.order import epoch_order
from pipelines.webdataset.reader import ShardReader

MAX_UNLABELLED = 4096  # images of a probe without classes: twice the width of the features


@dataclass(kw_only=True, slots=True)
class TrainingSetup:
    """Everything that the training loop uses."""

    config: Config  # with the chosen loader
    world: World
    runtime: Runtime
    autocast: torch.autocast  # the context of every forward pass
    num_threads: int  # workers of this rank that decode
    dataset: BetonReader | ShardReader
    data_identity: dict[str, int | str]  # must not change when the run is resumed
    loader: Loader
    knn_data: KnnData | None
    missing_classes: str  # why there are no `knn_data`; empty if there are
    held_out: Subset  # images of the probes
    held_out_views: Views
    bank_views: Views | None  # of the images that `knn_data` compares them with
    model: BarlowTwins
    initial_weights: str  # what --init took, for the table
    parallel: torch.nn.Module  # the model, or DDP around it
    embed: Callable[[torch.Tensor], torch.Tensor]  # its forward pass
    # (z_a, z_b) -> on-diagonal and off-diagonal term
    objective: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    statistics: RunningStatistics  # of the model's batch norms
    drop_paths: DropPaths  # of the model's residual branches
    optimizer: GuardedOptimizer
    schedules: dict[str, Callable[[int], float]]  # parameter group -> learning rate of a step
    last_step: int


def build(config: Config, world: World = ALONE) -> TrainingSetup:
    """Build everything but the run directory. Raises ValueError for what cannot be trained."""
    runtime = choose_runtime(config.device, config.precision, config.compile, world)
    apply_switches(deterministic=config.deterministic)

    require_divisible_batch(config.batch_size, world.size, config.bn_group, config.accumulate)
    num_threads = config.num_threads(world.local_size)
    dataset = open_data(config.data, "--data")
    val = open_val(config.data, config.val_data)
    config = replace(config, loader="native" if config.loader == "auto" else config.loader)
    loader = open_loader(
        config.loader,
        dataset,
        RandomResizedCrop(size=config.size, scale=(config.min_scale, 1.0)),
        batch_size=config.batch_size,
        device=runtime.device,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        sizes=[config.view_size(epoch) for epoch in range(config.epochs)],
        num_threads=num_threads,
        cache_bytes=int(config.cache_gb * 1e9),
    )

    torch.manual_seed(config.seed)  # the initialisation, drawn on the CPU: identical on all devices
    model = BarlowTwins(config)
    initial_weights = ""
    # A run that is resumed before its first checkpoint starts again from the file.
    if config.init is not None and (config.resume is None or not checkpoint.exists(config.resume)):
        initial_weights = load_initial_weights(model, config.init, config)
    prepare(model, runtime)
    norm_group, loss_group = communicators(config, world, runtime.device)
    batch_norm.set_process_group(model, norm_group)
    if batch_norm.choose_norm(config.norm, runtime.device) == "fused":
        batch_norm.fuse(model)
    knn_data = choose_data(dataset, val, config.seed, config.probe_images)
    held_out = held_out_images(knn_data, dataset if val is None else val, config)
    # Kept from probe to probe: on a GPU each starts processes.
    open_views = functools.partial(
        Views, runtime=runtime, size=config.size, num_threads=num_threads
    )
    parallel = data_parallel(model, config, world)
    objective = objective_function(config.objective, config.temperature, loss_group)
    return TrainingSetup(
        config=config,
        world=world,
        runtime=runtime,
        autocast=runtime.autocast(),
        num_threads=num_threads,
        dataset=dataset,
        data_identity={"images": len(dataset), "sha256": dataset.sha256()},
        loader=loader,
        knn_data=knn_data,
        missing_classes="" if knn_data else missing_classes(dataset, val),
        held_out=held_out,
        held_out_views=open_views(held_out.images),
        bank_views=open_views(knn_data.bank.images) if knn_data else None,
        model=model,
        initial_weights=initial_weights,
        parallel=parallel,
        embed=runtime.compiled(parallel),
        objective=runtime.compiled(objective),
        statistics=RunningStatistics(model),
        drop_paths=DropPaths(model, seed=config.seed, rank=world.rank),
        optimizer=build_optimizer(config.optimizer, model, config.weight_decay),
        schedules=learning_rates(config, loader.steps_per_epoch),
        last_step=config.last_step(loader.steps_per_epoch),
    )


def held_out_images(knn_data: KnnData | None, images: ImageDataset, config: Config) -> Subset:
    """The kNN probe's queries; without classes a random sample of `images`."""
    if knn_data is not None:
        return knn_data.queries
    order = epoch_order(len(images), config.seed, epoch=-1)
    return Subset(images, order[: min(config.probe_images // 2, MAX_UNLABELLED)])


def communicators(config: Config, world: World, device: torch.device) -> tuple[Group, Group]:
    """(batch norm's, the loss's). Gradients are reduced in the world's own group."""
    shared = world.group
    if config.separate_communicators:
        shared = world.new_group(device, timeout=config.timeout)
    if config.bn_group in (0, world.size):
        return shared, shared
    return world.new_group(device, size=config.bn_group, timeout=config.timeout), shared


def average_statistics(setup: TrainingSetup) -> None:
    """With --bn-group, let the running statistics of all ranks be their mean, as if they had been
    averaged in every step; all ranks call it."""
    if setup.config.bn_group not in (0, setup.world.size) and setup.statistics.layers:
        running = setup.statistics.running
        running.copy_(all_reduce(running.clone(), setup.world.group) / setup.world.size)


def learning_rates(config: Config, steps_per_epoch: int) -> dict[str, Callable[[int], float]]:
    """The learning rate of a step, for each of the optimizer's parameter groups by name."""
    schedule = functools.partial(
        learning_rate,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        batch_size=config.batch_size,
        warmup_epochs=config.effective_warmup_epochs,
    )
    rates = {"weights": config.lr_weights, "biases": config.lr_biases}
    return {name: functools.partial(schedule, base_lr=rate) for name, rate in rates.items()}


def data_parallel(model: BarlowTwins, config: Config, world: World) -> torch.nn.Module:
    """The model, its gradients averaged over ranks in buckets during the backward pass."""
    if world.group is None:
        return model
    # Batch statistics are already identical on all ranks. (The flag was renamed in torch 2.14.)
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {"process_group": world.group, "gradient_as_bucket_view": True}
    options[sync] = False
    parallel = DistributedDataParallel(model, **options)
    if config.compress_gradients:
        parallel.register_comm_hook(world.group, bf16_compress_hook)
    return parallel


def expected_seconds(setup: TrainingSetup, seconds_per_step: dict[int, float]) -> float:
    """Seconds of all steps of the run, without waiting for data and without probes."""
    config, per_epoch = setup.config, setup.loader.steps_per_epoch
    return sum(
        seconds_per_step[config.view_size(epoch)]
        * min(per_epoch, setup.last_step - epoch * per_epoch)
        for epoch in range(-(-setup.last_step // per_epoch))
    )


def _describe_probe(setup: TrainingSetup) -> str:
    if setup.config.probe_every == 0 and not setup.config.probe_minutes:
        return "none (--probe-every 0)"
    if setup.knn_data is not None:
        return f"kNN and linear: {setup.knn_data.description}"
    return f"rank and loss of {len(setup.held_out)} images: {setup.missing_classes}"


def describe(setup: TrainingSetup, seconds_per_step: dict[int, float]) -> dict[str, str]:
    """The rows of the table shown before a run starts."""
    config, runtime, dataset = setup.config, setup.runtime, setup.dataset
    parameters = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in setup.model.children()
    ]
    schedule = f"{plural(config.epochs, 'epoch')} x {setup.loader.steps_per_epoch} steps"
    if left_out := len(dataset) % config.batch_size:
        schedule += f", without {left_out} other images in each epoch"
    if setup.last_step < config.epochs * setup.loader.steps_per_epoch:
        schedule += f", stopping after {setup.last_step}"
    warmup = plural(config.effective_warmup_epochs, "epoch")
    if config.effective_warmup_epochs != config.warmup_epochs:
        warmup += f" (--warmup-epochs {config.warmup_epochs:g} is not shorter than the run)"
    projector = "-".join(map(str, config.projector))
    batch = f"{config.batch_size} images"
    if setup.world.size > 1:
        batch += f", {config.batch_size // setup.world.size} on each of {setup.world.size} ranks"
    if config.accumulate > 1:
        batch += f", in {config.accumulate} parts one after the other"
    seconds = expected_seconds(setup, seconds_per_step)
    form: str = batch_norm.choose_norm(config.norm, runtime.device)
    if form == "compiled" and runtime.compile == "off":
        form = "eager"
    return {
        "recipe": config.title,
        "data": f"{len(dataset)} images, {plural(dataset.num_classes, 'class')} in {config.data}",
        "views": f"2 x {config.resolution or config.size} px,"
        f" crops from {config.min_scale:g} of the area",
        "model": f"{config.encoder} ({parameters[0]:.1f} M) +"
        f" projector {projector} ({parameters[1]:.1f} M)"
        + (f" + predictor ({parameters[2]:.1f} M)" if config.predictor else ""),
        **({"init": setup.initial_weights} if setup.initial_weights else {}),
        "objective": config.objective + f", lambda {config.lambd:g}",
        "batch": batch,
        "optimizer": config.optimizer,
        "steps": schedule,
        "warm-up": warmup,
        "device": f"{runtime.device.type}, {runtime.precision},"
        f" torch.compile {runtime.compile},"
        f" batch norm {form},"
        f" {plural(setup.num_threads, 'decoding worker')}",
        "loader": setup.config.loader,
        "probe": _describe_probe(setup),
        "estimated time": f"{duration(seconds)}"
        f" ({config.batch_size * setup.last_step / seconds:.0f} images/s, without data and probes)",
    }
