"""What a run on any number of ranks will do, for `--dry-run`: counted, without starting it.

Nothing is built but the model's shapes, so the plan of 32 GPUs can be read on a laptop, before the
data is there. Times rest on published rates of GPUs and on the assumptions named below;
`tools/profile.py --gpus` predicts from what it measured instead.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt_fast.build import build_model
from bt_fast.config import Config
from bt_fast.distributed.collectives import require_shares
from bt_fast.loss import choose_method
from bt_fast.models import batch_norm
from bt_fast.plan import gpus, step_costs
from bt_fast.plan.gpus import Card
from bt_fast.plan.step_costs import Measured
from bt_fast.prefetch import IN_MEMORY
from bt_fast.run.console import duration
from pipelines.loading.choose import open_data
from pipelines.loading.native import require_full_batches

IMAGENET_IMAGES = 1_281_167
LINK_GBPS = 400.0  # of one rank's network card
REFERENCE_BATCH = 256  # images of the single GPU that a prediction is compared with

# What a step reaches of a card's published rates: products and convolutions, and whatever moves
# memory. With them an A100 of 80 GB takes the 2,500 views/s that were published for ResNet-50.
FLOP_SHARE, BANDWIDTH_SHARE = 0.5, 0.9
# Bytes that encoder and projector move, forwards and backwards, for each that is saved for the
# backward pass, by form of batch norm: of ResNet-50 about 215 GB for 22.5 (7.7 with one block per
# stage), and 160 for 21.6 with fused norms, counted by tools/compiled_traffic.py.
MOVED_PER_SAVED = {"compiled": 9.5, "fused": 7.4}
RESERVED_BYTES = 2e9  # CUDA's context, workspaces of cuDNN and cuBLAS, buffers of NCCL

_SOME = 64  # images whose cost is counted


def plan(config: Config, world_size: int) -> dict[str, str]:
    """The rows of the table that `--dry-run` prints. Raises ValueError for an unequal share."""
    share = config.batch_size // world_size
    if config.data.exists():
        num_images, data = len(open_data(config.data, "--data")), str(config.data)
    else:
        num_images = IMAGENET_IMAGES
        data = f"{config.data} does not exist yet; assuming ImageNet-1k"
    require_full_batches(config.batch_size, world_size, num_images, config.data)
    require_shares(config.batch_size, world_size, config.bn_group)
    steps_per_epoch = num_images // config.batch_size
    steps = config.epochs * steps_per_epoch
    last_step = min(steps, config.max_steps if config.max_steps is not None else steps)

    counted = count(config)
    here = gpus.present() if config.device != "cpu" else None
    card = here if here and here.flop_per_s else gpus.H100
    method = choose_method(config.batch_size, config.projector[-1], world_size)
    usual = step_costs.predict(single_gpu(config, counted, REFERENCE_BATCH, card), 1, LINK_GBPS)
    prediction = step_costs.predict(
        single_gpu(config, counted, share, card),
        world_size,
        LINK_GBPS,
        separate_communicators=config.separate_communicators,
        norm_ranks=config.bn_group,
        single_device_images_per_s=usual.images_per_s,
    )
    norm_ranks = config.bn_group or world_size
    rows = {
        "ranks": f"{world_size}, each {share} of {config.batch_size} images a step",
        "data": f"{num_images} images ({data})",
        "batch norm": f"over the samples of {norm_ranks} ranks"
        + ("" if norm_ranks == world_size else ", not of all as in the paper"),
        "steps": f"{config.epochs} epochs x {steps_per_epoch}"
        + (f", stopping after {last_step}" if last_step < steps else ""),
        "loss": f"{method} form over {config.batch_size} x {config.projector[-1]}"
        + ("" if config.objective == "barlow-twins" else f" assumed for {config.objective}"),
        "sent per rank and step": f"gradients {prediction.gradient_bytes / 1e6:,.0f} MB,"
        f" embeddings {prediction.embedding_bytes / 1e6:,.1f} MB,"
        f" {prediction.collectives} small collectives of batch norm and loss",
    }
    if config.device == "cpu":
        return rows | {"predicted": "nothing: the assumptions are those of GPUs"}
    return rows | {
        **fits(config, counted, world_size, here),
        "predicted": f"{1e3 * prediction.step:.1f} ms a step, {prediction.images_per_s:,.0f}"
        f" images/s, {duration(prediction.step * last_step)} without data and probes"
        f" ({100 * prediction.efficiency:.0f} % of {world_size} single GPUs with {REFERENCE_BATCH}"
        f" images each) on {card.name}",
        "breakdown, ms": ", ".join(
            f"{part} {1e3 * seconds:.1f}"
            for part, seconds in prediction.seconds.items()
            if seconds >= 5e-5
        )
        + f" ({1e3 * prediction.hidden:.1f} of communication hidden under the backward pass)",
        "assuming": f"{100 * FLOP_SHARE:.0f} % of the published rate of bf16 products and"
        f" {100 * BANDWIDTH_SHARE:.0f} % of the memory bandwidth"
        f" ({card.name}: {card.flop_per_s / 1e12:.0f} TFLOP/s, {card.bytes_per_s / 1e9:,.0f} GB/s),"
        f" {LINK_GBPS:.0f} Gbit/s per rank,"
        f" {step_costs.RANKS_PER_MACHINE} ranks a machine with"
        f" {step_costs.INSIDE_BYTES_PER_S / 1e9:.0f} GB/s between them,"
        f" {1e6 * step_costs.KERNEL_SECONDS:.0f} us per kernel beyond its bytes and FLOP,"
        f" {1e6 * step_costs.LATENCY_INTRA_NODE:.0f} us for a small collective on one machine and"
        f" {1e6 * step_costs.LATENCY_INTER_NODE:.0f} on several; not measured",
    }


def fits(
    config: Config, counted: "Counted", world_size: int, here: Card | None = None
) -> dict[str, str]:
    """Rows on a step's memory, and on the largest batch and its rate: here, then by memory."""
    parts = memory(config, counted, config.batch_size // world_size, world_size)
    listed = ", ".join(f"{part} {num_bytes / 1e9:.1f}" for part, num_bytes in parts.items())
    rows = {"memory per GPU": f"about {sum(parts.values()) / 1e9:.1f} GB: {listed}"}
    here_first = {f"this {here.name}": (here,)} if here else {}
    for title, some in (here_first | gpus.CLASSES).items():
        most = largest_batch(config, counted, some[0], world_size)
        images = min(most, config.batch_size // world_size)
        rows[title] = f"up to {most} images per GPU" if most else "does not fit"
        if most and some[0].flop_per_s:
            rates = (
                f"{card.name} {images / step_seconds(config, counted, images, card):,.0f}"
                for card in some
            )
            rows[title] += f"; of {images}, computed images/s (not measured): {', '.join(rates)}"
    return rows


def largest_batch(
    config: Config, counted: "Counted", card: Card, world_size: int = 1, multiple: int = 16
) -> int:
    """Images per GPU with which a step fits into a card's memory; 0 if none do."""
    batches = range(multiple, 1 << 16, multiple)
    needs = (sum(memory(config, counted, batch, world_size).values()) for batch in batches)
    return multiple * sum(1 for _ in itertools.takewhile(lambda need: need <= card.memory, needs))


def memory(
    config: Config, counted: "Counted", images: int, world_size: int = 1
) -> dict[str, float]:
    """Bytes that a step of so many images per rank takes on a GPU, by part.

    The copy for checkpoints is not among them: it lies in the host's memory.
    """
    views = 2 * images * 3 * config.size**2  # values
    width, samples = config.projector[-1], images * world_size
    gram = choose_method(samples, width, world_size) == "gram"
    # Measured by tools/bench_loss.py: 26 bytes a value of the embeddings, or 20 one of C.
    of_loss = 26 * samples * width if gram else 20 * width**2 / world_size
    converted = counted.itemsize if counted.itemsize < 4 else 0  # the weights in bf16
    return {
        "weights, gradients, momentum": (3 * 4 + converted) * counted.num_parameters,
        "activations": images * counted.saved_bytes,
        # The views being trained on are activations; the crops of two batches are uint8.
        "views and loss": ((IN_MEMORY - 1) * counted.itemsize + 2) * views + of_loss,
        "CUDA and its libraries": RESERVED_BYTES,
    }


def step_seconds(config: Config, counted: "Counted", images: int, card: Card) -> float:
    """Of a step on one GPU, without waiting for data."""
    measured = single_gpu(config, counted, images, card)
    return measured.encoder + measured.loss + measured.optimizer


def single_gpu(config: Config, counted: "Counted", images: int, card: Card) -> Measured:
    """The step of one GPU that takes so many images, by its published rates."""
    width = config.projector[-1]
    flop_per_s = FLOP_SHARE * card.flop_per_s
    bytes_per_s = BANDWIDTH_SHARE * card.bytes_per_s
    tf32 = 1 if counted.itemsize < 4 else 2  # half as fast as bf16
    encoder = (
        step_costs.fixed_seconds(counted.num_norm_layers, counted.num_parameters, bytes_per_s)
        + images * tf32 * counted.flop / flop_per_s
        + images * MOVED_PER_SAVED[counted.norm] * counted.saved_bytes / bytes_per_s
    )
    loss_flop = step_costs.loss_flop(choose_method(images, width), images, width)
    return Measured(
        images=images,
        encoder=encoder,
        backward=encoder * 2 / 3,
        loss=2 * loss_flop / flop_per_s,  # TF32
        optimizer=step_costs.lars_bytes(counted.num_parameters) / bytes_per_s,
        embedding_itemsize=2,
        gradient_itemsize=2 if config.compress_gradients else 4,
        num_parameters=counted.num_parameters,
        num_projector_parameters=counted.num_projector_parameters,
        num_dimensions=width,
        num_norm_layers=counted.num_norm_layers,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What a model is made of, and what an image costs it."""

    num_parameters: int
    num_projector_parameters: int
    num_norm_layers: int
    norm: Literal["compiled", "fused"]
    itemsize: int  # bytes of a value in encoder and projector
    flop: float  # of an image: both views, forwards and backwards
    saved_bytes: float  # that an image keeps for the backward pass, uncompiled


def count(config: Config) -> Counted:
    """Counted on shapes alone: nothing is computed. `--precision auto` is taken for bf16."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = build_model(config)
        for layer in model.modules():  # as under autocast; without a GPU, it does nothing on meta
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)
        views = torch.empty(2 * _SOME, 3, config.size, config.size, dtype=dtype)
    form = batch_norm.choose(config.norm, torch.device("cuda"))
    if form == "fused":
        batch_norm.fuse(model)
    with FlopCounterMode(display=False) as counter:
        embeddings, saved_bytes = forward(model, views)
        embeddings.sum().backward()
    return Counted(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projector_parameters=sum(p.numel() for p in model.projector.parameters()),
        num_norm_layers=step_costs.num_norm_layers(model),
        norm=form,
        itemsize=dtype.itemsize,
        flop=counter.get_total_flops() / _SOME,
        saved_bytes=saved_bytes / _SOME,
    )


def forward(model: nn.Module, views: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The model's output, and the bytes that it saves for the backward pass beside the weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive: an address means one storage

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(views)
    return output, sum(storage.nbytes() for storage in saved.values())
