"""The plan of a run on any number of ranks, for `--dry-run`: steps, memory and predicted times.

Only the model's shapes are built, so the plan of 32 GPUs is available on a laptop and before the
data exists. Times follow from published rates of GPUs and the assumptions below;
`tools/profile.py --gpus` predicts them from measurements instead.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt_fast.config import Config
from bt_fast.distributed.collectives import require_divisible_batch
from bt_fast.loss import choose_method
from bt_fast.models import batch_norm
from bt_fast.models.networks import BarlowTwins
from bt_fast.optimizers import NUM_STATES
from bt_fast.plan import gpus, step_costs
from bt_fast.plan.gpus import GpuModel
from bt_fast.plan.step_costs import StepTimes
from bt_fast.prefetch import NUM_BATCHES_IN_MEMORY
from bt_fast.run.console import duration
from pipelines.common.console import plural
from pipelines.loading.datasets import open_data, require_full_batches

IMAGENET_IMAGES = 1_281_167
LINK_GBPS = 400.0  # bandwidth of one rank's network card

# Fractions of a GPU's published rates that a step attains: of FLOP/s by products and convolutions,
# of bandwidth by all else. With them an A100 of 80 GB reaches ResNet-50's published 2,500 views/s
# with compiled norms.
FLOP_FRACTION, BANDWIDTH_FRACTION = 0.5, 0.9
# Bytes that encoder and projector move, forwards and backwards, per byte saved for the backward
# pass, by implementation of batch norm: for ResNet-50 about 215 GB for 22.5 (7.7 with one block per
# stage), and 160 for 21.6 with fused norms, counted by tools/compiled_traffic.py.
MOVED_PER_SAVED = {"compiled": 9.5, "fused": 7.4}
# A compiled step has 16 kernels per batch norm, with those of its convolution and casts (306 for 19
# norms), and each takes this beyond its bytes and FLOP: launch, first and last wave.
KERNELS_PER_NORM, KERNEL_SECONDS = 16, 3e-6
WEIGHT_BYTES = 14  # per parameter: cast to bf16, the gradient in bf16 and in float32
RESERVED_BYTES = 2e9  # CUDA's context, workspaces of cuDNN and cuBLAS, buffers of NCCL

_NUM_IMAGES = 64  # images whose cost is counted


def plan(config: Config, world_size: int) -> dict[str, str]:
    """Rows of the table of `--dry-run`. Raises ValueError if ranks cannot divide a batch."""
    local_batch = config.batch_size // world_size
    if config.data.exists():
        num_images, data = len(open_data(config.data, "--data")), str(config.data)
    else:
        num_images = IMAGENET_IMAGES
        data = f"{config.data} does not exist yet; assuming ImageNet-1k"
    require_full_batches(config.batch_size, world_size, num_images, config.data)
    require_divisible_batch(config.batch_size, world_size, config.bn_group, config.accumulate)
    steps_per_epoch = num_images // config.batch_size
    steps = config.epochs * steps_per_epoch
    last_step = config.last_step(steps_per_epoch)

    costs = count_costs(config)
    local_gpu = gpus.first_gpu() if config.device != "cpu" else None
    gpu = local_gpu if local_gpu and local_gpu.flop_per_s else gpus.H100
    method = choose_method(config.batch_size, config.projector[-1], world_size)
    prediction = step_costs.predict(
        single_gpu(config, costs, local_batch, gpu),
        world_size,
        LINK_GBPS,
        separate_communicators=config.separate_communicators,
        norm_ranks=config.bn_group,
    )
    norm_ranks = config.bn_group or world_size
    rows = {
        "ranks": f"{world_size}, with {local_batch} of {config.batch_size} images each per step",
        "data": f"{num_images} images ({data})",
        "batch norm": f"over the samples of {plural(norm_ranks, 'rank')}"
        + ("" if norm_ranks == world_size else ", not of all as in the paper"),
        **(
            {"parts": f"{config.accumulate} per rank and step, with one more forward pass"}
            if config.accumulate > 1
            else {}
        ),
        "steps": f"{plural(config.epochs, 'epoch')} x {steps_per_epoch}"
        + (f", stopping after {last_step}" if last_step < steps else ""),
        "loss": f"{method} method over {config.batch_size} x {config.projector[-1]}"
        + ("" if config.objective == "barlow-twins" else f" assumed for {config.objective}"),
        "sent per rank and step": f"gradients {prediction.gradient_bytes / 1e6:,.0f} MB,"
        f" embeddings {prediction.embedding_bytes / 1e6:,.1f} MB,"
        f" {prediction.collectives} small collectives of batch norm and loss",
    }
    if config.device == "cpu":
        return rows | {"predicted": "nothing: the assumptions are those of GPUs"}
    return rows | {
        **memory_and_rate_rows(config, costs, world_size, local_gpu),
        "predicted": f"{1e3 * prediction.step:.1f} ms a step, {prediction.images_per_s:,.0f}"
        f" images/s, {duration(prediction.step * last_step)} without data and probes"
        f" ({100 * prediction.efficiency:.0f} % of {world_size} single GPUs with as many images"
        f" each) on {gpu.name}",
        "breakdown, ms": ", ".join(
            f"{part} {1e3 * seconds:.1f}"
            for part, seconds in prediction.seconds.items()
            if seconds >= 5e-5
        )
        + f" ({1e3 * prediction.hidden:.1f} of communication hidden under the backward pass)",
        "assuming": f"{100 * FLOP_FRACTION:.0f} % of the published rate of bf16 products and"
        f" {100 * BANDWIDTH_FRACTION:.0f} % of the memory bandwidth"
        f" ({gpu.name}: {gpu.flop_per_s / 1e12:.0f} TFLOP/s, {gpu.bytes_per_s / 1e9:,.0f} GB/s),"
        f" {LINK_GBPS:.0f} Gbit/s per rank,"
        f" {step_costs.RANKS_PER_MACHINE} ranks a machine with"
        f" {step_costs.NVLINK_BYTES_PER_S / 1e9:.0f} GB/s between them,"
        f" {1e6 * KERNEL_SECONDS:.0f} us per kernel beyond its bytes and FLOP,"
        f" {1e6 * step_costs.LATENCY_INTRA_NODE:.0f} us for a small collective on one machine and"
        f" {1e6 * step_costs.LATENCY_INTER_NODE:.0f} on several; not measured",
    }


def memory_and_rate_rows(
    config: Config, costs: "ModelCosts", world_size: int, local_gpu: GpuModel | None = None
) -> dict[str, str]:
    """Rows on a step's memory, then on the largest batch and its rate for the GPUs."""
    local_batch = config.batch_size // world_size
    parts = memory_bytes(config, costs, local_batch, world_size)
    listed = ", ".join(f"{part} {num_bytes / 1e9:.1f}" for part, num_bytes in parts.items())
    rows = {"memory per GPU": f"about {sum(parts.values()) / 1e9:.1f} GB: {listed}"}
    local = {f"this {local_gpu.name}": (local_gpu,)} if local_gpu else {}
    for title, models in (local | gpus.BY_MEMORY).items():
        largest = largest_batch(config, costs, models[0], world_size)
        images = min(largest, local_batch)
        rows[title] = f"up to {largest} images per GPU" if largest else "does not fit"
        if largest and models[0].flop_per_s:
            times = {gpu.name: single_gpu(config, costs, images, gpu) for gpu in models}
            rates = (f"{name} {images / one.step:,.0f}" for name, one in times.items())
            rows[title] += f"; of {images}, computed images/s (not measured): {', '.join(rates)}"
        num_parts = fitting_accumulate(config, costs, models[0], local_batch, world_size)
        if largest < local_batch and num_parts:
            rows[title] += f"; of {local_batch} with --accumulate {num_parts}"
    return rows


def largest_batch(config: Config, costs: "ModelCosts", gpu: GpuModel, world_size: int = 1) -> int:
    """Images per GPU with which a step fits into the GPU's memory: a multiple of 16 below 65,536, 0
    if none do."""
    largest = 0
    for batch in range(16, 1 << 16, 16):
        if sum(memory_bytes(config, costs, batch, world_size).values()) > gpu.memory:
            break
        largest = batch
    return largest


def fitting_accumulate(
    config: Config, costs: "ModelCosts", gpu: GpuModel, images: int, world_size: int = 1
) -> int | None:
    """The smallest --accumulate with which `images` images per GPU fit into its memory, or None."""
    for num_parts in range(1, images // 2 + 1):
        if images % num_parts:
            continue
        in_parts = replace(config, accumulate=num_parts)
        if sum(memory_bytes(in_parts, costs, images, world_size).values()) <= gpu.memory:
            return num_parts
    return None


def memory_bytes(
    config: Config, costs: "ModelCosts", images: int, world_size: int = 1
) -> dict[str, float]:
    """GPU memory for `images` images per rank, bytes by part; checkpoints are on the host."""
    views = 2 * images * 3 * config.size**2  # values
    width, samples = config.projector[-1], images * world_size
    gram = choose_method(samples, width, world_size) == "gram"
    # Measured by tools/bench_loss.py: 26 bytes per value of the embeddings, or 20 per value of C.
    loss_bytes = 26 * samples * width if gram else 20 * width**2 / world_size
    cast = costs.itemsize if costs.itemsize < 4 else 0  # the weights in bf16
    return {
        "weights, gradients, optimizer": (4 * (2 + NUM_STATES[config.optimizer]) + cast)
        * costs.num_parameters,
        "activations": images / config.accumulate * costs.saved_bytes,
        # The current views count as activations; the crops of two batches are uint8.
        "views and loss": ((NUM_BATCHES_IN_MEMORY - 1) * costs.itemsize + 2) * views + loss_bytes,
        "CUDA and its libraries": RESERVED_BYTES,
    }


def single_gpu(config: Config, costs: "ModelCosts", images: int, gpu: GpuModel) -> StepTimes:
    """The step of one GPU with `images` images, by its published rates."""
    width = config.projector[-1]
    flop_per_s = FLOP_FRACTION * gpu.flop_per_s
    bytes_per_s = BANDWIDTH_FRACTION * gpu.bytes_per_s
    tf32 = 1 if costs.itemsize < 4 else 2  # half as fast as bf16
    encoder = (
        KERNELS_PER_NORM * KERNEL_SECONDS * costs.num_norm_layers
        + WEIGHT_BYTES * costs.num_parameters / bytes_per_s
        + images * tf32 * costs.flop / flop_per_s
        + images * MOVED_PER_SAVED[costs.norm] * costs.saved_bytes / bytes_per_s
    )
    return StepTimes(
        images=images,
        # Parts are computed forwards twice; a forward pass is a third of both.
        encoder=encoder * (4 / 3 if config.accumulate > 1 else 1),
        backward=encoder * 2 / 3,
        loss=2 * step_costs.auto_loss_flop(images, width) / flop_per_s,  # TF32
        optimizer=step_costs.lars_bytes(costs.num_parameters) / bytes_per_s,
        embedding_itemsize=2,
        gradient_itemsize=2 if config.compress_gradients else 4,
        num_parameters=costs.num_parameters,
        num_projector_parameters=costs.num_projector_parameters,
        num_dimensions=width,
        num_norm_layers=costs.num_norm_layers,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCosts:
    """Size of a model, and its costs per image."""

    num_parameters: int
    num_projector_parameters: int
    num_norm_layers: int
    norm: Literal["compiled", "fused"]
    itemsize: int  # bytes of a value in encoder and projector
    flop: float  # per image: both views, forwards and backwards
    saved_bytes: float  # per image: saved for the backward pass, uncompiled


def count_costs(config: Config) -> ModelCosts:
    """Count on the device "meta", without computing. `--precision auto` counts as bf16."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = BarlowTwins(replace(config, drop_path=0.0))
        for layer in model.modules():  # as autocast, which does nothing on meta without a GPU
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)
        views = torch.empty(2 * _NUM_IMAGES, 3, config.size, config.size, dtype=dtype)
    norm = batch_norm.choose_norm(config.norm, torch.device("cuda"))
    if norm == "fused":
        batch_norm.fuse(model)
    with FlopCounterMode(display=False) as counter:
        embeddings, saved_bytes = forward(model, views)
        embeddings.sum().backward()
    return ModelCosts(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projector_parameters=sum(p.numel() for p in model.projector.parameters()),
        num_norm_layers=step_costs.num_norm_layers(model),
        norm=norm,
        itemsize=dtype.itemsize,
        flop=counter.get_total_flops() / _NUM_IMAGES,
        saved_bytes=saved_bytes / _NUM_IMAGES,
    )


def forward(model: nn.Module, views: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The model's output, and the bytes saved for the backward pass in addition to the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(views)
    return output, sum(storage.nbytes() for storage in saved.values())
