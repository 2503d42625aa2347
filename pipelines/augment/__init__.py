"""The two augmentation branches: drawing the parameters, and applying them.

Barlow Twins distorts every image twice, with unequal probabilities (Zbontar et al. 2021,
appendix A; the released code's `Transform`). After the random resized crop, in this order:

    op                                          view A    view B
    horizontal flip                             0.5       0.5
    colour jitter (.4, .4, .2, .1), any order   0.8       0.8
    grayscale                                   0.2       0.2
    Gaussian blur, sigma ~ U(0.1, 2)            1.0       0.1
    solarize at 128                             0.0       0.2
    ImageNet normalisation                      always    always

This file is the definition: plain PyTorch, any device, every sample with its own parameters.
Parameters are a pure function of the view's random key (`pipelines.order`), hence independent
of batch, rank and loader.

Against the reference (Pillow through torchvision): pixels are floats in [0, 255], clamped after
each op as Pillow does but not rounded to whole grey levels, and hue is not quantised to 1/256 of
a turn. The blur is Pillow's: three box filters that approximate the Gaussian, not the Gaussian.
Within 6 pixels of the edge it differs: Pillow repeats the edge before each box, we before all.
`tests/test_augment.py` holds every op to Pillow.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipelines.order import uniforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, the weights of Pillow's "L"

_AUGMENT_STREAM = 2
_MAX_SIGMA = 2.0
_BLUR_REACH = 6  # pixels; three boxes of at most 5 taps each reach 2 pixels each


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """What one branch does after the crop. Probabilities and strengths as in the paper."""

    blur: float
    """Probability of Gaussian blur."""
    solarize: float
    """Probability of solarization."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Factor is drawn from [1 - brightness, 1 + brightness]; likewise the next two."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Shift is drawn from [-hue, hue], in turns of the colour circle."""
    grayscale: float = 0.2
    """Probability of dropping the colours."""
    sigma: tuple[float, float] = (0.1, _MAX_SIGMA)
    """Range of the blur's standard deviation, pixels."""

    def __post_init__(self) -> None:
        for name in ("blur", "solarize", "flip", "jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {self.hue}")
        if not 0 < self.sigma[0] <= self.sigma[1] <= _MAX_SIGMA:
            raise ValueError(f"sigma must lie in (0, {_MAX_SIGMA}], got {self.sigma}")


VIEW_A = Branch(blur=1.0, solarize=0.0)
VIEW_B = Branch(blur=0.1, solarize=0.2)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in Draw.order


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """The parameters of n views, on the CPU. An op that was not drawn has its neutral value."""

    flip: torch.Tensor  # bool [n]
    jitter: torch.Tensor  # bool [n]
    factors: torch.Tensor  # float32 [n, 4]: brightness, contrast, saturation (1), hue (0)
    order: torch.Tensor  # int64 [n, 4]: the jitter's op at each position, a permutation
    grayscale: torch.Tensor  # bool [n]
    sigma: torch.Tensor  # float32 [n], pixels; 0 = no blur
    solarize: torch.Tensor  # bool [n]

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows: slice) -> "Draw":
        return _each(lambda tensor: tensor[rows], self)

    def to(self, device: torch.device) -> "Draw":
        """The same parameters elsewhere, for `apply` under torch.compile."""
        return _each(lambda tensor: tensor.to(device), self)


def join(*draws: Draw) -> Draw:
    """The parameters of several batches as those of one, in their order."""
    return _each(lambda *tensors: torch.cat(tensors), *draws)


def _each(function, *draws: Draw) -> Draw:
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
    """Distort and normalise one batch of crops.

    Under torch.compile every op runs on every sample and its result is kept where it was drawn,
    because compiled shapes must not depend on data; the parameters are on the images' device then.

    Args:
        images: uint8 [n, H, W, 3] on any device.
        parameters: the draw of these n views; stays on the CPU, so that which sample takes part
            in which op is known without asking the device.
    Returns:
        `dtype` [n, 3, H, W], channels-last, on the images' device.
    """
    require_images(images, parameters)
    pixels = images.permute(0, 3, 1, 2).float().contiguous()  # [n, 3, H, W] in [0, 255]

    pixels = _on_some(pixels, parameters.flip, lambda x: x.flip(-1))
    for position in range(4):
        for op, function in enumerate((brighten, change_contrast, saturate, shift_hue)):
            chosen = parameters.jitter & (parameters.order[:, position] == op)
            pixels = _on_some(pixels, chosen, function, parameters.factors[:, op])
    pixels = _on_some(pixels, parameters.grayscale, lambda x: luma(x).expand_as(x))
    pixels = _on_some(pixels, parameters.sigma > 0, blur, parameters.sigma)
    pixels = _on_some(pixels, parameters.solarize, solarize)
    return normalise(pixels, dtype)


def require_images(images: torch.Tensor, parameters: Draw) -> None:
    """Raise ValueError unless images are uint8 [n, H, W, 3], one for each set of parameters."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    if len(images) != len(parameters):
        raise ValueError(f"{len(images)} images but parameters for {len(parameters)}")


def _on_some(pixels, chosen, function, *arguments) -> torch.Tensor:
    """The batch with the chosen samples replaced by function(samples, their arguments)."""
    if torch.compiler.is_compiling():
        return torch.where(_per_sample(chosen), function(pixels, *arguments), pixels)
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return pixels
    local = [argument[rows].to(pixels.device, non_blocking=True) for argument in arguments]
    rows = rows.to(pixels.device, non_blocking=True)
    pixels[rows] = function(pixels[rows], *local)
    return pixels


def _per_sample(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(x: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """share * x + (1 - share) * other, clamped: Pillow's `Image.blend(other, x, share)`."""
    return torch.lerp(other.expand_as(x), x, _per_sample(share)).clamp_(0, 255)


def luma(x: torch.Tensor) -> torch.Tensor:
    """Grey levels as Pillow's `convert("L")`: [n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def brighten(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with black; x [n, 3, H, W] in [0, 255], factor [n]."""
    return (x * _per_sample(factor)).clamp_(0, 255)


def change_contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the image's mean grey level, rounded as Pillow's `ImageEnhance.Contrast` does."""
    mean = (luma(x).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(x, mean, factor)


def saturate(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend with the image's grey version."""
    return _blend(x, luma(x), factor)


def shift_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the hue of HSV by `turns` [n] of a full circle; value and saturation stay.

    With value v, chroma c and hue h in sixths of a turn, a channel is
    v - c * max(0, min(k, 4 - k, 1)) with k = (n + h) mod 6 and n = 5, 3, 1 for R, G, B.
    """
    red, green, blue = x.unbind(1)  # [n, H, W]
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp_min(1e-6)  # grey has no hue; any will do, chroma is 0
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turns.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(hue + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def blur_kernels(sigma: torch.Tensor) -> torch.Tensor:
    """Pillow's `GaussianBlur(radius=sigma)` as one kernel: float [n] -> [n, 13], sums to 1.

    Pillow runs three box filters of fractional radius (Gwosdek et al., SSVM 2011): 2 l + 1 full
    taps and two partial ones, with the variance of the Gaussian. One kernel is the convolution
    of the three.
    """
    variance = sigma.double() ** 2 / 3  # of one box
    whole = torch.floor((torch.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part = part / (6 * (variance - (whole + 1) ** 2))
    distance = torch.arange(-2, 3, device=sigma.device).abs()  # [5]
    taps = ((whole + part)[:, None] + 1 - distance).clamp(0, 1)  # [n, 5]
    box = taps / taps.sum(1, keepdim=True)
    kernel = box
    for _ in range(2):  # tap by tap: a convolution of n groups loops over them on the host
        parts = [F.pad(kernel * box[:, tap, None], (tap, 4 - tap)) for tap in range(5)]
        kernel = torch.stack(parts).sum(0)  # [n, 9], then [n, 13]
    return kernel.to(sigma.dtype)


def blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, each sample with its own sigma [n] in pixels; edges repeat."""
    n, channels, height, width = x.shape
    kernels = blur_kernels(sigma).repeat_interleave(channels, 0)  # [n * 3, 13]
    reach, groups = _BLUR_REACH, n * channels
    planes = F.pad(x.reshape(1, groups, height, width), (reach,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernels.view(groups, 1, 1, -1), groups=groups)
    planes = F.conv2d(planes, kernels.view(groups, 1, -1, 1), groups=groups)
    return planes.view_as(x)


def solarize(x: torch.Tensor) -> torch.Tensor:
    """Invert what is at or above 128. (128 of 0..255, so 127.5 between Pillow's whole levels.)"""
    return torch.where(x >= 127.5, 255 - x, x)


def normalise(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[0, 255] -> ImageNet's mean 0 and deviation 1: [n, 3, H, W], channels-last, `dtype`."""
    mean, std = _statistics(pixels.device)
    scaled = (pixels - 255 * mean) / (255 * std)
    return scaled.to(dtype=dtype, memory_format=torch.channels_last)


@functools.cache  # once per device: every copy to a GPU would be a wait
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def plain(images: torch.Tensor, *, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Normalise only, for evaluation: uint8 [n, H, W, 3] -> `dtype` [n, 3, H, W]."""
    return normalise(images.permute(0, 3, 1, 2).float(), dtype)
