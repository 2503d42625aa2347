"""What a run on any number of ranks will do, for `--dry-run`: counted, without starting it.

Nothing is built but the model's shapes, so the plan of 32 GPUs can be read on a laptop, before the
data is there. Times rest on the assumptions named below; `tools/profile.py --gpus` predicts from
what it measured instead.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bt_fast import costs
from bt_fast.config import Config
from bt_fast.dist import require_shares
from bt_fast.job import build_model
from bt_fast.log import duration
from bt_fast.loss import choose_method
from pipelines.loader import require_full_batches
from pipelines.loaders import open_data

IMAGENET_IMAGES = 1_281_167
# Of encoder and projector on one GPU, with which the paper's model takes 5,000 views/s, the aim for
# an H200.
ENCODER_FLOP_PER_S = 128e12
LOSS_FLOP_PER_S = 1e14
MEMORY_BYTES_PER_S = 4e12
LINK_GBPS = 400.0  # of one rank's network card
REFERENCE_BATCH = 256  # images of the single GPU whose rates the above are

_SOME = 2  # images whose cost is counted


def plan(settings: Config, world_size: int) -> dict[str, str]:
    """The rows of the table that `--dry-run` prints. Raises ValueError for an unequal share."""
    share = settings.batch_size // world_size
    if settings.data.exists():
        num_images, data = len(open_data(settings.data, "--data")), str(settings.data)
    else:
        num_images = IMAGENET_IMAGES
        data = f"{settings.data} does not exist yet; assuming ImageNet-1k"
    require_full_batches(settings.batch_size, world_size, num_images, settings.data)
    require_shares(settings.batch_size, world_size, settings.bn_group)
    steps_per_epoch = num_images // settings.batch_size
    steps = settings.epochs * steps_per_epoch
    last_step = min(steps, settings.max_steps if settings.max_steps is not None else steps)

    counted = count(settings)
    parameters, saved = counted.num_parameters, counted.saved_bytes
    method = choose_method(settings.batch_size, settings.projector[-1], world_size)
    usual = costs.predict(single_gpu(settings, counted, REFERENCE_BATCH), 1, LINK_GBPS)
    prediction = costs.predict(
        single_gpu(settings, counted, share),
        world_size,
        LINK_GBPS,
        separate_communicators=settings.separate_communicators,
        norm_ranks=settings.bn_group,
        single_device_images_per_s=usual.images_per_s,
    )
    state = 3 * 4 * parameters  # weights, gradients, momentum
    norm_ranks = settings.bn_group or world_size
    rows = {
        "ranks": f"{world_size}, each {share} of {settings.batch_size} images a step",
        "data": f"{num_images} images ({data})",
        "batch norm": f"over the samples of {norm_ranks} ranks"
        + ("" if norm_ranks == world_size else ", not of all as in the paper"),
        "steps": f"{settings.epochs} epochs x {steps_per_epoch}"
        + (f", stopping after {last_step}" if last_step < steps else ""),
        "memory per rank": f"about {(state + share * saved) / 1e9:.1f} GB: {state / 1e9:.1f} GB of"
        f" weights, gradients and momentum, {share * saved / 1e9:.1f} GB for the backward pass",
        "loss": f"{method} form over {settings.batch_size} x {settings.projector[-1]}"
        + ("" if settings.objective == "barlow-twins" else f" assumed for {settings.objective}"),
        "sent per rank and step": f"gradients {prediction.gradient_bytes / 1e6:,.0f} MB,"
        f" embeddings {prediction.embedding_bytes / 1e6:,.1f} MB,"
        f" {prediction.collectives} small collectives of batch norm and loss",
    }
    if settings.device == "cpu":
        return rows | {"predicted": "nothing: the assumptions are those of GPUs"}
    return rows | {
        "predicted": f"{1e3 * prediction.step:.1f} ms a step, {prediction.images_per_s:,.0f}"
        f" images/s, {duration(prediction.step * last_step)} without data and probes"
        f" ({100 * prediction.efficiency:.0f} % of {world_size} single GPUs with {REFERENCE_BATCH}"
        " images each)",
        "breakdown, ms": ", ".join(
            f"{part} {1e3 * seconds:.1f}"
            for part, seconds in prediction.seconds.items()
            if seconds >= 5e-5
        )
        + f" ({1e3 * prediction.hidden:.1f} of communication hidden under the backward pass)",
        "assuming": f"{ENCODER_FLOP_PER_S / 1e12:.0f} TFLOP/s per GPU"
        " (the paper's model: 5,000 views/s)"
        f" with {REFERENCE_BATCH} images, {LINK_GBPS:.0f} Gbit/s per rank,"
        f" {costs.RANKS_PER_MACHINE} ranks a machine with"
        f" {costs.INSIDE_BYTES_PER_S / 1e9:.0f} GB/s between them,"
        f" {1e6 * costs.KERNEL_SECONDS:.0f} us per kernel beyond its bytes and FLOP,"
        f" {1e6 * costs.LATENCY_INTRA_NODE:.0f} us for a small collective on one machine and"
        f" {1e6 * costs.LATENCY_INTER_NODE:.0f} on several; not measured",
    }


def single_gpu(settings: Config, counted: "Counted", images: int) -> costs.Measured:
    """The step of one GPU that takes so many images, by the rates above."""
    width = settings.projector[-1]
    usual = REFERENCE_BATCH * counted.flop / ENCODER_FLOP_PER_S
    fixed = costs.fixed_seconds(counted.num_norm_layers, counted.num_parameters, MEMORY_BYTES_PER_S)
    fixed = min(fixed, usual / 2)  # for a small encoder it would exceed the step
    encoder = fixed + images / REFERENCE_BATCH * (usual - fixed)
    loss_flop = costs.loss_flop(choose_method(images, width), images, width)
    return costs.Measured(
        images=images,
        encoder=encoder,
        backward=encoder * 2 / 3,
        loss=loss_flop / LOSS_FLOP_PER_S,
        optimizer=costs.lars_bytes(counted.num_parameters) / MEMORY_BYTES_PER_S,
        embedding_itemsize=2,
        gradient_itemsize=2 if settings.compress_gradients else 4,
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
    flop: float  # of an image: both views, forwards and backwards
    saved_bytes: float  # that an image keeps for the backward pass, in bf16, uncompiled


def count(settings: Config) -> Counted:
    """Counted on shapes alone: nothing is computed."""
    storages: dict[int, int] = {}
    with torch.device("meta"):
        model = build_model(settings)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        views = torch.empty(2 * _SOME, 3, settings.size, settings.size)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage.nbytes()
            return tensor

        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            model(views).sum().backward()
    return Counted(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_projector_parameters=sum(p.numel() for p in model.projector.parameters()),
        num_norm_layers=costs.num_norm_layers(model),
        flop=counter.get_total_flops() / _SOME,
        saved_bytes=sum(storages.values()) / 2 / _SOME,
    )
