"""Costs of one training step: FLOP of the loss, bytes of the optimizer, communication.

Per rank, with n images on each of W ranks, N = n W images in the global batch, D dimensions and P
parameters:

    loss           gram: a a^T and b b^T for its n rows, and as much again backwards: 8 n N D FLOP
                   dense: C and two gradients of it: 6 N D^2 FLOP
    LARS           28 P bytes: p and g read, then p, g, m read, p and m written, float32
    gradients      ring all-reduce, 2 (W - 1) / W * 4 P bytes sent
    embeddings     both views of all ranks gathered once, (W - 1) 2 n D values sent
    batch norm     two all-reduces per layer for both views together, tens of kB at most; as for
                   the three of the loss, the step waits for each of them

Independent of n are LARS, the latency of collectives, and in the encoder a fixed time per kernel
and per weight.
"""

from dataclasses import dataclass

from torch import nn

from bt_fast.loss import choose_method
from bt_fast.models.networks import BasicBlock, Bottleneck

RANKS_PER_MACHINE = 8
NVLINK_BYTES_PER_S = 300e9  # from a rank to the next one on the same machine
# Seconds of a small collective on one machine and on several.
LATENCY_INTRA_NODE, LATENCY_INTER_NODE = 25e-6, 45e-6
_LOSS_COLLECTIVES = 3
_OVERLAP_FRACTION = 0.9  # part of the backward pass that can hide the gradients' all-reduce


def auto_loss_flop(num_samples: int, num_dimensions: int, world_size: int = 1) -> int:
    """FLOP of the loss and its gradient per rank, by the method that `choose_method` chooses;
    num_samples is the global batch."""
    if choose_method(num_samples, num_dimensions, world_size) == "gram":
        return 8 * num_samples * num_samples * num_dimensions // world_size
    return 6 * num_samples * num_dimensions * num_dimensions // world_size


def lars_bytes(num_parameters: int) -> int:
    return 28 * num_parameters


def num_norm_layers(model: nn.Module) -> int:
    """Batch norms with separate kernels: a fused one includes the norm of its residual."""
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not any(getattr(layer, "fused", False) for layer in layers):
        return len(layers)
    blocks = [m for m in modules if isinstance(m, (BasicBlock, Bottleneck))]
    return len(layers) - sum(block.downsample is not None for block in blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of the parts of a step on one device, and the quantities that they depend on."""

    images: int  # n, on this device
    encoder: float  # forward and backward of encoder and projector
    backward: float  # their backward pass alone
    loss: float  # the objective and its gradient
    embedding_itemsize: int  # bytes of one value of an embedding
    gradient_itemsize: int = 4  # bytes of one value of a gradient as it is sent
    optimizer: float
    num_parameters: int
    num_projector_parameters: int  # their gradients are sent first
    num_dimensions: int
    num_norm_layers: int

    @property
    def step(self) -> float:
        """Seconds of the step on this device alone, without waiting for data."""
        return self.encoder + self.loss + self.optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One rank's step at another world size."""

    world_size: int
    gradient_bytes: float
    embedding_bytes: float
    collectives: int
    seconds: dict[str, float]  # by part, without the hidden communication
    hidden: float  # seconds of communication under the backward pass
    step: float
    images_per_s: float
    efficiency: float  # relative to `world_size` single devices with as many images


def latency(num_ranks: int) -> float:
    """Assumed seconds of a small collective."""
    return LATENCY_INTRA_NODE if num_ranks <= RANKS_PER_MACHINE else LATENCY_INTER_NODE


def predict(
    times: StepTimes,
    world_size: int,
    link_gbps: float,
    *,
    separate_communicators: bool = True,
    norm_ranks: int = 0,
) -> Prediction:
    """The step of W ranks, each with the images of `times`.

    A ring leaves a machine once, and there are as many rings as network cards, one per rank: each
    rank sends at the rate of all of a machine's cards together, or at that of NVLink if it is
    slower or the run stays on one machine.

    Args:
        link_gbps: bandwidth of the network card of one rank, 10^9 bits per second.
        separate_communicators: whether batch norm and loss have their own; if not, the first batch
            norm of the backward pass waits for the gradients of the projector.
        norm_ranks: ranks whose samples batch norm normalises together; 0 = all.
    """
    w, n, d = world_size, times.images, times.num_dimensions
    rate = NVLINK_BYTES_PER_S
    if w > RANKS_PER_MACHINE:
        rate = min(rate, RANKS_PER_MACHINE * link_gbps * 1e9 / 8)
    bytes_per_parameter = 2 * (w - 1) / w * times.gradient_itemsize
    gradient_bytes = bytes_per_parameter * times.num_parameters
    embedding_bytes = (w - 1) * 2 * n * d * times.embedding_itemsize
    norm_ranks = norm_ranks or w
    norm_collectives = 2 * times.num_norm_layers if norm_ranks > 1 else 0
    loss_collectives = _LOSS_COLLECTIVES if w > 1 else 0
    queueing = 0.0
    if not separate_communicators:
        queueing = bytes_per_parameter * times.num_projector_parameters / rate
    sending = gradient_bytes / rate - queueing
    hidden = min(sending, _OVERLAP_FRACTION * times.backward)
    seconds = {
        "encoder": times.encoder,
        "loss": times.loss * auto_loss_flop(n * w, d, w) / auto_loss_flop(n, d),
        "optimizer": times.optimizer,
        "gradients, exposed": sending - hidden,
        "embeddings": embedding_bytes / rate,
        "collectives, latency": norm_collectives * latency(norm_ranks)
        + loss_collectives * latency(w),
        "queueing behind gradients": queueing,
    }
    step = sum(seconds.values())
    return Prediction(
        world_size=w,
        gradient_bytes=gradient_bytes,
        embedding_bytes=embedding_bytes,
        collectives=norm_collectives + loss_collectives,
        seconds=seconds,
        hidden=hidden,
        step=step,
        images_per_s=w * n / step,
        efficiency=times.step / step,
    )
