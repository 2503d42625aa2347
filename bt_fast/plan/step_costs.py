"""What one training step computes, moves and sends: counted, not measured.

Per rank, with n images on each of W ranks, N = n W images in the global batch, D dimensions and P
parameters:

    augmentation   3 H W bytes read twice, 3 H W values written, per view
    norm           fused with ReLU and residual sum, values of a batch norm's output: x read twice
                   and y written, then x and g read twice and the gradient of x written; a residual
                   read, then its gradient written
    loss           gram: a a^T and b b^T for its n rows, and as much again backwards: 8 n N D FLOP
                   dense: C and two gradients of it: 6 N D^2 FLOP
    LARS           28 P bytes: p and g read, then p, g, m read, p and m written, float32
    gradients      ring all-reduce, 2 (W - 1) / W * 4 P bytes sent
    embeddings     both views of all ranks gathered once, (W - 1) 2 n D values sent
    batch norm     two all-reduces per layer for both views together, tens of kB at most; with the
                   loss's three, every one of them is waited for

What does not shrink with n: LARS, the latency of collectives, and in the encoder a fixed time per
kernel and per weight (`fixed_seconds`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt_fast.loss import choose_method

RANKS_PER_MACHINE = 8
INSIDE_BYTES_PER_S = 300e9  # a rank to its neighbour within a machine, over NVLink
# Seconds of a small collective.
LATENCY_INTRA_NODE, LATENCY_INTER_NODE = 25e-6, 45e-6
_LOSS_COLLECTIVES = 3
_OVERLAPPED = 0.9  # of the backward pass can hide the gradients' all-reduce


def augment_bytes(num_views: int, size: int, dtype: torch.dtype) -> int:
    return num_views * 3 * size * size * (2 + dtype.itemsize)


def norm_bytes(num_normalised: int, num_residual: int, itemsize: int) -> int:
    """What batch norm, ReLU and residual sums have to move at least, forwards and backwards, where
    statistics need a pass of their own. Forms that are not fused move more.

    Args:
        num_normalised: values of all batch norms' outputs.
        num_residual: values of all residual blocks' outputs.
    """
    return itemsize * (8 * num_normalised + 2 * num_residual)


def loss_flop(method: str, num_samples: int, num_dimensions: int, world_size: int = 1) -> int:
    """Per rank; num_samples is the global batch."""
    if method == "gram":
        return 8 * num_samples * num_samples * num_dimensions // world_size
    return 6 * num_samples * num_dimensions * num_dimensions // world_size


def lars_bytes(num_parameters: int) -> int:
    return 28 * num_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step of one rank computes and moves, but for the loss."""

    forward: float  # FLOP of encoder and projector
    backward: float
    flop: dict[str, float]  # convolutions, products
    bytes: dict[str, float]  # norm, optimizer, augmentation


def count(model: nn.Module, views: torch.Tensor, autocast: torch.autocast) -> Work:
    """Counted on four of these views, which pass through the model in training mode, uncompiled,
    without other ranks and without fused norms. Leaves it without gradients."""
    some, values = views[:4], {"normalised": 0, "residual": 0}
    fused: list[Any] = [m for m in model.modules() if getattr(m, "fused", False)]
    for module in fused:
        module.fused = False
    scale = len(views) / len(some)

    def note(module: nn.Module, _, output: torch.Tensor) -> None:
        values["residual" if hasattr(module, "downsample") else "normalised"] += output.numel()

    hooks = [
        module.register_forward_hook(note)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or hasattr(module, "downsample")
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            with autocast:
                z = model(some)
            forward = counter.get_total_flops()
            z.sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
        for hook in hooks:
            hook.remove()
        for module in fused:
            module.fused = True
    flop = {str(name): value for name, value in counter.get_flop_counts()["Global"].items()}
    convolutions = sum(value for name, value in flop.items() if "convolution" in name)
    norm = norm_bytes(values["normalised"], values["residual"], views.element_size())
    return Work(
        forward=scale * forward,
        backward=scale * (sum(flop.values()) - forward),
        flop={
            "convolutions": scale * convolutions,
            "products": scale * (sum(flop.values()) - convolutions),
        },
        bytes={
            "norm": scale * norm,
            "optimizer": lars_bytes(sum(p.numel() for p in model.parameters())),
            "augmentation": augment_bytes(len(views), views.shape[-1], views.dtype),
        },
    )


# Of a compiled step, forwards and backwards, per batch norm: its own kernels, those of the
# convolution beside it, casts of weights (306 of 19 norms, by tools/compiled_traffic.py).
_KERNELS_PER_NORM = 16
KERNEL_SECONDS = 3e-6  # that a kernel takes beyond its bytes and FLOP: launch, first and last wave
_WEIGHT_BYTES = 14  # per parameter: cast to bf16, the gradient in bf16 and in float32


def fixed_seconds(num_norm_layers: int, num_parameters: int, bytes_per_s: float) -> float:
    """Seconds of encoder and projector that do not depend on the number of images."""
    kernels = _KERNELS_PER_NORM * num_norm_layers * KERNEL_SECONDS
    return kernels + _WEIGHT_BYTES * num_parameters / bytes_per_s


def num_norm_layers(model: nn.Module) -> int:
    """Of those that have kernels and collectives of their own: where a residual has a norm, fused
    ones share them."""
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not any(getattr(layer, "fused", False) for layer in layers):
        return len(layers)
    return len(layers) - sum(getattr(m, "downsample", None) is not None for m in modules)


def loss_flop_of_ranks(num_samples: int, num_dimensions: int, world_size: int) -> int:
    """As `loss_flop`, by the method that so many ranks choose."""
    method = choose_method(num_samples, num_dimensions, world_size)
    return loss_flop(method, num_samples, num_dimensions, world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Seconds of one step's parts on one device, and what they depend on."""

    images: int  # n, on this device
    encoder: float  # forward and backward of encoder and projector
    backward: float  # the backward part of that
    loss: float  # the objective and its gradient
    embedding_itemsize: int  # bytes of one value of an embedding
    gradient_itemsize: int = 4  # bytes of one value of a gradient as it is sent
    optimizer: float
    num_parameters: int
    num_projector_parameters: int  # whose gradients are sent first
    num_dimensions: int
    num_norm_layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One rank's step at another world size."""

    world_size: int
    gradient_bytes: float
    embedding_bytes: float
    collectives: int
    seconds: dict[str, float]  # by part; what is hidden under others is not in it
    hidden: float  # seconds of communication under the backward pass
    step: float
    images_per_s: float
    efficiency: float  # of this many single devices


def latency(num_ranks: int) -> float:
    """Seconds of a small collective among so many ranks, as assumed."""
    return LATENCY_INTRA_NODE if num_ranks <= RANKS_PER_MACHINE else LATENCY_INTER_NODE


def predict(
    measured: Measured,
    world_size: int,
    link_gbps: float,
    *,
    separate_communicators: bool = True,
    norm_ranks: int = 0,
    single_device_images_per_s: float | None = None,
) -> Prediction:
    """The step of W ranks that each do what was measured.

    A ring through all ranks leaves a machine once, and there are as many rings as network cards,
    one per rank: so what a rank sends goes at the rate of all of a machine's cards together, or at
    that of NVLink where it is slower or the run stays on one machine. With one communicator for
    everything the backward pass's first batch norm waits for the gradients of the projector.

    Args:
        link_gbps: of the network card of one rank, 10^9 bits per second.
        separate_communicators: whether batch norm and loss have one of their own.
        norm_ranks: ranks whose samples batch norm normalises together; 0 = all.
        single_device_images_per_s: what `efficiency` compares with. Default: what was measured.
    """
    w, n, d = world_size, measured.images, measured.num_dimensions
    rate = INSIDE_BYTES_PER_S
    if w > RANKS_PER_MACHINE:
        rate = min(rate, RANKS_PER_MACHINE * link_gbps * 1e9 / 8)
    bytes_per_parameter = 2 * (w - 1) / w * measured.gradient_itemsize
    gradient_bytes = bytes_per_parameter * measured.num_parameters
    embedding_bytes = (w - 1) * 2 * n * d * measured.embedding_itemsize
    norm_ranks = norm_ranks or w
    of_norm = 2 * measured.num_norm_layers if norm_ranks > 1 else 0
    of_loss = _LOSS_COLLECTIVES if w > 1 else 0
    queueing = 0.0
    if not separate_communicators:
        queueing = bytes_per_parameter * measured.num_projector_parameters / rate
    sending = gradient_bytes / rate - queueing
    hidden = min(sending, _OVERLAPPED * measured.backward)
    seconds = {
        "encoder": measured.encoder,
        "loss": measured.loss * loss_flop_of_ranks(n * w, d, w) / loss_flop_of_ranks(n, d, 1),
        "optimizer": measured.optimizer,
        "gradients, exposed": sending - hidden,
        "embeddings": embedding_bytes / rate,
        "collectives, latency": of_norm * latency(norm_ranks) + of_loss * latency(w),
        "queueing behind gradients": queueing,
    }
    step = sum(seconds.values())
    if single_device_images_per_s is None:
        single_device_images_per_s = n / (measured.encoder + measured.loss + measured.optimizer)
    return Prediction(
        world_size=w,
        gradient_bytes=gradient_bytes,
        embedding_bytes=embedding_bytes,
        collectives=of_norm + of_loss,
        seconds=seconds,
        hidden=hidden,
        step=step,
        images_per_s=w * n / step,
        efficiency=n / step / single_device_images_per_s,
    )
