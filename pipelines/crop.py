"""Random resized crops: drawing boxes, cropping and resizing.

Every loader crops the boxes drawn here, so that views do not depend on the loader. The boxes follow
`torchvision.transforms.RandomResizedCrop`; the resize is Pillow's antialiased bicubic, as in the
Barlow Twins reference. (FFCV's INTER_AREA differs by up to 58 grey levels on an upsampled crop.)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.order import uniforms

_CROP_STREAM = 1
_NUM_ATTEMPTS = 10  # torchvision draws ten boxes before it falls back to a central one


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomResizedCrop:
    """A crop of random area and aspect ratio, resized to `size` x `size` pixels.

    Args:
        size: side of the view in pixels.
        scale: smallest and largest fraction of the image's area.
        ratio: smallest and largest width / height.

    Raises:
        ValueError: a size below 1, or a range that is not one.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must lie in (0, 1], smallest first, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio must be positive, smallest first, got {self.ratio}")


def random_boxes(
    crop: RandomResizedCrop, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """Draw one box per image, as in torchvision's `RandomResizedCrop.get_params`.

    Args:
        keys: uint64[n], from `order.view_keys`.
        heights, widths: int[n], pixels.

    Returns:
        int64[n, 4]: top, left, height, width; inside the image.
    """
    heights = np.asarray(heights, np.int64)
    widths = np.asarray(widths, np.int64)
    draws = uniforms(keys, _CROP_STREAM, 2 * _NUM_ATTEMPTS + 2)  # [n, 22]
    area_draws, ratio_draws = draws[:, :_NUM_ATTEMPTS], draws[:, _NUM_ATTEMPTS : 2 * _NUM_ATTEMPTS]

    low, high = crop.scale
    areas = (heights * widths)[:, None] * (low + (high - low) * area_draws)  # [n, 10]
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratios = np.exp(low + (high - low) * ratio_draws)
    attempted_w = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    attempted_h = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (attempted_w > 0) & (attempted_w <= widths[:, None])
    fits &= (attempted_h > 0) & (attempted_h <= heights[:, None])

    first = fits.argmax(axis=1)  # the first attempt that fits; 0 if none does
    rows = np.arange(len(first))
    box_h, box_w = attempted_h[rows, first], attempted_w[rows, first]
    top = np.floor(draws[:, -2] * (heights - box_h + 1)).astype(np.int64)
    left = np.floor(draws[:, -1] * (widths - box_w + 1)).astype(np.int64)

    # If no attempt fits (a very wide or tall image): the largest central box of allowed ratio.
    central_w = np.minimum(widths, np.rint(heights * crop.ratio[1]).astype(np.int64))
    central_h = np.minimum(heights, np.rint(widths / crop.ratio[0]).astype(np.int64))
    central = np.stack(
        [(heights - central_h) // 2, (widths - central_w) // 2, central_h, central_w], axis=1
    )
    drawn = np.stack([top, left, box_h, box_w], axis=1)
    return np.where(fits.any(axis=1)[:, None], drawn, central)


def center_boxes(fraction: float, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Central squares whose side is a fraction of the image's shorter side -> int64[n, 4].

    fraction = 0.875 at 224 px is the usual "resize to 256, crop 224", in one resize.
    """
    heights = np.asarray(heights, np.int64)
    widths = np.asarray(widths, np.int64)
    side = np.maximum(np.rint(np.minimum(heights, widths) * fraction).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def crop_and_resize(image: np.ndarray, box: np.ndarray, out: np.ndarray) -> None:
    """Crop a box of an image and resize it with Pillow's antialiased bicubic filter.

    Args:
        image: uint8 [H, W, channels].
        box: int[4]: top, left, height, width.
        out: uint8 [height, width, channels], contiguous; the result is written to it.
    """
    top, left, height, width = box.tolist()
    resize(image[top : top + height, left : left + width], out)


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resize with Pillow's antialiased bicubic filter into `out`: both uint8 [H, W, channels].

    Within 0.5 grey levels (mean) of Pillow: torch's uint8 kernel uses the same fixed-point
    arithmetic. It is vectorised for channels-last memory; the operator behind `F.interpolate`
    writes to `out`, which avoids an allocation and a copy per view.

    Arrays rather than tensors, because every operation on a tensor releases the interpreter lock:
    with many decoding threads, waiting for it again takes longer than the operation.
    """
    if image.shape == out.shape:
        out[...] = image
        return
    torch.ops.aten._upsample_bicubic2d_aa.out(
        _as_batch(image), out.shape[:2], align_corners=False, out=_as_batch(out)
    )


def _as_batch(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, channels] -> [1, channels, H, W], channels-last, in the same memory."""
    return torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
