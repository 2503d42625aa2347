"""The two augmentation branches in two fused Triton kernels; `pipelines.augment` is the definition.

A view depends on one statistic of the complete image, the mean grey level for the contrast op, and
has one op that reads neighbouring pixels, the blur. Hence two kernels:

    contrast_means   reads the crop, applies the colour ops that precede contrast in the sample's
                     order, and reduces the result to one float per sample
    augment          reads the crop in 64 x 64 tiles, whose inner 52 x 52 pixels it writes: flip,
                     colour ops, grayscale, blur, solarize, normalise, and one store, channels-last
                     (32 x 32 and 20 x 20 where tensor cores read registers: see `tiling`)

There are no intermediate results in memory: a view costs two reads of uint8 and one write of half.
Within a tile the blur is two products with a banded 64 x 64 matrix of the sample's 13 taps, on
tensor cores; pixels in the halo, 6 wide, are computed by several programs, which costs less than a
pass through memory. A program processes one sample and branches over the ops that are not drawn.

Tensor cores multiply float32 as TF32, truncating the lower 13 bits of the operands, which would
darken a blurred view by 0.15 grey levels on average. The kernel rounds the operands to TF32 first;
the remaining error is at most 0.3 grey levels at a pixel, without bias.
"""

import torch
import triton
import triton.language as tl

from pipelines.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LUMA,
    Draw,
    blur_kernels,
    require_images,
)

HALO = 6  # pixels; the radius of the blur
TILE, NUM_WARPS = 64, 8  # side of the tile a program reads, pixels; it writes 2 * HALO fewer
SMALL_TILE, SMALL_NUM_WARPS = 32, 4
MAX_REGISTERS = 128  # per thread: two programs of 256 threads use the 65,536 of an SM
BLOCK = 1024  # pixels processed at a time in the reduction of the mean
NUM_WARPS_MEANS = 4


def tiling(capability: tuple[int, int]) -> tuple[int, int]:
    """(side of a tile, warps) without register spills on GPUs of a compute capability.

    Tensor cores of Hopper (9.0) and of data-centre Blackwell (10.x) read the blur's operands from
    shared memory. All others read registers, of which a tile of 64 would need more than exist.
    """
    return (TILE, NUM_WARPS) if capability[0] in (9, 10) else (SMALL_TILE, SMALL_NUM_WARPS)


def apply(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """`pipelines.augment.apply` for a CUDA device: same arguments, same result up to rounding.

    One copy of the parameters to the device, two launches, no synchronisation. Raises ValueError
    for images of 2 ** 29 pixels or more: offsets within a sample are int32.
    """
    require_images(images, parameters)
    n, height, width, _ = images.shape
    if height * width >= 1 << 29:
        raise ValueError(f"images must have fewer than 2 ** 29 pixels, got {height} x {width}")
    images = images.contiguous()
    device = images.device
    blurred = parameters.sigma > 0
    kernels = tf32_kernels(parameters.sigma)
    flags = torch.stack(
        [parameters.flip, parameters.jitter, parameters.grayscale, blurred, parameters.solarize]
    )
    # One row of floats per sample, so that there is a single transfer.
    table = torch.cat([flags.T.float(), parameters.factors, parameters.order.float(), kernels], 1)
    if device.type == "cuda":
        table = table.pin_memory()
    table = table.to(device, non_blocking=True)  # [n, COLUMNS]
    means = torch.empty(n, device=device)
    views = torch.empty(
        (n, 3, height, width), dtype=dtype, device=device, memory_format=torch.channels_last
    )
    _contrast_means[(n,)](
        images, table, means, height * width, BLOCK=BLOCK, num_warps=NUM_WARPS_MEANS
    )
    cuda = device.type == "cuda"  # else Triton's interpreter
    tile, num_warps = tiling(torch.cuda.get_device_capability(device) if cuda else (9, 0))
    inner = tile - 2 * HALO
    tiles = triton.cdiv(width, inner), triton.cdiv(height, inner)
    _augment[(*tiles, n)](
        images,
        table,
        means,
        views,
        height,
        width,
        TILE=tile,
        HALO=HALO,
        INNER=inner,
        num_warps=num_warps,
        maxnreg=MAX_REGISTERS,
    )
    return views


def tf32_kernels(sigma: torch.Tensor) -> torch.Tensor:
    """`blur_kernels` in values that TF32 represents, with a sum of exactly 1: float [n] -> [n, 13].

    Taps are multiples of TF32's step at the largest tap, the central one, which absorbs the
    rounding errors of the others.
    """
    kernels = blur_kernels(sigma)
    largest = 1.01 * kernels.amax(1, keepdim=True)  # rounding errors may add 0.6 %
    step = torch.exp2(largest.log2().floor() - 10)
    kernels = (kernels / step).round() * step
    kernels[:, HALO] += 1 - kernels.sum(1)
    return kernels


_BRIGHTNESS, _CONTRAST, _HUE = (tl.constexpr(op) for op in (BRIGHTNESS, CONTRAST, HUE))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)
_MEAN_RED, _MEAN_GREEN, _MEAN_BLUE = (tl.constexpr(value) for value in IMAGENET_MEAN)
_STD_RED, _STD_GREEN, _STD_BLUE = (tl.constexpr(value) for value in IMAGENET_STD)
# Columns of the table of parameters, which has one row per sample.
_FLIP, _JITTER, _GRAYSCALE, _BLURRED, _SOLARIZED = (tl.constexpr(i) for i in range(5))
_FACTORS, _ORDER, _KERNEL = tl.constexpr(5), tl.constexpr(9), tl.constexpr(13)
_COLUMNS = tl.constexpr(13 + 2 * HALO + 1)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def _luma(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _hue_channel(hue, value, chroma, offset):
    k = hue + offset
    k = k - 6.0 * tl.floor(k / 6.0)
    return value - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def _colour_op(op, row, mean, red, green, blue):
    """One op of the colour jitter on pixels of one sample: three float tensors in [0, 255]."""
    factor = tl.load(row + _FACTORS + op)
    if op == _BRIGHTNESS:
        red, green, blue = _clamp(red * factor), _clamp(green * factor), _clamp(blue * factor)
    elif op == _HUE:
        value = tl.maximum(tl.maximum(red, green), blue)
        chroma = value - tl.minimum(tl.minimum(red, green), blue)
        divisor = tl.maximum(chroma, 1e-6)
        hue = tl.where(
            value == red,
            (green - blue) / divisor,
            tl.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
        )
        hue += 6.0 * factor
        red = _hue_channel(hue, value, chroma, 5.0)
        green = _hue_channel(hue, value, chroma, 3.0)
        blue = _hue_channel(hue, value, chroma, 1.0)
    else:
        grey = _luma(red, green, blue)
        if op == _CONTRAST:
            grey = tl.zeros_like(grey) + mean
        red = _clamp(grey + factor * (red - grey))
        green = _clamp(grey + factor * (green - grey))
        blue = _clamp(grey + factor * (blue - grey))
    return red, green, blue


@triton.jit
def _contrast_means(images, table, means, num_pixels, BLOCK: tl.constexpr):
    """One program per sample: the sum has a fixed order, so that runs are reproducible."""
    sample = tl.program_id(0).to(tl.int64)
    row = table + sample * _COLUMNS
    if tl.load(row + _JITTER) == 0:
        return
    images += sample * num_pixels * 3  # int64; offsets within a sample are int32
    accumulator = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_pixels, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        inside = pixel < num_pixels
        red = tl.load(images + 3 * pixel, inside, other=0).to(tl.float32)
        green = tl.load(images + 3 * pixel + 1, inside, other=0).to(tl.float32)
        blue = tl.load(images + 3 * pixel + 2, inside, other=0).to(tl.float32)
        precedes_contrast = 1
        for position in tl.static_range(4):
            op = tl.load(row + _ORDER + position).to(tl.int32)
            if op == _CONTRAST:
                precedes_contrast = 0
            if precedes_contrast == 1:
                red, green, blue = _colour_op(op, row, 0.0, red, green, blue)
        accumulator += tl.where(inside, _luma(red, green, blue), 0.0)
    tl.store(means + sample, tl.floor(tl.sum(accumulator) / num_pixels + 0.5))


@triton.jit
def _round_to_tf32(x):
    """The nearest float32 with 10 mantissa bits; ties round away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _blur(x, band):
    """Blur one channel of a tile, columns first. Both operands are TF32 values."""
    return tl.dot(_round_to_tf32(tl.dot(band, x)), tl.trans(band))


@triton.jit
def _store(view, channel, values, mean, deviation, mask):
    """Normalise one channel of a tile, [0, 255] -> mean 0 and deviation 1, and store it."""
    values = (values - 255.0 * mean) / (255.0 * deviation)
    tl.store(view + channel, values.to(view.dtype.element_ty), mask)


@triton.jit
def _augment(
    images, table, means, views, height, width,
    TILE: tl.constexpr, HALO: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    row = table + sample * _COLUMNS
    offset = tl.arange(0, TILE)
    y = tl.program_id(1) * INNER + offset - HALO
    x = tl.program_id(0) * INNER + offset - HALO
    source_y = tl.minimum(tl.maximum(y, 0), height - 1)  # the blur replicates the edge
    source_x = tl.minimum(tl.maximum(x, 0), width - 1)
    if tl.load(row + _FLIP) != 0:
        source_x = width - 1 - source_x
    first = sample * height * width * 3  # int64; offsets within a sample are int32
    pixel = images + first + (source_y[:, None] * width + source_x[None, :]) * 3
    red = tl.load(pixel).to(tl.float32)
    green = tl.load(pixel + 1).to(tl.float32)
    blue = tl.load(pixel + 2).to(tl.float32)

    if tl.load(row + _JITTER) != 0:
        mean = tl.load(means + sample)
        for position in tl.static_range(4):
            op = tl.load(row + _ORDER + position).to(tl.int32)
            red, green, blue = _colour_op(op, row, mean, red, green, blue)
    if tl.load(row + _GRAYSCALE) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    if tl.load(row + _BLURRED) != 0:
        # Within the products' block, the compiler would keep the operands in registers, and spill.
        red, green, blue = _round_to_tf32(red), _round_to_tf32(green), _round_to_tf32(blue)
    if tl.load(row + _BLURRED) != 0:
        tap = offset[None, :] - offset[:, None] + HALO  # weight of pixel j in pixel i's result
        band = tl.load(row + _KERNEL + tap, (tap >= 0) & (tap <= 2 * HALO), other=0.0)
        red, green, blue = _blur(red, band), _blur(green, band), _blur(blue, band)
    if tl.load(row + _SOLARIZED) != 0:
        red = tl.where(red >= 127.5, 255.0 - red, red)
        green = tl.where(green >= 127.5, 255.0 - green, green)
        blue = tl.where(blue >= 127.5, 255.0 - blue, blue)

    inner = (offset >= HALO) & (offset < HALO + INNER)
    mask = (inner & (y < height))[:, None] & (inner & (x < width))[None, :]
    view = views + first + (y[:, None] * width + x[None, :]) * 3
    _store(view, 0, red, _MEAN_RED, _STD_RED, mask)
    _store(view, 1, green, _MEAN_GREEN, _STD_GREEN, mask)
    _store(view, 2, blue, _MEAN_BLUE, _STD_BLUE, mask)
