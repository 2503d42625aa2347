"""The two augmentation branches: drawing the parameters, and applying them.

Barlow Twins augments every image with two branches of different probabilities (Zbontar et al. 2021,
appendix A; the released code's `Transform`). After the random resized crop, in this order:

    op                                          view A    view B
    horizontal flip                             0.5       0.5
    colour jitter (.4, .4, .2, .1), any order   0.8       0.8
    grayscale                                   0.2       0.2
    Gaussian blur, sigma ~ U(0.1, 2)            1.0       0.1
    solarize at 128                             0.0       0.2
    ImageNet normalisation                      always    always

This file is the definition: PyTorch operations on any device, with parameters for every sample.
Parameters are a pure function of the view's random key (`pipelines.order`), hence independent
of batch, rank and loader.

Differences from the reference (Pillow through torchvision): pixels are floats in [0, 255], clamped
after each op as in Pillow but not rounded to integers, and hue is not quantised to 1/256 of a turn.
The blur is Pillow's approximation of the Gaussian, three box filters; it differs within 6 pixels of
the edge, where Pillow replicates the edge before each filter and this code before all three.
`tests/pipelines/augment/test_augment.py` compares every op with Pillow.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.branches import VIEW_A as VIEW_A
from pipelines.branches import VIEW_B as VIEW_B
from pipelines.branches import Branch as Branch
from pipelines.order import uniforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, the weights of Pillow's "L"

_AUGMENT_STREAM = 2
_PIXELS_PER_TASK = 800_000  # 16 samples of 224 px: more exceed the cache, fewer have call overhead
_BLUR_RADIUS = 6  # pixels; each of the three boxes has at most 5 taps, a radius of 2

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the values of Draw.order


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The parameters of n views, on the CPU. Ops that are not applied have neutral values."""

    flip: torch.Tensor  # bool [n]
    jitter: torch.Tensor  # bool [n]
    factors: torch.Tensor  # float32 [n, 4]: brightness, contrast, saturation (neutral 1), hue (0)
    order: torch.Tensor  # int64 [n, 4]: the jitter's op at each position, a permutation
    grayscale: torch.Tensor  # bool [n]
    sigma: torch.Tensor  # float32 [n], pixels; 0 = no blur
    solarize: torch.Tensor  # bool [n]

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice) -> "Draw":
        return _map_fields(lambda tensor: tensor[rows], self)

    def to(self, device: torch.device) -> "Draw":
        """The parameters on another device, for `apply` under torch.compile."""
        return _map_fields(lambda tensor: tensor.to(device), self)


def _map_fields(function, *draws: Draw) -> Draw:
    names = [field.name for field in dataclasses.fields(Draw)]
    return Draw(**{name: function(*(getattr(draw, name) for draw in draws)) for name in names})


def draw(branch: Branch, keys: np.ndarray) -> Draw:
    """Draw the parameters of one view per key (uint64[n], from `order.view_keys`)."""
    u = uniforms(keys, _AUGMENT_STREAM, 14)  # [n, 14]
    jitter = u[:, 1] < branch.jitter
    strengths = np.array([branch.brightness, branch.contrast, branch.saturation, branch.hue])
    low = np.array([max(0.0, 1 - s) for s in strengths[:3]] + [-branch.hue])
    high = np.array([1 + s for s in strengths[:3]] + [branch.hue])
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    factors = np.where(jitter[:, None], low + (high - low) * u[:, 2:6], neutral)
    sigma = branch.sigma[0] + (branch.sigma[1] - branch.sigma[0]) * u[:, 12]
    sigma = np.where(u[:, 11] < branch.blur, sigma, 0.0)
    return Draw(
        flip=torch.from_numpy(u[:, 0] < branch.flip),
        jitter=torch.from_numpy(jitter),
        factors=torch.from_numpy(factors).float(),
        order=torch.from_numpy(np.argsort(u[:, 6:10], axis=1)),
        grayscale=torch.from_numpy(u[:, 10] < branch.grayscale),
        sigma=torch.from_numpy(sigma).float(),
        solarize=torch.from_numpy(u[:, 13] < branch.solarize),
    )


def apply(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Augment and normalise a batch of crops.

    Under torch.compile every op runs on every sample and its result is selected where it was drawn,
    because compiled shapes must not depend on data; the parameters are on the images' device then.

    Args:
        images: uint8 [n, H, W, 3] on any device.
        parameters: the draw of these n views, on the CPU, so that selecting an op's samples needs
            no synchronisation with the device.

    Returns:
        `dtype` [n, 3, H, W], channels-last, on the images' device.
    """
    require_images(images, parameters)
    pixels = images.permute(0, 3, 1, 2).float().contiguous()  # [n, 3, H, W] in [0, 255]

    pixels = _apply_where(parameters.flip, pixels, lambda x: x.flip(-1))
    for position in range(4):
        for op, function in enumerate((brighten, change_contrast, saturate, shift_hue)):
            selected = parameters.jitter & (parameters.order[:, position] == op)
            pixels = _apply_where(selected, pixels, function, parameters.factors[:, op])
    pixels = _apply_where(parameters.grayscale, pixels, lambda x: luma(x).expand_as(x))
    pixels = _apply_where(parameters.sigma > 0, pixels, blur, parameters.sigma)
    pixels = _apply_where(parameters.solarize, pixels, solarize)
    return normalise(pixels, dtype)


def draw_views(branches: Iterable[Branch], keys: Iterable[np.ndarray]) -> Draw:
    """`draw` for each branch with its keys, as the parameters of one batch, in order."""
    draws = (draw(*pair) for pair in zip(branches, keys, strict=True))
    return _map_fields(lambda *tensors: torch.cat(tensors), *draws)


def apply_in_threads(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """`apply` for images on the CPU, in one thread per core, whose samples fit in its cache."""
    require_images(images, parameters)
    n, height, width, _ = images.shape
    shape = n, 3, height, width
    views = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    num_threads = torch.get_num_threads()
    num_rows = max(1, min(_PIXELS_PER_TASK // (height * width), -(-n // num_threads)))

    def apply_to_rows(first: int) -> None:
        rows = slice(first, first + num_rows)
        views[rows] = apply(images[rows], parameters[rows], dtype=dtype)

    list(_thread_pool(num_threads).map(apply_to_rows, range(0, n, num_rows)))
    return views


@functools.cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each."""
    return ThreadPoolExecutor(
        num_threads, "bt-fast-augment", initializer=torch.set_num_threads, initargs=(1,)
    )


if hasattr(os, "register_at_fork"):  # a forked process has no threads but a pool that expects them
    os.register_at_fork(after_in_child=_thread_pool.cache_clear)


def require_images(images: torch.Tensor, parameters: Draw) -> None:
    """Raise ValueError unless images are uint8 [n, H, W, 3] and parameters those of n views."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if len(images) != len(parameters):
        raise ValueError(f"{len(images)} images but parameters for {len(parameters)}")


def _apply_where(selected, pixels, function, *arguments) -> torch.Tensor:
    """The batch with the selected samples replaced by function(samples, their arguments)."""
    if torch.compiler.is_compiling():
        return torch.where(_per_sample(selected), function(pixels, *arguments), pixels)
    rows = selected.nonzero().squeeze(1)
    if len(rows) == 0:
        return pixels
    values = [argument[rows].to(pixels.device, non_blocking=True) for argument in arguments]
    rows = rows.to(pixels.device, non_blocking=True)
    pixels[rows] = function(pixels[rows], *values)
    return pixels


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    """[n] -> [n, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def _interpolate(start: torch.Tensor, end: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """start + factor * (end - start), clamped to [0, 255]: Pillow's `Image.blend`."""
    return torch.lerp(start.expand_as(end), end, _per_sample(factor)).clamp_(0, 255)


def luma(x: torch.Tensor) -> torch.Tensor:
    """Grey levels as in Pillow's `convert("L")`: [n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def brighten(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Interpolate between black and x [n, 3, H, W] in [0, 255]; factor [n]."""
    return (x * _per_sample(factor)).clamp_(0, 255)


def change_contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Interpolate between the mean grey level, rounded as in Pillow's `ImageEnhance`, and x."""
    mean = (luma(x).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _interpolate(mean, x, factor)


def saturate(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Interpolate between the grayscale image and x."""
    return _interpolate(luma(x), x, factor)


def shift_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue of HSV by `turns` [n] of a full circle; value and saturation are unchanged.

    With value v, chroma c and hue h in sixths of a turn, a channel is
    v - c * max(0, min(k, 4 - k, 1)) with k = (n + h) mod 6 and n = 5, 3, 1 for R, G, B.
    """
    red, green, blue = x.unbind(1)  # [n, H, W]
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = chroma.clamp_min(1e-6)  # grey has chroma 0 and no hue; its hue has no effect
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def blur_kernels(sigma: torch.Tensor) -> torch.Tensor:
    """Pillow's `GaussianBlur(radius=sigma)` as one kernel: float [n] -> [n, 13], sums to 1.

    Pillow applies three box filters of fractional radius (Gwosdek et al., SSVM 2011), 2 l + 1 full
    taps and two partial ones, with the variance of the Gaussian. The kernel is the convolution of
    the three.
    """
    variance = sigma.double() ** 2 / 3  # of one box
    full = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)  # l
    partial = (2 * full + 1) * (full * (full + 1) - 3 * variance)
    partial = partial / (6 * (variance - (full + 1) ** 2))
    distance = torch.arange(-2, 3, device=sigma.device).abs()  # [5]
    taps = ((full + partial)[:, None] + 1 - distance).clamp(0, 1)  # [n, 5]
    box = taps / taps.sum(1, keepdim=True)
    kernel = box
    for _ in range(2):  # products: a convolution of n groups loops over them on the host
        windows = F.pad(kernel, (4, 4)).unfold(1, 5, 1)
        kernel = (windows @ box[:, :, None]).squeeze(2)  # [n, 9], then [n, 13]
    return kernel.to(sigma.dtype)


def blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with one sigma per sample [n], in pixels; edges are replicated."""
    n, channels, height, width = x.shape
    kernels = blur_kernels(sigma).repeat_interleave(channels, 0)  # [n * 3, 13]
    groups = n * channels
    planes = F.pad(x.reshape(1, groups, height, width), (_BLUR_RADIUS,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernels.view(groups, 1, 1, -1), groups=groups)
    planes = F.conv2d(planes, kernels.view(groups, 1, -1, 1), groups=groups)
    return planes.view_as(x)


def solarize(x: torch.Tensor) -> torch.Tensor:
    """Invert values of 128 and above. (127.5 separates Pillow's integers 127 and 128.)"""
    return torch.where(x >= 127.5, 255 - x, x)


def normalise(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[0, 255] -> mean 0, deviation 1 on ImageNet: [n, 3, H, W], channels-last, `dtype`."""
    mean, std = _imagenet_statistics(pixels.device)
    scaled = (pixels - 255 * mean) / (255 * std)
    return scaled.to(dtype=dtype, memory_format=torch.channels_last)


@functools.cache  # a copy to a GPU would synchronise
def _imagenet_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def normalise_only(images: torch.Tensor, *, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Normalise without augmentation: uint8 [n, H, W, 3] -> `dtype` [n, 3, H, W]."""
    return normalise(images.permute(0, 3, 1, 2).float(), dtype)
