"""The two augmentation branches in two fused Triton kernels; `pipelines.augment` is the definition.

A view depends on one statistic of the complete image, the mean grey level for the contrast op, and
has one op that reads neighbouring pixels, the blur. Hence two kernels:

    contrast_sums    reads the crop, applies the colour ops that precede contrast in the sample's
                     order, and reduces the result to a few floats per sample
    augment          reads the crop in tiles: flip, colour ops, grayscale, blur, solarize,
                     normalise, and one store, channels-last

There are no intermediate results in memory: a view costs two reads of uint8 and one write of half.
The samples with blur have a launch of their own, in tiles of 64 x 64 whose inner 48 x 48 pixels are
written (32 and 16 where tensor cores read registers: see `blur_tiling`). Within a tile the blur is
two products with a banded matrix of the sample's 13 taps, on tensor cores; pixels in the halo are
computed by several programs, which costs less than a pass through memory. Without blur there is no
halo. A program processes one sample and branches over the ops that are not drawn.

What bounds the kernels is the number of instructions. Therefore a thread reads and writes quartets
of pixels, 12 values, as three words, adjacent lanes adjacent quartets; the four positions of the
jitter are a loop, whose code stays in the instruction cache; and levels are in [0, 1], to which an
addition clamps its result without a further instruction.

The blur's operands are rounded to float16, which has the 11 significant bits of TF32: an error of
at most 0.3 grey levels at a pixel, without bias.
"""

import torch
import triton
import triton.language as tl

from pipelines.augment import (
    CONTRAST,
    HUE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LUMA,
    SATURATION,
    Draw,
    blur_kernels,
    require_images,
)

RADIUS = 6  # of the blur, pixels
PARTS = 8  # of a sample, whose grey levels are summed by programs of their own
BLOCK = 1024  # pixels of which such a program computes grey levels at a time
SUM_WARPS = 4
TILE, OPTIONS = 32, {"num_warps": 4}  # side of the tile of a program without blur, pixels
HALO = 8  # pixels: at least the radius of the blur, and a multiple of the four that a thread stores
BLUR_TILE, BLUR_OPTIONS = 64, {"num_warps": 8, "maxnreg": 128}
SMALL_BLUR_TILE, SMALL_BLUR_OPTIONS = 32, {"num_warps": 4, "maxnreg": 128}


def blur_tiling(capability: tuple[int, int]) -> tuple[int, dict[str, int]]:
    """(side of a tile with blur, options) without spills on GPUs of a compute capability.

    Tensor cores of Hopper (9.0) and of data-centre Blackwell (10.x) read the blur's operands from
    shared memory. All others read registers, of which a tile of 64 would need more than exist.
    """
    if capability[0] in (9, 10):
        return BLUR_TILE, BLUR_OPTIONS
    return SMALL_BLUR_TILE, SMALL_BLUR_OPTIONS


def apply(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """`pipelines.augment.apply` for a CUDA device: same arguments, same result up to rounding.

    One copy of the parameters to the device, three launches, no synchronisation. Raises ValueError
    for images of 2 ** 29 pixels or more: offsets within a sample are int32.
    """
    require_images(images, parameters)
    n, height, width, _ = images.shape
    if height * width >= 1 << 29:
        raise ValueError(f"images must have fewer than 2 ** 29 pixels, got {height} x {width}")
    images = images.contiguous()
    device = images.device
    table, num_blurred = parameter_table(parameters)
    cuda = device.type == "cuda"  # else Triton's interpreter
    if cuda:
        table = table.pin_memory()
    table = table.to(device, non_blocking=True)  # [n, COLUMNS]
    sums = torch.empty((n, PARTS), device=device)
    views = torch.empty(
        (n, 3, height, width), dtype=dtype, device=device, memory_format=torch.channels_last
    )
    _contrast_sums[(PARTS, n)](
        images, table, sums, height * width, PARTS=PARTS, BLOCK=BLOCK, num_warps=SUM_WARPS
    )
    capability = torch.cuda.get_device_capability(device) if cuda else (9, 0)
    for first, count, halo, (tile, options) in (
        (0, num_blurred, HALO, blur_tiling(capability)),
        (num_blurred, n - num_blurred, 0, (TILE, OPTIONS)),
    ):
        if count:
            inner = tile - 2 * halo
            _augment[(triton.cdiv(width, inner), triton.cdiv(height, inner), count)](
                *(images, table[first:], sums[first:], views, height, width),
                PARTS=PARTS,
                TILE=tile,
                HALO=halo,
                **options,
            )
    return views


def parameter_table(parameters: Draw) -> tuple[torch.Tensor, int]:
    """One row of floats per sample, those with blur first, and the number of samples with blur."""
    n, blurred = len(parameters), parameters.sigma > 0
    flags = [parameters.flip, parameters.jitter, parameters.grayscale, parameters.solarize]
    columns = [
        torch.stack([torch.arange(n, device=blurred.device), *flags], 1),
        parameters.factors,
        parameters.order,
        half_kernels(parameters.sigma),
        torch.zeros(
            n, 6, device=blurred.device
        ),  # rows of 128 bytes: the kernels are compiled for an alignment of 16
    ]
    rows = blurred.argsort(descending=True, stable=True)
    return torch.cat(columns, 1)[rows], int(blurred.sum())


def half_kernels(sigma: torch.Tensor) -> torch.Tensor:
    """`blur_kernels` in values that float16 represents, with a sum of exactly 1: [n] -> [n, 13].

    Taps are multiples of float16's step at the largest tap, the central one, which absorbs the
    rounding errors of the others.
    """
    kernels = blur_kernels(sigma)
    largest = 1.01 * kernels.amax(1, keepdim=True)  # rounding errors may add 0.6 %
    step = torch.exp2(largest.log2().floor() - 10)
    kernels = (kernels / step).round() * step
    kernels[:, RADIUS] += 1 - kernels.sum(1)
    return kernels


_CONTRAST, _SATURATION, _HUE = (tl.constexpr(op) for op in (CONTRAST, SATURATION, HUE))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)
_MEAN_RED, _MEAN_GREEN, _MEAN_BLUE = (tl.constexpr(value) for value in IMAGENET_MEAN)
_STD_RED, _STD_GREEN, _STD_BLUE = (tl.constexpr(value) for value in IMAGENET_STD)
_RADIUS = tl.constexpr(RADIUS)
# Columns of the table of parameters, which has one row per sample.
_SAMPLE, _FLIP, _JITTER, _GRAYSCALE, _SOLARIZE = (tl.constexpr(i) for i in range(5))
_FACTORS, _ORDER, _TAPS = tl.constexpr(5), tl.constexpr(9), tl.constexpr(13)
_COLUMNS = tl.constexpr(32)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _shift_hue(turns, red, green, blue):
    """`pipelines.augment.shift_hue` with one reduction modulo 6 for the three channels."""
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - low
    is_red, is_green = value == red, value == green
    slope = tl.where(is_red, green - blue, tl.where(is_green, blue - red, red - green))
    hue = slope / tl.maximum(chroma, 1e-6) + tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    hue += 6.0 * turns - 3.0
    hue -= 6.0 * tl.floor(hue * (1 / 6) + 0.5)  # from cyan, -3 to 3: 0 is cyan, 1 blue, -1 green
    red = low + chroma * _clamp(tl.abs(hue) - 1.0)
    green = low + chroma * _clamp(2.0 - tl.abs(hue + 1.0))
    blue = low + chroma * _clamp(2.0 - tl.abs(hue - 1.0))
    return red, green, blue


@triton.jit
def _colour_op(op, row, mean, red, green, blue):
    """One op of the colour jitter on pixels of one sample: three float tensors in [0, 1]."""
    factor = tl.load(row + _FACTORS + op)
    if op == _HUE:
        red, green, blue = _shift_hue(factor, red, green, blue)
    else:  # interpolate between black, the mean or the pixel's grey level, and the pixel
        level = tl.where(op == _CONTRAST, mean, 0.0)
        grey = tl.where(op == _SATURATION, _luma(red, green, blue), level)
        rest = (1.0 - factor) * grey
        red = _clamp(factor * red + rest)
        green = _clamp(factor * green + rest)
        blue = _clamp(factor * blue + rest)
    return red, green, blue


@triton.jit
def _colour(row, means, num_pixels, red, green, blue, PARTS: tl.constexpr):
    """The colour jitter and grayscale, as drawn for the sample."""
    if tl.load(row + _JITTER) != 0:
        total = tl.sum(tl.load(means + tl.arange(0, PARTS)))
        mean = tl.floor(255.0 * total / num_pixels + 0.5) / 255.0
        for position in range(4):  # not unrolled: the code must fit in the instruction cache
            op = tl.load(row + _ORDER + position).to(tl.int32)
            red, green, blue = _colour_op(op, row, mean, red, green, blue)
    if tl.load(row + _GRAYSCALE) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    return red, green, blue


@triton.jit
def _split4(x):
    """[n, 4] -> four of [n], without communication."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _join4(x0, x1, x2, x3):
    """The inverse of `_split4`."""
    pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(pairs, [x0.shape[0], 4])


@triton.jit
def _word(offset, index: tl.constexpr):
    """Offsets of values 4 * index to 4 * index + 3 from the first value of each pixel quartet."""
    return offset + (4 * index + tl.arange(0, 4))[None, :]


@triton.jit
def _mirror(x, flip):
    """Reverse the pixels of each quartet if `flip` is true."""
    x0, x1, x2, x3 = _split4(x)
    return tl.where(flip, _join4(x3, x2, x1, x0), x)


@triton.jit
def _unit(x):
    """uint8 -> [0, 1]."""
    return x.to(tl.float32) * (1 / 255)


@triton.jit
def _load_word(line, offset, end, index: tl.constexpr):
    value = _word(offset, index)
    values = tl.load(line + value, (value >= 0) & (value < end), other=0)
    return _split4(_unit(values))


@triton.jit
def _load(line, offset, end):
    """Quartets of adjacent pixels as three tensors [n, 4] in [0, 1].

    `line` points to the first value of a quartet's line, which has `end` values, and `offset`, of
    shape [n, 1], are those of the quartet's first in the line. Accesses are words of 4 bytes where
    the compiler knows the alignment, as for widths that are multiples of 16.
    """
    r0, g0, b0, r1 = _load_word(line, offset, end, 0)
    g1, b1, r2, g2 = _load_word(line, offset, end, 1)
    b2, r3, g3, b3 = _load_word(line, offset, end, 2)
    return _join4(r0, r1, r2, r3), _join4(g0, g1, g2, g3), _join4(b0, b1, b2, b3)


@triton.jit
def _replicate_edges(line, x, width, red, green, blue):
    """Give pixels beyond the ends of a line, where quartets begin at `x`, the edge's values."""
    pixel = x[:, None] + tl.arange(0, 4)[None, :]
    inside = (pixel >= 0) & (pixel < width)
    edge = line + tl.where(x < 0, 0, width - 1) * 3
    beyond = (x < 0) | (x + 3 >= width)
    red = tl.where(inside, red, _unit(tl.load(edge, beyond, other=0))[:, None])
    green = tl.where(inside, green, _unit(tl.load(edge + 1, beyond, other=0))[:, None])
    blue = tl.where(inside, blue, _unit(tl.load(edge + 2, beyond, other=0))[:, None])
    return red, green, blue


@triton.jit
def _store_word(line, offset, first, end, index: tl.constexpr, v0, v1, v2, v3):
    value = _word(offset, index)
    inside = (value >= first) & (value < end)
    tl.store(line + value, _join4(v0, v1, v2, v3), inside)


@triton.jit
def _store(line, offset, first, end, red, green, blue):
    """The inverse of `_load`, for the values from `first` to `end` of each line."""
    r0, r1, r2, r3 = _split4(red)
    g0, g1, g2, g3 = _split4(green)
    b0, b1, b2, b3 = _split4(blue)
    _store_word(line, offset, first, end, 0, r0, g0, b0, r1)
    _store_word(line, offset, first, end, 1, g1, b1, r2, g2)
    _store_word(line, offset, first, end, 2, b2, r3, g3, b3)


@triton.jit
def _normalise(x, mean, deviation, solarize, dtype: tl.constexpr):
    """[0, 1] -> mean 0 and deviation 1."""
    if solarize:
        x = tl.where(x >= 0.5, 1.0 - x, x)
    return ((x - mean) * (1 / deviation)).to(dtype)


@triton.jit
def _finish(row, red, green, blue, dtype: tl.constexpr):
    solarize = tl.load(row + _SOLARIZE) != 0
    red = _normalise(red, _MEAN_RED, _STD_RED, solarize, dtype)
    green = _normalise(green, _MEAN_GREEN, _STD_GREEN, solarize, dtype)
    blue = _normalise(blue, _MEAN_BLUE, _STD_BLUE, solarize, dtype)
    return red, green, blue


@triton.jit
def _contrast_sums(images, table, sums, num_pixels, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per part of a sample. Sums have a fixed order, so that runs are reproducible."""
    row = table + tl.program_id(1) * _COLUMNS
    if tl.load(row + _JITTER) == 0:
        return
    sample = tl.load(row + _SAMPLE).to(tl.int64)
    line = images + sample * num_pixels * 3  # int64; offsets within a sample are int32
    quartet = tl.arange(0, BLOCK // 4)[:, None] * 4
    part = tl.cdiv(num_pixels, PARTS * BLOCK) * BLOCK
    first = tl.program_id(0) * part
    accumulator = tl.zeros([BLOCK // 4, 4], tl.float32)
    for start in range(first, tl.minimum(first + part, num_pixels), BLOCK):
        red, green, blue = _load(line, (start + quartet) * 3, num_pixels * 3)
        position = 0
        op = tl.load(row + _ORDER).to(tl.int32)
        while op != _CONTRAST:
            red, green, blue = _colour_op(op, row, 0.0, red, green, blue)
            position += 1
            op = tl.load(row + _ORDER + position).to(tl.int32)
        accumulator += _luma(red, green, blue)  # black beyond the end remains black
    tl.store(sums + tl.program_id(1) * PARTS + tl.program_id(0), tl.sum(accumulator))


@triton.jit
def _blur(x, band):
    """Blur one channel of a tile of quartets, columns first."""
    tile = tl.reshape(x, band.shape).to(tl.float16)
    tile = tl.dot(band, tile).to(tl.float16)
    return tl.reshape(tl.dot(tile, tl.trans(band)), x.shape)


@triton.jit
def _augment(
    images, table, sums, views, height, width,
    PARTS: tl.constexpr, TILE: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """One tile of a sample per program, which writes the pixels within the halo."""
    row = table + tl.program_id(2) * _COLUMNS
    sample = tl.load(row + _SAMPLE).to(tl.int64)
    top = tl.program_id(1) * (TILE - 2 * HALO)
    left = tl.program_id(0) * (TILE - 2 * HALO)
    # One index for both axes: of two, Triton would distribute the rows over the lanes of a warp,
    # which would access 32 lines of memory at once.
    quartet = tl.arange(0, TILE * TILE // 4)
    y = top - HALO + quartet // (TILE // 4)
    x = left - HALO + quartet % (TILE // 4) * 4
    first = sample * height * width * 3  # int64; offsets within a sample are int32
    source = images + first + tl.minimum(tl.maximum(y, 0), height - 1) * width * 3
    flip = tl.load(row + _FLIP) != 0
    source_x = tl.where(flip, width - 4 - x, x)
    red, green, blue = _load(source[:, None], source_x[:, None] * 3, width * 3)
    if HALO > 0:
        red, green, blue = _replicate_edges(source, source_x, width, red, green, blue)
    red, green, blue = _mirror(red, flip), _mirror(green, flip), _mirror(blue, flip)
    parts = sums + tl.program_id(2) * PARTS
    red, green, blue = _colour(row, parts, height * width, red, green, blue, PARTS)
    if HALO > 0:
        offset = tl.arange(0, TILE)
        tap = offset[None, :] - offset[:, None] + _RADIUS  # weight of pixel j in pixel i's result
        band = tl.load(row + _TAPS + tap, (tap >= 0) & (tap <= 2 * _RADIUS), other=0)
        band = band.to(tl.float16)
        red, green, blue = _blur(red, band), _blur(green, band), _blur(blue, band)
    red, green, blue = _finish(row, red, green, blue, views.dtype.element_ty)
    bottom = tl.minimum(top + TILE - 2 * HALO, height)
    right = tl.minimum(left + TILE - 2 * HALO, width)
    target = views + first + y * width * 3
    end = tl.where((y >= top) & (y < bottom), right, 0) * 3
    _store(target[:, None], x[:, None] * 3, left * 3, end[:, None], red, green, blue)
