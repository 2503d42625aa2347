"""Encoder and projector.

The encoder is torchvision's ResNet (`resnet`) without its classifier, the last norm of every
residual branch initialised to zero, as in the reference. The projector is linear layers without
bias, batch norm and ReLU between them. The normalisation of the embeddings belongs to the loss. In
training both views of a batch go through in one call; batch norm keeps them apart (`norm`).

The paper's networks are twins. Its Table 6 makes them differ: a predictor for view A (two linear
layers as wide as the embedding, batch norm and ReLU between them), no gradient through view B.
"""

import itertools
from typing import Any, Literal, get_args

import torch
from torch import nn

from bt_fast.models.batch_norm import BatchNorm1d, BatchNorm2d, norm_act

Encoder = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"]


class BarlowTwins(nn.Module):
    """views [2 n, 3, H, W], view A first -> embeddings [2 n, D], in the same order."""

    def __init__(
        self,
        encoder: str,
        projector: tuple[int, ...],
        *,
        small_images: bool = False,
        projector_norm: bool = True,
        predictor: bool = False,
        stop_gradient: bool = False,
    ):
        """
        Args:
            encoder: one of `Encoder`.
            projector: widths of the projector's layers; the last is D.
            small_images: the CIFAR stem: 3x3 convolution of stride 1, no max-pool.
            projector_norm: batch norm between the projector's layers.
            predictor, stop_gradient: see the module. In training mode only.
        """
        super().__init__()
        self.encoder = build_encoder(encoder, small_images=small_images, norm_layer=BatchNorm2d)
        widths = (feature_width(self.encoder), *projector)
        self.projector = build_projector(widths, batch_norm=projector_norm)
        self.predictor = build_projector((widths[-1],) * 3) if predictor else None
        self.stop_gradient = stop_gradient

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        z = self.projector(self.encoder(views))
        if not self.training or (self.predictor is None and not self.stop_gradient):
            return z
        z_a, z_b = z.chunk(2)
        if self.predictor is not None:  # its batch norm expects both views; that of B is dropped
            z_a = self.predictor(z).chunk(2)[0]
        return torch.cat([z_a, z_b.detach() if self.stop_gradient else z_b])


def build_encoder(
    name: str, *, small_images: bool = False, norm_layer: type[nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """A ResNet from random initialisation that ends in its pooled features.

    norm_layer: torch's batch norm, or the one that keeps two views apart while pretraining.
    """
    if name not in get_args(Encoder):
        raise ValueError(f"--encoder {name} is not one of {', '.join(get_args(Encoder))}")
    from bt_fast.models import resnet  # torchvision takes a second, which --help and plans need not

    encoder = resnet.build(name, norm_layer)
    encoder.fc = nn.Identity()
    if small_images:
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


def feature_width(encoder: Any) -> int:
    """Number of features the encoder returns: those of its last norm layer's stage."""
    last_block = encoder.layer4[-1]
    last_convolution = getattr(last_block, "conv3", last_block.conv2)
    return last_convolution.out_channels


def build_projector(widths: tuple[int, ...], *, batch_norm: bool = True) -> nn.Sequential:
    """Linear layers through the given widths, with BN (if so) and ReLU after all but the last."""
    layers: list[nn.Module] = []
    pairs = list(itertools.pairwise(widths))
    for fan_in, fan_out in pairs[:-1]:
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        layers += [BatchNorm1d(fan_out)] if batch_norm else []
        layers.append(nn.ReLU(True))
    layers.append(nn.Linear(*pairs[-1], bias=False))
    return Projector(*layers)


class Projector(nn.Sequential):
    """Layers one after the other, a batch norm and the ReLU after it as one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_done = False
        for layer, following in itertools.pairwise([*self, None]):
            if is_done:  # with the norm before it
                is_done = False
                continue
            is_done = isinstance(layer, BatchNorm1d) and isinstance(following, nn.ReLU)
            x = norm_act(layer, x) if is_done else layer(x)
        return x
