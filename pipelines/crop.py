"""Random resized crops: drawing the boxes, and the pixels inside them.

Every loader crops the boxes drawn here, so that views are the same whichever loader is used.
The boxes follow `torchvision.transforms.RandomResizedCrop`; the resize is Pillow's antialiased
bicubic, the filter of the Barlow Twins reference. (FFCV's INTER_AREA is not: on an upsampled
crop it is off by up to 58 grey levels.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.order import uniforms

_CROP_STREAM = 1
_ATTEMPTS = 10  # torchvision tries ten boxes before it falls back to a central one


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to `size` x `size` pixels."""

    size: int = 224
    """Side of the view in pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height."""


def random_boxes(
    crop: RandomResizedCrop, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Draw one box per image, as torchvision's `RandomResizedCrop.get_params` does.

    Args:
        keys: uint64[n], from `order.view_keys`.
        heights, widths: int[n], pixels.
    Returns:
        int64[n, 4]: top, left, height, width; always inside the image.
    """
    heights = np.asarray(heights, np.int64)
    widths = np.asarray(widths, np.int64)
    draws = uniforms(keys, _CROP_STREAM, 2 * _ATTEMPTS + 2)  # [n, 22]
    area_share, log_ratio = draws[:, :_ATTEMPTS], draws[:, _ATTEMPTS : 2 * _ATTEMPTS]

    low, high = crop.scale
    areas = (heights * widths)[:, None] * (low + (high - low) * area_share)  # [n, 10]
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratios = np.exp(low + (high - low) * log_ratio)
    tried_w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    tried_h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= widths[:, None])
    fits &= (tried_h > 0) & (tried_h <= heights[:, None])

    first = fits.argmax(axis=1)  # the first attempt that fits; 0 where none does
    rows = np.arange(len(first))
    box_h, box_w = tried_h[rows, first], tried_w[rows, first]
    top = np.floor(draws[:, -2] * (heights - box_h + 1)).astype(np.int64)
    left = np.floor(draws[:, -1] * (widths - box_w + 1)).astype(np.int64)

    # No attempt fitted (a very long or very tall image): the largest central box of legal ratio.
    central_w = np.minimum(widths, np.rint(heights * crop.ratio[1]).astype(np.int64))
    central_h = np.minimum(heights, np.rint(widths / crop.ratio[0]).astype(np.int64))
    central = np.stack(
        [(heights - central_h) // 2, (widths - central_w) // 2, central_h, central_w], axis=1
    )
    drawn = np.stack([top, left, box_h, box_w], axis=1)
    return np.where(fits.any(axis=1)[:, None], drawn, central)


def center_boxes(share: float, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The central square whose side is `share` of the image's short side -> int64[n, 4].

    share = 0.875 at 224 px is the field's "resize to 256, crop 224", in one resize.
    """
    heights = np.asarray(heights, np.int64)
    widths = np.asarray(widths, np.int64)
    side = np.maximum(np.rint(np.minimum(heights, widths) * share).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def cut(image: torch.Tensor, box: np.ndarray, out: torch.Tensor) -> None:
    """Cut a box out of an image and resize it with Pillow's antialiased bicubic.

    Args:
        image: uint8 [3, H, W], a channels-last view of the decoder's [H, W, 3].
        box: int[4]: top, left, height, width.
        out: uint8 [height, width, 3], receives the view; contiguous.
    """
    top, left, height, width = (int(value) for value in box)
    resize(image[:, top : top + height, left : left + width], out.permute(2, 0, 1))


def resize(image: torch.Tensor, out: torch.Tensor) -> None:
    """Pillow's antialiased bicubic, into memory that is there: both uint8 [channels, H, W].

    Within 0.5 grey levels (mean) of Pillow: torch's uint8 kernel computes in the same fixed point.
    It has vector instructions for channels-last memory, and the operator behind
    `F.interpolate` writes where it is told to, which spares an allocation and a copy per view.
    """
    if image.shape == out.shape:
        out.copy_(image)
        return
    source = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    torch.ops.aten._upsample_bicubic2d_aa.out(
        source, out.shape[1:], align_corners=False, out=out.unsqueeze(0)
    )
