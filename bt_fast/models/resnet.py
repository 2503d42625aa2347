"""Torchvision's ResNets, with everything between two convolutions in one call.

Names, shapes, initialisation and results are torchvision's, so state dicts load both ways. Only the
forward pass differs: batch norm, the residual sum, ReLU and the stem's max-pool go together to
`norm.norm_act`, which may run them as one kernel; the modules `relu` and `avgpool` are not called.
While those kernels train, a block returns a pair, its output twice, for the two ways on which it
goes on; see `norm.Activation`.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models import resnet

from bt_fast.models import weight_casts
from bt_fast.models.batch_norm import Activation, norm_act, ways

# Of each encoder: its blocks, how many in each stage, and other arguments.
ARCHITECTURES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2), {}),
    "resnet34": ("BasicBlock", (3, 4, 6, 3), {}),
    "resnet50": ("Bottleneck", (3, 4, 6, 3), {}),
    "resnet101": ("Bottleneck", (3, 4, 23, 3), {}),
    "resnet152": ("Bottleneck", (3, 8, 36, 3), {}),
    "wide_resnet50_2": ("Bottleneck", (3, 4, 6, 3), {"width_per_group": 128}),
}


def build(name: str, norm_layer: type[nn.Module]) -> "ResNet":
    """One of `ARCHITECTURES`, the last norm of every residual branch initialised to zero."""
    block, stages, arguments = ARCHITECTURES[name]
    kind = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block]
    return ResNet(kind, list(stages), zero_init_residual=True, norm_layer=norm_layer, **arguments)


class ResNet(resnet.ResNet):
    """images [n, 3, H, W] -> what `fc` makes of the pooled features [n, C]."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.layer4[-1].twice = False  # its output is only pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = None if isinstance(self.maxpool, nn.Identity) else self.maxpool
        y = norm_act(self.bn1, self.conv1(x), pool=pool, twice=True)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = weight_casts.forward(stage, y)
        # The average pool; written so that its gradient is channels-last, too.
        return self.fc(ways(y)[0].permute(0, 2, 3, 1).mean((1, 2)))


class BasicBlock(resnet.BasicBlock):
    """[n, C, H, W] -> [n, planes, H / stride, W / stride]."""

    twice = True  # whether what it returns goes on along two ways

    def forward(self, x: Activation) -> Activation:
        x, shortcut = ways(x)
        y = norm_act(self.bn1, self.conv1(x))
        return _join(self, self.bn2, self.conv2(y), shortcut)


class Bottleneck(resnet.Bottleneck):
    """[n, C, H, W] -> [n, 4 planes, H / stride, W / stride]."""

    twice = True  # whether what it returns goes on along two ways

    def forward(self, x: Activation) -> Activation:
        x, shortcut = ways(x)
        y = norm_act(self.bn1, self.conv1(x))
        y = norm_act(self.bn2, self.conv2(y))
        return _join(self, self.bn3, self.conv3(y), shortcut)


def _join(block: Any, norm: nn.Module, y: torch.Tensor, shortcut: torch.Tensor) -> Activation:
    """relu(norm(y) + shortcut), the shortcut through the block's own convolution if it has one."""
    if block.downsample is None:
        return norm_act(norm, y, residual=shortcut, twice=block.twice)
    convolution, residual_norm = block.downsample
    shortcut = convolution(shortcut)
    return norm_act(norm, y, residual=shortcut, residual_norm=residual_norm, twice=block.twice)
