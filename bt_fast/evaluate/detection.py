"""The pretrained backbone in torchvision's detectors, for people without detectron2.

The C4 form of the paper's appendix C.2: the region proposals and the regions' features come from
layer3 (stride 16); every region, 14 x 14, passes layer4, which boxes and masks share.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from bt_fast.models.networks import feature_width

_REGION = 14  # side of a region's features before layer4 halves it


class _Trunk(nn.Module):
    """images [n, 3, H, W] -> layer3's features [n, out_channels, H / 16, W / 16]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            setattr(self, name, getattr(encoder, name))
        self.out_channels = feature_width(encoder) // 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            images = layer(images)
        return images


class _Pooled(nn.Module):
    """Regions [n, channels, 14, 14] -> pooled features [n, width]."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        return self.layer4(regions).mean((2, 3))


def c4_detector(encoder: Any, num_classes: int, *, masks: bool = False) -> FasterRCNN:
    """Faster R-CNN, or Mask R-CNN with `masks`, on a pretrained encoder; its layers are shared.

    Args:
        encoder: what `bt_fast.load_encoder` returns, with the ImageNet stem.
        num_classes: with the background: 21 for VOC, 91 for torchvision's COCO labels.
    Returns:
        a torchvision detector: it takes lists of RGB images [3, H, W] in [0, 1], normalises
        them with ImageNet's statistics and resizes the short side to 800 pixels.
    Raises:
        ValueError: an encoder with the CIFAR stem, whose stride differs.
    """
    if isinstance(encoder.maxpool, nn.Identity):
        raise ValueError("detectors need an encoder with the ImageNet stem; this has the CIFAR one")
    trunk, width = _Trunk(encoder), feature_width(encoder)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    heads: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(trunk.out_channels, anchors.num_anchors_per_location()[0]),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_pre_nms_top_n_test": 6000,
        "rpn_post_nms_top_n_train": 2000,
        "rpn_post_nms_top_n_test": 1000,
        "box_roi_pool": MultiScaleRoIAlign(["0"], output_size=_REGION, sampling_ratio=0),
        "box_head": _Pooled(encoder.layer4),
        "box_predictor": FastRCNNPredictor(width, num_classes),
    }
    if not masks:
        return FasterRCNN(trunk, **heads)
    heads["mask_roi_pool"] = MultiScaleRoIAlign(["0"], output_size=_REGION, sampling_ratio=0)
    heads["mask_head"] = encoder.layer4
    heads["mask_predictor"] = MaskRCNNPredictor(width, 256, num_classes)
    return MaskRCNN(trunk, **heads)
