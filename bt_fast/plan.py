"""What a run on any number of ranks will do, for `--dry-run`: counted, without starting it.

Nothing is built but the model's shapes, so the plan of 32 GPUs can be read on a laptop, before the
data is there. Times rest on the assumptions named below; `tools/profile.py --gpus` predicts from
what it measured instead.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from bt_fast import costs
from bt_fast.config import Config
from bt_fast.job import build_model
from bt_fast.log import duration
from bt_fast.loss import choose_method
from pipelines.loader import require_full_batches
from pipelines.loaders import open_data

IMAGENET_IMAGES = 1_281_167
# Of one GPU: ResNet-50 at 5,000 views/s (24.3 GFLOP each), the aim for an H200.
ENCODER_FLOP_PER_S = 5_000 * 24.3e9
LOSS_FLOP_PER_S = 1e14
MEMORY_BYTES_PER_S = 4e12
LINK_GBPS = 400.0  # of one rank's network card

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
    steps_per_epoch = num_images // settings.batch_size
    steps = settings.epochs * steps_per_epoch
    last_step = min(steps, settings.max_steps if settings.max_steps is not None else steps)

    parameters, layers, flop, saved = count(settings)
    width = settings.projector[-1]
    method = choose_method(settings.batch_size, width, world_size)
    loss_flop = costs.loss_flop(choose_method(share, width), share, width)
    encoder = share * flop / ENCODER_FLOP_PER_S
    prediction = costs.predict(
        costs.Measured(
            images=share,
            encoder=encoder,
            backward=encoder * 2 / 3,
            loss=loss_flop / LOSS_FLOP_PER_S,
            optimizer=costs.lars_bytes(parameters) / MEMORY_BYTES_PER_S,
            embedding_itemsize=2,
            gradient_itemsize=2 if settings.compress_gradients else 4,
            num_parameters=parameters,
            num_dimensions=width,
            num_norm_layers=layers,
        ),
        world_size,
        LINK_GBPS,
    )
    state = 3 * 4 * parameters  # weights, gradients, momentum
    return {
        "ranks": f"{world_size}, each {share} of {settings.batch_size} images a step",
        "data": f"{num_images} images ({data})",
        "steps": f"{settings.epochs} epochs x {steps_per_epoch}"
        + (f", stopping after {last_step}" if last_step < steps else ""),
        "memory per rank": f"{(state + share * saved) / 1e9:.1f} GB: {state / 1e9:.1f} GB of"
        f" weights, gradients and momentum, {share * saved / 1e9:.1f} GB for the backward pass",
        "loss": f"{method} form over {settings.batch_size} x {width}"
        + ("" if settings.objective == "barlow-twins" else f" assumed for {settings.objective}"),
        "sent per rank and step": f"gradients {prediction.gradient_bytes / 1e6:,.0f} MB,"
        f" embeddings {prediction.embedding_bytes / 1e6:,.1f} MB,"
        f" {prediction.collectives} small collectives of batch norm",
        "predicted": f"{1e3 * prediction.step:.1f} ms a step, {prediction.images_per_s:,.0f}"
        f" images/s, {duration(prediction.step * last_step)}"
        f" ({100 * prediction.efficiency:.0f} % of {world_size} single GPUs)",
        "assuming": f"{ENCODER_FLOP_PER_S / 1e12:.0f} TFLOP/s per GPU (ResNet-50: 5,000 views/s)"
        f" and {LINK_GBPS:.0f} Gbit/s per rank, {costs.RANKS_PER_MACHINE} ranks a machine;"
        " not measured",
    }


def count(settings: Config) -> tuple[int, int, float, float]:
    """(parameters, batch norm layers, FLOP of an image, bytes an image keeps for the backward).

    Both views, forwards and backwards, activations in bf16, as torch keeps them uncompiled.
    """
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
    return (
        sum(p.numel() for p in model.parameters()),
        costs.num_norm_layers(model),
        counter.get_total_flops() / _SOME,
        sum(storages.values()) / 2 / _SOME,
    )
