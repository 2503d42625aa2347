"""Encoder and projector.

The encoder is a model of timm or torchvision by name (`library_encoders`), or, as in the reference,
torchvision's ResNet without its classifier, the last norm of every residual branch initialised to
zero. Names, shapes, initialisation and results are
torchvision's, so state dicts are interchangeable. Only the forward pass differs: batch norm, the
residual sum, ReLU and the stem's max-pool are one call, `batch_norm.norm_act`, which may run as one
kernel; the modules `relu` and `avgpool` are not called. In training with those kernels, a block
returns its output as a pair, one for each of its two consumers; see `batch_norm.Activation`.

The projector consists of linear layers without bias, with batch norm and ReLU between them. The
loss normalises the embeddings. In training both views of a batch pass in one call; batch norm
normalises each view by its own statistics.

The paper's two networks share their weights. In its Table 6 the branches differ: a predictor on
view A (two linear layers of the embedding's width, BN and ReLU between them), stop-gradient on B.

Autocast casts the float32 weight of every convolution in the forward pass, and its gradient back in
the backward pass: two kernels for each, most of them shorter than their launch. `_forward_cast`
casts all weights of a stage in one launch and their gradients in another; values and memory formats
equal autocast's, bit for bit. The unit is a stage because its gradients are complete when the
backward pass leaves it, while those of later stages are being reduced. Large linear layers are left
to autocast, which also needs one launch for each. In a compiled layer the compiler casts.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torchvision.models import resnet

from bt_fast.choices import Stem, is_of_library
from bt_fast.config import Config
from bt_fast.models.batch_norm import Activation, BatchNorm1d, BatchNorm2d, as_pair, norm_act
from bt_fast.models.library_encoders import build_library_encoder, count_features

# For each encoder: block, number of blocks per stage, other arguments.
ARCHITECTURES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2), {}),
    "resnet34": ("BasicBlock", (3, 4, 6, 3), {}),
    "resnet50": ("Bottleneck", (3, 4, 6, 3), {}),
    "resnet101": ("Bottleneck", (3, 4, 23, 3), {}),
    "resnet152": ("Bottleneck", (3, 8, 36, 3), {}),
    "wide_resnet50_2": ("Bottleneck", (3, 4, 6, 3), {"width_per_group": 128}),
}

# For each stem: kernel, stride and padding of its convolution, and whether a max-pool follows.
STEMS: dict[Stem, tuple[int, int, int, bool]] = {
    "imagenet": (7, 2, 3, True),  # torchvision's
    "cifar": (3, 1, 1, False),  # that of `small_images`
    "solo-learn": (3, 1, 2, False),
    "3x3-maxpool": (3, 1, 1, True),
    "3x3-stride2": (3, 2, 1, False),
    "3x3-stride2-maxpool": (3, 2, 1, True),
}


class BarlowTwins(nn.Module):
    """views [2 n, 3, H, W], view A first -> embeddings [2 n, D], in the same order."""

    def __init__(self, config: Config):
        """The configured networks, initialised with torch's global generator."""
        super().__init__()
        self.encoder = build_encoder(
            config.encoder,
            stem=config.stem,
            size=config.size,
            drop_path=config.drop_path,
            zero_init=config.zero_init,
            per_view=True,
        )
        widths = (feature_width(self.encoder), *config.projector)
        self.projector = build_projector(widths, batch_norm=config.projector_norm)
        # Table 6's variants, in training mode only.
        self.predictor = build_projector((widths[-1],) * 3) if config.predictor else None
        self.stop_gradient = config.stop_gradient
        if is_of_library(config.encoder) and config.resolution is not None:
            count_features(self.encoder, config.encoder, config.view_size(0))

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        z = self.projector(self.encoder(views))
        if not self.training or (self.predictor is None and not self.stop_gradient):
            return z
        z_a, z_b = z.chunk(2)
        if self.predictor is not None:  # its batch norm needs both views; B's output is discarded
            z_a = self.predictor(z).chunk(2)[0]
        return torch.cat([z_a, z_b.detach() if self.stop_gradient else z_b])


def build_encoder(
    name: str,
    *,
    stem: Stem = "imagenet",
    size: int = 224,
    drop_path: float = 0.0,
    zero_init: bool = True,
    per_view: bool = False,
) -> nn.Module:
    """A randomly initialised encoder that returns its pooled features.

    stem: of a ResNet, one of `STEMS`; weights of 3x3 stems fit into all of them, and only features
    differ. size, drop_path: of timm's and torchvision's encoders, see `build_library_encoder`.
    zero_init: whether the last norm of a ResNet's residual branches starts at 0, so that every
    block starts as the identity (Goyal et al., arXiv 1706.02677), as in the released code.
    per_view: the batch norm of pretraining, which normalises each of two views, or torch's.
    """
    if is_of_library(name):
        if stem != "imagenet":
            raise ValueError(f"--encoder {name} has its own stem; leave out the {stem} stem")
        return build_library_encoder(name, size=size, drop_path=drop_path, per_view=per_view)
    if drop_path:
        raise ValueError(f"--drop-path: --encoder {name} has no stochastic depth")
    block, stages, arguments = ARCHITECTURES[name]
    encoder = ResNet(
        {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block],
        list(stages),
        zero_init_residual=zero_init,
        norm_layer=BatchNorm2d if per_view else nn.BatchNorm2d,
        **arguments,
    )
    encoder.fc = nn.Identity()
    kernel, stride, padding, max_pool = STEMS[stem]
    if stem != "imagenet":
        encoder.conv1 = nn.Conv2d(3, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not max_pool:
        encoder.maxpool = nn.Identity()
    return encoder


class ResNet(resnet.ResNet):
    """images [n, 3, H, W] -> fc(pooled features [n, C])."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.layer4[-1].two_consumers = False  # its output is only pooled
        self.feature_width = self.fc.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = None if isinstance(self.maxpool, nn.Identity) else self.maxpool
        y = norm_act(self.bn1, self.conv1(x), pool=pool, two_consumers=True)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = _forward_cast(stage, y)
        # The average pool, in a form whose gradient is channels-last.
        return self.fc(as_pair(y)[0].permute(0, 2, 3, 1).mean((1, 2)))


class BasicBlock(resnet.BasicBlock):
    """[n, C, H, W] -> [n, planes, H / stride, W / stride]."""

    two_consumers = True  # the next block's convolution and its shortcut

    def forward(self, x: Activation) -> Activation:
        x, shortcut = as_pair(x)
        y = norm_act(self.bn1, self.conv1(x))
        return _add_shortcut(self, self.bn2, self.conv2(y), shortcut)


class Bottleneck(resnet.Bottleneck):
    """[n, C, H, W] -> [n, 4 planes, H / stride, W / stride]."""

    two_consumers = True  # the next block's convolution and its shortcut

    def forward(self, x: Activation) -> Activation:
        x, shortcut = as_pair(x)
        y = norm_act(self.bn1, self.conv1(x))
        y = norm_act(self.bn2, self.conv2(y))
        return _add_shortcut(self, self.bn3, self.conv3(y), shortcut)


def _add_shortcut(block: Any, norm: nn.Module, y: Any, shortcut: Any) -> Activation:
    """relu(norm(y) + shortcut), the shortcut downsampled first if the block does so."""
    residual_norm = None
    if block.downsample is not None:
        convolution, residual_norm = block.downsample
        shortcut = convolution(shortcut)
    return norm_act(
        norm, y, residual=shortcut, residual_norm=residual_norm, two_consumers=block.two_consumers
    )


def _forward_cast(stage: nn.Module, x: Any) -> Any:
    """stage(x); the convolution weights that autocast would cast one by one are cast together."""
    weights = {} if torch.compiler.is_compiling() else _weights_to_cast(stage)
    if not weights:
        return stage(x)
    first = next(iter(weights.values()))
    cast = _Cast.apply(torch.get_autocast_dtype(first.device.type), *weights.values())
    cast_weights = dict(zip(weights, cast, strict=True))
    return functional_call(stage, cast_weights, (x,), tie_weights=False)


def _weights_to_cast(stage: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights that autocast would cast, by name."""
    if not stage.training:
        return {}
    return {
        f"{name}.weight": layer.weight
        for name, layer in stage.named_modules()
        if isinstance(layer, nn.Conv2d)
        and layer.weight.requires_grad
        and layer.weight.dtype == torch.float32
        and not layer.weight.is_meta  # which autocast does not support
        and torch.is_autocast_enabled(layer.weight.device.type)
    }


class _Cast(torch.autograd.Function):
    """Casts tensors to another dtype."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_cast_copies(tensors, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        existing = [g for g in gradients if g is not None]
        cast = iter(_cast_copies(existing, ctx.dtype))
        return None, *[None if g is None else next(cast) for g in gradients]


def _cast_copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies in another dtype, each in the memory format of its source."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    # On a GPU one launch for up to 64 tensors and 320 chunks of 65,536 elements, if every copy has
    # the strides of its source; far more with CUDA 13 (torch's MultiTensorApply.cuh).
    torch._foreach_copy_(copies, list(tensors))
    return copies


def feature_width(encoder: Any) -> int:
    """Number of features that an encoder of `build_encoder` returns."""
    return encoder.feature_width


def build_projector(widths: tuple[int, ...], *, batch_norm: bool = True) -> nn.Sequential:
    """Linear layers of the given widths, all but the last with ReLU and, if so, BN before it."""
    layers: list[nn.Module] = []
    pairs = list(itertools.pairwise(widths))
    for fan_in, fan_out in pairs[:-1]:
        layers.append(nn.Linear(fan_in, fan_out, bias=False))
        layers += [BatchNorm1d(fan_out)] if batch_norm else []
        layers.append(nn.ReLU(True))
    layers.append(nn.Linear(*pairs[-1], bias=False))
    return Projector(*layers)


class Projector(nn.Sequential):
    """A sequence of layers that fuses a batch norm with the ReLU after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_fused = False  # whether the layer has run in the call of the norm before it
        for layer, following in itertools.pairwise([*self, None]):
            if is_fused:
                is_fused = False
                continue
            is_fused = isinstance(layer, BatchNorm1d) and isinstance(following, nn.ReLU)
            x = norm_act(layer, x) if is_fused else layer(x)
        return x
