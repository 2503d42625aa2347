"""Batch norm, residual sum, ReLU and max-pool in fused Triton kernels; `norm` is the definition.

Between two convolutions of a ResNet only bytes are moved. Per layer there are four kernels, which
read and write each activation as few times as a norm over a whole batch allows:

    _norm_moments     reads x                             -> sums of x and of x^2, float64
                      [over ranks: one all-reduce]
    _norm_forward     reads x (and the residual r)        -> y = relu(norm(x) + r)
    _norm_sums        reads g = d L / d y and x           -> sums of g and of g (x - mean)
                      [over ranks: one all-reduce]
    _norm_backward    reads g and x                       -> d L / d x

* r may be the input of a norm of its own, as where a block changes the shape: both norms then
  share every pass. With a max-pool, as in the stem, `_norm_pool_forward` writes only what is
  pooled, and `_norm_pool_backward` gathers the gradient of every pixel from the windows it won.
* Where y goes two ways, into a convolution and past it, its gradients arrive apart, and
  `_norm_sums` adds them on its way.
* Where y > 0 is found again from x. After a residual sum that would cost reading r: there the
  forward pass writes one bit per value, and `_norm_sums` writes the masked gradient, which is r's.

Activations lie channels-last: a matrix of rows (image, y, x) by channels. A program takes a block
of channels and a range of rows of one view, sums in float32 about the mean of the view's first
rows, and writes its part; the last program of a block of channels to finish adds the parts in their
order. How the rows are divided depends on the shape alone, so that a run repeats bit for bit on any
GPU.

The kernels are operators of torch.library: opaque to the compiler, which knows their shapes, and
free of side effects, so that CUDA graphs may record them. They run under Triton's interpreter on
CPU tensors.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_fast.distributed.collectives import Group, all_sum, size_of

BLOCK_ROWS = 32
BLOCK_CHANNELS = 64
OPTIONS = {"num_warps": 4}
PROGRAMS = 1024  # at least, if there are rows enough: one wave of 8 on each SM of an H100
BLOCK_PARTS = 8  # parts of a sum that are added at a time
POOL_BLOCK = 16  # pixels of a pooled image, and the quads they come from, that are done at a time
POOL_ROWS = 8  # rows of a pooled image per program


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: tuple[Tensor, Tensor] | None = None,
    relu: bool = True,
    pool: bool = False,
    twice: bool = False,
    eps: float,
    num_views: int = 2,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + residual), each view normalised by its own statistics over all ranks.

    Args:
        x: [V n, C, H, W] or [V n, C], view after view; float32 or a narrower type.
        weight, bias: float32 [C].
        residual: like x.
        residual_norm: weight and bias of the residual's own norm, where it has one.
        relu: False for the norm alone; then without residual and pool.
        pool: 3 x 3 max-pool of stride 2 after it, without residual.
        twice: return y as two tensors, so that gradients of two uses arrive apart.
        group: the ranks whose samples are normalised together; all have as many.
    Returns:
        y like x, channels-last; y again, which is the same memory; and for every norm, mean and
        unbiased variance of all ranks' samples, float32 [norms, 2, V, C].
    """
    assert relu or not (pool or residual is not None), "the norm alone has no residual and no pool"
    options = _Options(num_views, eps, relu, pool, twice, group)
    second = residual_norm or (None, None)
    y, again, moments = _NormAct.apply(x, weight, bias, residual, *second, options)
    return y, y if again is None else again, moments[:, ::2]


class _Options(NamedTuple):
    num_views: int
    eps: float
    relu: bool
    pool: bool
    twice: bool
    group: Group


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, residual_weight, residual_bias, options):
        num_views, eps, relu, pool, twice, group = options
        normed, weights, biases = [x], [weight], [bias]
        if residual_weight is not None:
            normed.append(residual)
            weights.append(residual_weight)
            biases.append(residual_bias)
        total = size_of(group) * x.numel() // (num_views * x.shape[1])  # values of a channel
        if total < 2:
            raise ValueError("batch norm needs more than one value per channel and view")
        sums = torch.ops.bt_fast.norm_moments(normed, num_views)
        sums = all_sum(sums, group, overwrite=True)
        saved: list[Tensor | None]
        if pool:
            y, peaks, taps, moments = torch.ops.bt_fast.norm_pool_forward(
                x, sums, weight, bias, total, eps
            )
            saved = [peaks, taps]
        else:
            plain = residual if residual_weight is None else None
            y, bits, moments = torch.ops.bt_fast.norm_forward(
                normed, plain, sums, weights, biases, total, eps, relu
            )
            saved = [bits if residual is not None else None]
        ctx.save_for_backward(moments, *normed, *weights, *biases, *saved)
        ctx.options, ctx.total, ctx.num_norms = options, total, len(normed)
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(moments)
        if not torch.compiler.is_compiling():  # which drops the zeros that are not used
            ctx.set_materialize_grads(False)
        return y, y.view_as(y) if twice else None, moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_again, _):
        _, _, relu, pool, _, group = ctx.options
        n = ctx.num_norms
        moments, *rest = ctx.saved_tensors
        normed, weights, biases = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n]
        saved = rest[3 * n :]
        gradients = [gradient for gradient in (g, g_again) if gradient is not None]
        if not gradients:
            return (None,) * 7
        masked, sums, grad_weights, grad_biases = torch.ops.bt_fast.norm_sums(
            gradients, [saved[0]] if pool else normed, None if pool else saved[0],
            moments, weights, biases, relu,
        )  # fmt: skip
        is_masked = ctx.has_residual or len(gradients) == 2
        g = masked if is_masked else gradients[0]
        sums = all_sum(sums, group, overwrite=True)
        if pool:
            grad_x = torch.ops.bt_fast.norm_pool_backward(
                g, saved[1], normed[0], moments, sums, weights[0], biases[0], ctx.total
            )
            return grad_x, grad_weights[0], grad_biases[0], None, None, None, None
        inputs = torch.ops.bt_fast.norm_backward(
            g, normed, moments, sums, weights, biases, ctx.total, relu and not is_masked
        )
        if n == 2:
            return (
                inputs[0], grad_weights[0], grad_biases[0], inputs[1], grad_weights[1],
                grad_biases[1], None,
            )  # fmt: skip
        grad_residual = g if ctx.has_residual else None
        return inputs[0], grad_weights[0], grad_biases[0], grad_residual, None, None, None


class _Split(NamedTuple):
    """How a matrix of rows by channels, for every view, is divided among programs."""

    num_rows: int  # of a view
    channels: int
    columns: int  # blocks of channels
    parts: int  # ranges of rows
    rows_per_part: int


def split(x: Tensor, num_views: int) -> _Split:
    """The division of x [V n, C, ...]; it depends on nothing but the shape."""
    channels = x.shape[1]
    num_rows = x.numel() // (num_views * channels)
    columns = triton.cdiv(channels, BLOCK_CHANNELS)
    parts = max(1, min(PROGRAMS // (columns * num_views), triton.cdiv(num_rows, BLOCK_ROWS)))
    rows_per_part = triton.cdiv(triton.cdiv(num_rows, parts), BLOCK_ROWS) * BLOCK_ROWS
    return _Split(num_rows, channels, columns, triton.cdiv(num_rows, rows_per_part), rows_per_part)


BLOCKS = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_CHANNELS": BLOCK_CHANNELS}
_OPERATORS = (
    "norm_moments",
    "norm_forward",
    "norm_sums",
    "norm_backward",
    "norm_pool_forward",
    "norm_pool_backward",
)
# By device: how many programs of each block of channels have finished; zero between kernels.
_arrived: dict[torch.device, Tensor] = {}


def prepare(device: torch.device) -> None:
    """Allocate the counters of finished programs and make the operators known to the compiler.

    To be called before a model is compiled or a CUDA graph recorded. All norms of a device must run
    on one stream.
    """
    _arrived_on(device)
    # Of an operator that is new to it, torch 2.11 prints the arguments with all that they were
    # computed from, more than memory holds for a deep network; not of those in this list.
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        for name in _OPERATORS:
            FALLBACK_ALLOW_LIST.add(f"bt_fast::{name}")


def _arrived_on(device: torch.device) -> Tensor:
    if device in _arrived:
        return _arrived[device]
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    if type(counters) is Tensor:  # none that the compiler or a test has put in its place
        _arrived[device] = counters
    return counters


def _counters(x: Tensor, columns: int) -> Tensor:
    counters = _arrived_on(x.device)
    if columns > len(counters):
        most = BLOCK_CHANNELS * len(counters)
        raise ValueError(f"fused batch norm takes at most {most} channels, got {x.shape[1]}")
    return counters


def _channels_last(x: Tensor) -> Tensor:
    """x with its channels next to each other in memory: itself, or a copy."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def _like(x: Tensor) -> Tensor:
    """Memory for a tensor like x, channels-last."""
    if x.ndim == 4:
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _bits_of(x: Tensor) -> Tensor:
    """Memory for one bit per value of x: uint8 [rows, channels / 8]."""
    channels = x.shape[1]
    return x.new_empty(x.numel() // channels, triton.cdiv(channels, 8), dtype=torch.uint8)


# Operators --------------------------------------------------------------------------------------

_operator = functools.partial(
    torch.library.custom_op, mutates_args=(), tags=[torch.Tag.needs_fixed_stride_order]
)


@_operator("bt_fast::norm_moments")
def norm_moments(xs: list[Tensor], num_views: int) -> Tensor:
    """Sums of x and of its square of each x [V n, C, ...]: float64 [norms, 2, V, C]."""
    where = split(xs[0], num_views)
    counters = _counters(xs[0], where.columns)
    sums = xs[0].new_empty(len(xs), 2, num_views, where.channels, dtype=torch.float64)
    for x, sums_of_x in zip(xs, sums, strict=True):
        parts = x.new_empty(num_views, where.parts, 2, where.channels, dtype=torch.float32)
        _norm_moments[(where.columns, where.parts, num_views)](
            _channels_last(x), parts, sums_of_x, counters,
            where.num_rows, where.channels, where.rows_per_part,
            VIEWS=num_views, BLOCK_PARTS=BLOCK_PARTS, **BLOCKS, **OPTIONS,
        )  # fmt: skip
    return sums


@norm_moments.register_fake
def _(xs, num_views):
    return xs[0].new_empty(len(xs), 2, num_views, xs[0].shape[1], dtype=torch.float64)


@_operator("bt_fast::norm_forward")
def norm_forward(
    xs: list[Tensor],
    residual: Tensor | None,
    sums: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    total: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + residual) of one x, or relu(norm(x) + norm(other)) of two.

    sums: of all ranks, from `norm_moments`; total: values of a channel that they are of.
    Returns y; where y > 0, one bit per value (empty without residual); and float32
    [norms, 3, V, C]: mean, 1 / deviation, unbiased variance.
    """
    num_views = sums.shape[2]
    where = split(xs[0], num_views)
    xs = [_channels_last(x) for x in xs]
    added = xs[1] if len(xs) == 2 else residual
    y, bits, moments = _norm_forward_results(xs, residual, sums)
    last = len(xs) - 1
    _norm_forward[(where.columns, where.parts, num_views)](
        xs[0], _channels_last(added) if added is not None else y, y, bits,
        sums, moments, weights[0], biases[0], weights[last], biases[last],
        where.num_rows, where.channels, where.rows_per_part, total, eps,
        VIEWS=num_views, RELU=relu, RESIDUAL=added is not None, NORMS=len(xs), **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return y, bits, moments


def _norm_forward_results(xs, residual, sums) -> tuple[Tensor, Tensor, Tensor]:
    has_residual = residual is not None or len(xs) == 2
    bits = _bits_of(xs[0]) if has_residual else xs[0].new_empty(0, dtype=torch.uint8)
    moments = sums.new_empty(len(xs), 3, *sums.shape[2:], dtype=torch.float32)
    return _like(xs[0]), bits, moments


@norm_forward.register_fake
def _(xs, residual, sums, weights, biases, total, eps, relu):
    return _norm_forward_results(xs, residual, sums)


@_operator("bt_fast::norm_sums")
def norm_sums(
    gradients: list[Tensor],
    xs: list[Tensor],
    bits: Tensor | None,
    moments: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward pass needs to know of the whole batch.

    gradients: one or two of y, to be added. bits: where y > 0, if that cannot be found from x.
    Returns the masked gradient (empty where it is not needed again: one gradient and no bits); sums
    of the masked gradient g and of g (x - mean), float32 [norms, 2, V, C]; this rank's gradients of
    the weights and of the biases, alike for two norms, each [norms, C].
    """
    num_views = moments.shape[2]
    where = split(xs[0], num_views)
    masked, sums, grad_weights, grad_biases = _norm_sums_results(gradients, xs, bits, moments)
    num_sums = 1 + len(xs)
    parts = sums.new_empty(num_views, where.parts, num_sums, where.channels)
    gradients = [_channels_last(g) for g in gradients]
    _norm_sums[(where.columns, where.parts, num_views)](
        gradients[0], gradients[-1], _channels_last(xs[0]), _channels_last(xs[-1]),
        bits if bits is not None else masked, masked, moments, weights[0], biases[0],
        parts, sums, grad_weights, grad_biases, _counters(xs[0], where.columns),
        where.num_rows, where.channels, where.rows_per_part,
        VIEWS=num_views, RELU=relu, BITS=bits is not None, GRADIENTS=len(gradients), NORMS=len(xs),
        BLOCK_PARTS=BLOCK_PARTS, **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return masked, sums, grad_weights, grad_biases


def _norm_sums_results(gradients, xs, bits, moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_norms, _, num_views, channels = moments.shape
    is_written = bits is not None or len(gradients) == 2
    return (
        _like(gradients[0]) if is_written else gradients[0].new_empty(0),
        moments.new_empty(num_norms, 2, num_views, channels),
        moments.new_empty(num_norms, channels),
        moments.new_empty(num_norms, channels),
    )


@norm_sums.register_fake
def _(gradients, xs, bits, moments, weights, biases, relu):
    return _norm_sums_results(gradients, xs, bits, moments)


@_operator("bt_fast::norm_backward")
def norm_backward(
    g: Tensor,
    xs: list[Tensor],
    moments: Tensor,
    sums: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    total: int,
    relu: bool,
) -> list[Tensor]:
    """d L / d x of every norm.

    g: gradient of y; relu: whether it is still to be masked by where y > 0. sums: of all ranks.
    """
    num_views = moments.shape[2]
    where = split(xs[0], num_views)
    xs = [_channels_last(x) for x in xs]
    inputs = [_like(x) for x in xs]
    last = len(xs) - 1
    _norm_backward[(where.columns, where.parts, num_views)](
        _channels_last(g), xs[0], xs[last], inputs[0], inputs[last],
        moments, sums, weights[0], biases[0], weights[last],
        where.num_rows, where.channels, where.rows_per_part, total,
        VIEWS=num_views, RELU=relu, NORMS=len(xs), **BLOCKS, **OPTIONS,
    )  # fmt: skip
    return inputs


@norm_backward.register_fake
def _(g, xs, moments, sums, weights, biases, total, relu):
    return [_like(x) for x in xs]


@_operator("bt_fast::norm_pool_forward")
def norm_pool_forward(
    x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor, total: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max_pool(relu(norm(x))), windows of 3 x 3 and stride 2: [V n, C, H, W] -> [.., ceil(H / 2),
    ceil(W / 2)].

    Returns y; x at the pixel that won each window; which that was, uint8 (see `_tap`; the first of
    equals, as torch has it); and moments as `norm_forward`.
    """
    num_views = sums.shape[2]
    x = _channels_last(x)
    y, peaks, taps, moments = _norm_pool_forward_results(x, sums)
    height, width = y.shape[2:]
    columns = triton.cdiv(x.shape[1], BLOCK_CHANNELS)
    _norm_pool_forward[(columns, triton.cdiv(height, POOL_ROWS), len(x))](
        x, y, peaks, taps, sums, moments, weight, bias,
        len(x) // num_views, *x.shape[1:], height, width, total, eps,
        VIEWS=num_views, ROWS=POOL_ROWS, BLOCK=POOL_BLOCK, BLOCK_CHANNELS=BLOCK_CHANNELS, **OPTIONS,
    )  # fmt: skip
    return y, peaks, taps, moments


def _norm_pool_forward_results(x, sums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    shape = n, channels, (height + 1) // 2, (width + 1) // 2
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    moments = sums.new_empty(1, 3, *sums.shape[2:], dtype=torch.float32)
    return y, torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8), moments


@norm_pool_forward.register_fake
def _(x, sums, weight, bias, total, eps):
    return _norm_pool_forward_results(x, sums)


@_operator("bt_fast::norm_pool_backward")
def norm_pool_backward(
    g: Tensor,
    taps: Tensor,
    x: Tensor,
    moments: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    total: int,
) -> Tensor:
    """d L / d x; g: gradient of what was pooled."""
    num_views = moments.shape[2]
    x = _channels_last(x)
    grad_x = _like(x)
    height, width = g.shape[2:]
    columns = triton.cdiv(x.shape[1], BLOCK_CHANNELS)
    _norm_pool_backward[(columns, triton.cdiv(height, POOL_ROWS), len(x))](
        _channels_last(g), taps, x, grad_x, moments, sums, weight, bias,
        len(x) // num_views, *x.shape[1:], height, width, total,
        VIEWS=num_views, ROWS=POOL_ROWS, BLOCK=POOL_BLOCK, BLOCK_CHANNELS=BLOCK_CHANNELS, **OPTIONS,
    )  # fmt: skip
    return grad_x


@norm_pool_backward.register_fake
def _(g, taps, x, moments, sums, weight, bias, total):
    return _like(x)


# Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _load(at, mask):
    """Float32 values. A bf16 is the upper half of one: as a shift, one instruction."""
    value = tl.load(at, mask, other=0.0)
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _load_channels(base, row, channels, channel, inside):
    """Float32 or float64 [BLOCK_CHANNELS] of row `row` of a matrix of rows by channels."""
    return tl.load(base + row * channels + channel, inside, other=0.0)


@triton.jit
def _mean_and_inverse(sums, norm, view, channel, inside, channels, total, eps, VIEWS: tl.constexpr):
    """Mean, 1 / deviation and biased variance of a norm in one view, from float64 sums."""
    share = 1.0 / tl.cast(total, tl.float64)
    row = norm * 2 * VIEWS + view
    mean = _load_channels(sums, row, channels, channel, inside) * share
    square = _load_channels(sums, row + VIEWS, channels, channel, inside) * share
    variance = tl.maximum(square - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance.to(tl.float32) + eps))
    return mean.to(tl.float32), inverse, variance


@triton.jit
def _store_moments(
    moments, norm, view, channel, inside, channels, mean, inverse, variance, total,
    VIEWS: tl.constexpr,
):  # fmt: skip
    count = tl.cast(total, tl.float64)
    at = moments + (norm * 3 * VIEWS + view) * channels + channel
    tl.store(at, mean, inside)
    tl.store(at + VIEWS * channels, inverse, inside)
    unbiased = variance * (count / (count - 1.0))
    tl.store(at + 2 * VIEWS * channels, unbiased.to(tl.float32), inside)


@triton.jit
def _is_last(arrived, column, programs):
    """Whether all programs of a block of channels have stored their parts, which are then visible.

    The barriers order the other threads' stores before, and loads after, the one atomic operation.
    """
    tl.debug_barrier()
    before = tl.atomic_add(arrived + column, 1, sem="acq_rel")
    last = before == programs - 1
    if last:
        tl.store(arrived + column, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _add_parts(
    parts, view, index, channel, inside, channels, num_parts,
    NUM_SUMS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sum of one of the sums over all parts of a view, in their order, float64."""
    total = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float64)
    for start in range(0, num_parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        row = (view * num_parts + part) * NUM_SUMS + index
        mask = (part < num_parts)[:, None] & inside[None, :]
        at = parts + row[:, None] * channels + channel[None, :]
        total += tl.load(at, mask, other=0.0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _mean_of_first_rows(
    x, num_rows, channels, channel, inside,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Near enough to a view's mean to lose no digits to it: float32 [BLOCK_CHANNELS]."""
    row = tl.arange(0, BLOCK_ROWS)
    mask = (row < num_rows)[:, None] & inside[None, :]
    at = row[:, None] * channels + channel[None, :]
    value = _load(x + at, mask)
    return tl.sum(value, 0) / tl.minimum(num_rows, BLOCK_ROWS)


@triton.jit
def _norm_moments(
    x, parts, sums, arrived, num_rows, channels, rows_per_part,
    VIEWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    column, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(1)
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    step = tl.cast(num_rows, tl.int64) * channels  # elements of a view
    shift = _mean_of_first_rows(
        x + view * step, num_rows, channels, channel, inside, BLOCK_ROWS, BLOCK_CHANNELS
    )
    first = part * rows_per_part
    num = tl.minimum(rows_per_part, num_rows - first)
    x_part = x + view * step + tl.cast(first, tl.int64) * channels
    of_x = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    of_square = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, num, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num)[:, None] & inside[None, :]
        at = x_part + row[:, None] * channels + channel[None, :]
        value = _load(at, mask) - shift[None, :]
        value = tl.where(mask, value, 0.0)
        of_x += value
        of_square += value * value
    at = parts + (view * num_parts + part) * 2 * channels + channel
    tl.store(at, tl.sum(of_x, 0), inside)
    tl.store(at + channels, tl.sum(of_square, 0), inside)
    if _is_last(arrived, column, num_parts * VIEWS):
        count = tl.cast(num_rows, tl.float64)
        for v in tl.static_range(VIEWS):
            about = _mean_of_first_rows(
                x + v * step, num_rows, channels, channel, inside, BLOCK_ROWS, BLOCK_CHANNELS
            ).to(tl.float64)
            first_sum = _add_parts(
                parts, v, 0, channel, inside, channels, num_parts, 2, BLOCK_PARTS, BLOCK_CHANNELS
            )
            second_sum = _add_parts(
                parts, v, 1, channel, inside, channels, num_parts, 2, BLOCK_PARTS, BLOCK_CHANNELS
            )
            result = sums + v * channels + channel
            tl.store(result, first_sum + count * about, inside)
            second_sum += about * (2.0 * first_sum + count * about)
            tl.store(result + VIEWS * channels, second_sum, inside)


@triton.jit
def _affine(x, mean, scale, bias):
    """Normalised x; alike in all kernels, so that all agree on where it is positive."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _masked(gradient, y):
    """The gradient before ReLU: as torch has it, it passes where y is not a number."""
    return tl.where(y <= 0.0, 0.0, gradient)


@triton.jit
def _norm_forward(
    x, other, y, bits, sums, moments, weight, bias, other_weight, other_bias,
    num_rows, channels, rows_per_part, total, eps,
    VIEWS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    column, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, inverse, variance = _mean_and_inverse(
        sums, 0, view, channel, inside, channels, total, eps, VIEWS
    )
    if part == 0:
        _store_moments(
            moments, 0, view, channel, inside, channels, mean, inverse, variance, total, VIEWS
        )
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        other_mean, other_inverse, variance = _mean_and_inverse(
            sums, 1, view, channel, inside, channels, total, eps, VIEWS
        )
        if part == 0:
            _store_moments(
                moments, 1, view, channel, inside, channels, other_mean, other_inverse, variance,
                total, VIEWS,
            )  # fmt: skip
        other_scale = other_inverse * tl.load(other_weight + channel, inside, other=0.0)
        shift += tl.load(other_bias + channel, inside, other=0.0)
    first = part * rows_per_part
    num = tl.minimum(rows_per_part, num_rows - first)
    first_row = tl.cast(num_rows, tl.int64) * view + first
    begin = first_row * channels
    byte = column * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    num_bytes = tl.cdiv(channels, 8)
    for start in range(0, num, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        value = _load(x + begin + at, mask)
        value = _affine(value, mean, scale, shift)
        if RESIDUAL:
            added = _load(other + begin + at, mask)
            if NORMS == 2:
                added = (added - other_mean[None, :]) * other_scale[None, :]
            value += added
            _store_bits(
                bits + first_row * num_bytes, value, row, byte, num, num_bytes,
                BLOCK_ROWS, BLOCK_CHANNELS,
            )  # fmt: skip
        if RELU:
            value = _relu(value)
        tl.store(y + begin + at, value.to(y.dtype.element_ty), mask)


@triton.jit
def _store_bits(
    bits, value, row, byte, num_rows, num_bytes,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Where the gradient passes: where value is not at most 0."""
    passes = tl.where(value <= 0.0, 0, 1).to(tl.int32)
    passes = tl.reshape(passes, [BLOCK_ROWS, BLOCK_CHANNELS // 8, 8])
    packed = tl.sum(passes << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
    mask = (row < num_rows)[:, None] & (byte < num_bytes)[None, :]
    tl.store(bits + row[:, None] * num_bytes + byte[None, :], packed, mask)


@triton.jit
def _load_bits(
    bits, row, byte, num_rows, num_bytes,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    mask = (row < num_rows)[:, None] & (byte < num_bytes)[None, :]
    packed = tl.load(bits + row[:, None] * num_bytes + byte[None, :], mask, other=0).to(tl.int32)
    passes = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(passes, [BLOCK_ROWS, BLOCK_CHANNELS]) != 0


@triton.jit
def _norm_sums(
    g, other_g, x, other_x, bits, masked, moments, weight, bias,
    parts, sums, grad_weights, grad_biases, arrived, num_rows, channels, rows_per_part,
    VIEWS: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr, GRADIENTS: tl.constexpr,
    NORMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    column, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(1)
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean = _load_channels(moments, view, channels, channel, inside)
    if RELU and not BITS:
        scale = _load_channels(moments, VIEWS + view, channels, channel, inside)
        scale *= tl.load(weight + channel, inside, other=0.0)
        shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        other_mean = _load_channels(moments, 3 * VIEWS + view, channels, channel, inside)
    first = part * rows_per_part
    num = tl.minimum(rows_per_part, num_rows - first)
    first_row = tl.cast(num_rows, tl.int64) * view + first
    begin = first_row * channels
    byte = column * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    num_bytes = tl.cdiv(channels, 8)
    of_g = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    of_product = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    if NORMS == 2:
        of_other = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, num, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        gradient = _load(g + begin + at, mask)
        if GRADIENTS == 2:
            gradient += _load(other_g + begin + at, mask)
        value = _load(x + begin + at, mask)
        if BITS:
            passes = _load_bits(
                bits + first_row * num_bytes, row, byte, num, num_bytes, BLOCK_ROWS, BLOCK_CHANNELS
            )
            gradient = tl.where(passes, gradient, 0.0)
        elif RELU:
            gradient = _masked(gradient, _affine(value, mean, scale, shift))
        if BITS or GRADIENTS == 2:
            rounded = gradient.to(masked.dtype.element_ty)
            tl.store(masked + begin + at, rounded, mask)
            gradient = rounded.to(tl.float32)  # what `_norm_backward` will read
        of_g += gradient
        of_product += gradient * (value - mean[None, :])
        if NORMS == 2:
            value = _load(other_x + begin + at, mask)
            of_other += gradient * (value - other_mean[None, :])
    NUM_SUMS: tl.constexpr = 1 + NORMS
    at = parts + (view * num_parts + part) * NUM_SUMS * channels + channel
    tl.store(at, tl.sum(of_g, 0), inside)
    tl.store(at + channels, tl.sum(of_product, 0), inside)
    if NORMS == 2:
        tl.store(at + 2 * channels, tl.sum(of_other, 0), inside)
    if _is_last(arrived, column, num_parts * VIEWS):
        bias_gradient = tl.zeros([BLOCK_CHANNELS], tl.float64)
        for norm in tl.static_range(NORMS):
            weight_gradient = tl.zeros([BLOCK_CHANNELS], tl.float64)
            for v in tl.static_range(VIEWS):
                result = sums + (norm * 2 * VIEWS + v) * channels + channel
                sum_g = _add_parts(
                    parts, v, 0, channel, inside, channels, num_parts,
                    NUM_SUMS, BLOCK_PARTS, BLOCK_CHANNELS,
                )  # fmt: skip
                tl.store(result, sum_g.to(tl.float32), inside)
                sum_product = _add_parts(
                    parts, v, 1 + norm, channel, inside, channels, num_parts,
                    NUM_SUMS, BLOCK_PARTS, BLOCK_CHANNELS,
                )  # fmt: skip
                tl.store(result + VIEWS * channels, sum_product.to(tl.float32), inside)
                inverse = _load_channels(
                    moments, (3 * norm + 1) * VIEWS + v, channels, channel, inside
                )
                weight_gradient += sum_product * inverse.to(tl.float64)
                if norm == 0:
                    bias_gradient += sum_g
            of_norm = norm * channels + channel
            tl.store(grad_weights + of_norm, weight_gradient.to(tl.float32), inside)
            tl.store(grad_biases + of_norm, bias_gradient.to(tl.float32), inside)


@triton.jit
def _coefficients(
    moments, sums, norm, view, channel, inside, channels, total, weight, VIEWS: tl.constexpr
):
    """mean, scale, mean of g and slope: d L / d x = scale (g - mean_g - (x - mean) slope)."""
    row = norm * 3 * VIEWS + view
    mean = _load_channels(moments, row, channels, channel, inside)
    inverse = _load_channels(moments, row + VIEWS, channels, channel, inside)
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    count = tl.cast(total, tl.float32)
    row = norm * 2 * VIEWS + view
    mean_g = tl.div_rn(_load_channels(sums, row, channels, channel, inside), count)
    slope = tl.div_rn(_load_channels(sums, row + VIEWS, channels, channel, inside), count)
    return mean, scale, mean_g, slope * inverse * inverse


@triton.jit
def _input_gradient(gradient, x, mean, scale, mean_g, slope):
    centred = gradient - mean_g[None, :]
    return (centred - (x - mean[None, :]) * slope[None, :]) * scale[None, :]


@triton.jit
def _norm_backward(
    g, x, other_x, grad_x, other_grad_x, moments, sums, weight, bias, other_weight,
    num_rows, channels, rows_per_part, total,
    VIEWS: tl.constexpr, RELU: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    column, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, scale, mean_g, slope = _coefficients(
        moments, sums, 0, view, channel, inside, channels, total, weight, VIEWS
    )
    if RELU:
        shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        other_mean, other_scale, other_mean_g, other_slope = _coefficients(
            moments, sums, 1, view, channel, inside, channels, total, other_weight, VIEWS
        )
    first = part * rows_per_part
    num = tl.minimum(rows_per_part, num_rows - first)
    begin = (tl.cast(num_rows, tl.int64) * view + first) * channels
    for start in range(0, num, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < num)[:, None] & inside[None, :]
        at = begin + row[:, None] * channels + channel[None, :]
        gradient = _load(g + at, mask)
        value = _load(x + at, mask)
        if RELU:
            gradient = _masked(gradient, _affine(value, mean, scale, shift))
        result = _input_gradient(gradient, value, mean, scale, mean_g, slope)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask)
        if NORMS == 2:
            value = _load(other_x + at, mask)
            result = _input_gradient(
                gradient, value, other_mean, other_scale, other_mean_g, other_slope
            )
            tl.store(other_grad_x + at, result.to(other_grad_x.dtype.element_ty), mask)


@triton.jit
def _norm_pool_forward(
    x, y, peaks, taps, sums, moments, weight, bias,
    num_images, channels, height, width, pooled_height, pooled_width, total, eps,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some rows of one pooled image."""
    column, rows, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    view = image // num_images
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, inverse, variance = _mean_and_inverse(
        sums, 0, view, channel, inside, channels, total, eps, VIEWS
    )
    if (rows == 0) & (image % num_images == 0):
        _store_moments(
            moments, 0, view, channel, inside, channels, mean, inverse, variance, total, VIEWS
        )
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    shift = tl.load(bias + channel, inside, other=0.0)
    # Normalising keeps the order of values or reverses it. (If the weight is exactly 0, all are the
    # same afterwards; the largest wins here, the first in torch.)
    sign = tl.where(scale < 0.0, -1.0, 1.0)
    x += tl.cast(image, tl.int64) * height * width * channels
    first_pooled = tl.cast(image, tl.int64) * pooled_height * pooled_width * channels
    y += first_pooled
    peaks += first_pooled
    taps += first_pooled
    first = rows * ROWS
    for start in range(0, pooled_width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (j < pooled_width)[:, None] & inside[None, :]
        best, won = _best_of_row(x, 2 * first - 1, j, mask, channel, channels, height, width, sign)
        best = tl.where(first > 0, best, float("-inf"))
        for i in range(first, tl.minimum(first + ROWS, pooled_height)):
            value, tap = _best_of_row(x, 2 * i, j, mask, channel, channels, height, width, sign)
            won = tl.where(value > best, tap, won)
            best = tl.maximum(value, best)
            value, tap = _best_of_row(x, 2 * i + 1, j, mask, channel, channels, height, width, sign)
            is_better = (2 * i + 1 < height) & (value > best)
            won = tl.where(is_better, tap, won)
            best = tl.where(is_better, value, best)
            peak = best * sign[None, :]
            at = (i * pooled_width + j)[:, None] * channels + channel[None, :]
            result = _relu(_affine(peak, mean, scale, shift))
            tl.store(y + at, result.to(y.dtype.element_ty), mask)
            tl.store(peaks + at, peak.to(peaks.dtype.element_ty), mask)
            tl.store(taps + at, won.to(tl.uint8), mask)
            best, won = value, tap  # the last row of this window is the first of the next


@triton.jit
def _best_of_row(x, row, j, mask, channel, channels, height, width, sign):
    """The largest of the three values of a row that belong to each window, times the sign, and
    which it is, the first of equals, as `_tap` numbers them."""
    mask = mask & (row >= 0) & (row < height)
    at = x + (row * width + 2 * j)[:, None] * channels + channel[None, :]
    has_left = (j > 0)[:, None]
    has_right = (2 * j + 1 < width)[:, None]
    left = _load(at - channels, mask & has_left) * sign[None, :]
    middle = _load(at, mask) * sign[None, :]
    right = _load(at + channels, mask & has_right) * sign[None, :]
    is_left = has_left & (left >= middle)
    best = tl.where(is_left, left, middle)
    won = tl.where(is_left, _tap(row, 0), _tap(row, 1))
    is_right = has_right & (right > best)
    return tl.where(is_right, right, best), tl.where(is_right, _tap(row, 2), won)


@triton.jit
def _tap(row, column):
    """The number of a value in its window, alike in both windows that share the row."""
    return 3 * (row & 3) + column


@triton.jit
def _norm_pool_backward(
    g, taps, x, grad_x, moments, sums, weight, bias,
    num_images, channels, height, width, pooled_height, pooled_width, total,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some rows of quads of pixels of one image.

    The pixels (2 i + p, 2 j + q) of quad (i, j), where p and q are 0 or 1, get their gradients from
    the windows (i + k, j + m) with k <= p and m <= q.
    """
    column, rows, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    view = image // num_images
    channel = column * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, scale, mean_g, slope = _coefficients(
        moments, sums, 0, view, channel, inside, channels, total, weight, VIEWS
    )
    shift = tl.load(bias + channel, inside, other=0.0)
    first_pixel = tl.cast(image, tl.int64) * height * width
    x += first_pixel * channels
    grad_x += first_pixel * channels
    first_window = tl.cast(image, tl.int64) * pooled_height * pooled_width
    g += first_window * channels
    taps += first_window * channels
    for i in range(rows * ROWS, tl.minimum(rows * ROWS + ROWS, pooled_height)):
        for start in range(0, pooled_width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            for p in tl.static_range(2):
                for q in tl.static_range(2):
                    gradient = tl.zeros([BLOCK, BLOCK_CHANNELS], tl.float32)
                    for k in tl.static_range(p + 1):
                        for m in tl.static_range(q + 1):
                            exists = (i + k < pooled_height) & (j + m < pooled_width)
                            mask = exists[:, None] & inside[None, :]
                            at = ((i + k) * pooled_width + j + m)[:, None] * channels
                            at += channel[None, :]
                            won = tl.load(taps + at, mask, other=255).to(tl.int32)
                            is_won = won == _tap(2 * i + p, q + 1 - 2 * m)
                            value = _load(g + at, mask)
                            gradient += tl.where(is_won, value, 0.0)
                    row = 2 * i + p
                    across = 2 * j + q
                    mask = ((row < height) & (across < width))[:, None] & inside[None, :]
                    at = (row * width + across)[:, None] * channels + channel[None, :]
                    value = _load(x + at, mask)
                    gradient = _masked(gradient, _affine(value, mean, scale, shift))
                    result = _input_gradient(gradient, value, mean, scale, mean_g, slope)
                    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask)
