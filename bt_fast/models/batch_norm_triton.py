"""Batch norm, residual sum, ReLU and max-pool as fused Triton kernels.

`batch_norm` is the definition. Between two convolutions of a ResNet, memory traffic takes the time.
Each layer has four kernels, with the fewest reads and writes that statistics of a batch allow:

    _norm_moments     reads x                             -> sums of x and of x^2, float64
                      [over ranks: one all-reduce]
    _norm_forward     reads x (and the residual r)        -> y = relu(norm(x) + r)
    _norm_sums        reads g = d L / d y and x           -> sums of g and of g (x - mean)
                      [over ranks: one all-reduce]
    _norm_backward    reads g and x                       -> d L / d x

* If r has a norm too, `_norm_moments` runs for x and for r; each of the other kernels computes both
  norms in one call.
* With a max-pool, as in the stem, `_norm_pool_forward` writes only the pooled values, and
  `_norm_pool_backward` gathers a pixel's gradient from the windows whose maximum it is.
* If y has two consumers, a convolution and a shortcut, `_norm_sums` adds their two gradients.
* The mask y > 0 is recomputed from x. After a residual sum that would need r: there the forward
  pass writes one bit per value, and `_norm_sums` writes the masked gradient, which is also r's.

Activations are channels-last: a matrix of rows (image, y, x) by channels. A program reduces a block
of channels and a range of rows of one view in float32, after subtracting the mean of the view's
first rows, and writes partial sums; the last program of a block of channels to finish adds them in
a fixed order. The partition depends on the shape alone, so results are bitwise equal on any GPU;
`Tiling` describes it.

The kernels are torch.library operators, opaque to the compiler except for their shapes, and without
side effects, so that CUDA graphs can capture them. Triton's interpreter runs them on CPU tensors.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bt_fast.distributed.collectives import Group, all_reduce, group_size

BLOCK_CHANNELS = 64
FIRST_ROWS = 32  # of a view, whose mean is subtracted before squaring
POOL_BLOCK = 8  # pixels of a pooled image, and quads of input pixels, processed at a time
POOL_ROWS = 8  # rows of a pooled image per program
POOL_OPTIONS = {"num_warps": 2}
ROW_MULTIPLE = 32  # that the rows of a program are


class Tiling(NamedTuple):
    """How a kernel's programs share a matrix of rows by channels."""

    num_programs: int  # at most
    block_rows: int  # rows that a program loads at a time
    num_warps: int
    num_stages: int = 1  # blocks of rows under way; if more than one, through shared memory
    max_registers: int | None = None  # per thread
    min_rows: int = 32  # of a program, if there are as many

    @property
    def constants(self) -> dict[str, int]:
        # As many rows as the threads load with 16 bytes each: 8 values of bf16, 4 of float32.
        acc_rows = min(self.block_rows, 32 * self.num_warps * 8 // BLOCK_CHANNELS)
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_CHANNELS": BLOCK_CHANNELS,
            "STAGES": self.num_stages,
            "ACC_ROWS": acc_rows,
            "BLOCK_PARTS": 2 * acc_rows,  # four loads in flight per thread
        }

    @property
    def options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


# Chosen for an H100, which has 132 SMs, and timed on one with ResNet-50 and 256 images.
#
# The programs of a reduction are resident at the same time, because a second wave of few programs
# takes as long as a full one; and they are few and large, because the last one adds the parts of
# all. With at most 64 registers, two programs of 16 warps share an SM.
#
# The elementwise kernels have so many waves that an incomplete one matters little: with four times
# as many programs as 4,224, of 96 rows or more, those of large layers take 3 to 4 % less.
#
# With two norms, which take 128 registers, all kernels have two full waves of four programs per SM:
# the sums of a step take 3.2 ms, in 264 programs of 16 warps 3.6; in 4,224 programs, forward and
# backward pass are 4 % slower. Loads have no eviction hints: with "evict_first", which keeps other
# values in the cache, the kernels of a layer in sequence are up to 5 % slower.
#
# `tools/kernel_report.py` shows registers and spills. (Where BLOCK_ROWS equals BLOCK_PARTS, Triton
# merges the layouts of their blocks, and the last program adds its parts through shared memory.)
MOMENTS = Tiling(2 * 132, block_rows=64, num_warps=16, num_stages=4, max_registers=64)
SUMS = Tiling(2 * 132, block_rows=64, num_warps=16, max_registers=64)
FORWARD = Tiling(128 * 132, block_rows=32, num_warps=4, min_rows=96)
BACKWARD = Tiling(128 * 132, block_rows=32, num_warps=4, min_rows=96)
TWO_NORMS = Tiling(8 * 132, block_rows=32, num_warps=4)


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    residual_norm: tuple[Tensor, Tensor] | None = None,
    relu: bool = True,
    pool: bool = False,
    two_consumers: bool = False,
    eps: float,
    num_views: int = 2,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + residual), each view normalised by its own statistics over all ranks.

    Args:
        x: [V n, C, H, W] or [V n, C], view after view; float32 or a narrower type.
        weight, bias: float32 [C].
        residual: like x.
        residual_norm: weight and bias of the residual's norm, if it has one.
        relu: False for the norm alone; then without residual and pool.
        pool: 3 x 3 max-pool of stride 2 after ReLU; without residual.
        two_consumers: whether y is returned as two tensors, whose gradients arrive separately.
        group: the ranks whose samples are normalised together; the same number on each.

    Returns:
        y like x, channels-last; an alias of y; and for every norm, mean and unbiased variance over
        all ranks, float32 [norms, 2, V, C].
    """
    assert relu or not (pool or residual is not None), "the norm alone has no residual and no pool"
    options = num_views, eps, relu, pool, two_consumers, group
    residual_affine = residual_norm or (None, None)
    y, alias, moments = _NormAct.apply(x, weight, bias, residual, *residual_affine, *options)
    moments = moments.unflatten(2, (num_views, -1))
    return y, y if alias is None else alias, moments[:, ::2]


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, residual, residual_weight, residual_bias,
        num_views, eps, relu, pool, two_consumers, group,
    ):  # fmt: skip
        norm_inputs, weights, biases = [x], [weight], [bias]
        if residual_weight is not None:
            norm_inputs.append(residual)
            weights.append(residual_weight)
            biases.append(residual_bias)
        # Values per channel and view.
        count = group_size(group) * x.numel() // (num_views * x.shape[1])
        if count < 2:
            raise ValueError("batch norm needs more than one value per channel and view")
        sums = torch.ops.bt_fast.norm_moments(norm_inputs, num_views)
        sums = all_reduce(sums, group, overwrite=True)
        saved: list[Tensor | None]
        if pool:
            y, *saved, moments = torch.ops.bt_fast.norm_pool_forward(
                x, sums, weight, bias, count, eps
            )
        else:
            addend = residual if residual_weight is None else None
            y, bits, moments = torch.ops.bt_fast.norm_forward(
                norm_inputs, addend, sums, weights, biases, count, eps, relu
            )
            saved = [bits if residual is not None else None]
        ctx.save_for_backward(moments, bias, *norm_inputs, *weights, *saved)
        ctx.options, ctx.count, ctx.num_norms = (relu, pool, group), count, len(norm_inputs)
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(moments)
        if not torch.compiler.is_compiling():  # the compiler removes unused zeros
            ctx.set_materialize_grads(False)
        return y, y.view_as(y) if two_consumers else None, moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_alias, _):
        relu, pool, group = ctx.options
        n = ctx.num_norms
        moments, bias, *rest = ctx.saved_tensors
        norm_inputs, weights, saved = rest[:n], rest[n : 2 * n], rest[2 * n :]
        gradients = [gradient for gradient in (g, g_alias) if gradient is not None]
        if not gradients:
            return (None,) * 12
        masked, sums, grad_weights, grad_biases = torch.ops.bt_fast.norm_sums(
            gradients, [saved[0]] if pool else norm_inputs, None if pool else saved[0],
            moments, weights[0], bias, relu,
        )  # fmt: skip
        is_masked = ctx.has_residual or len(gradients) == 2
        g = masked if is_masked else gradients[0]
        sums = all_reduce(sums, group, overwrite=True)
        if pool:
            grad_x = torch.ops.bt_fast.norm_pool_backward(
                g, saved[1], norm_inputs[0], moments, sums, weights[0], bias, ctx.count
            )
            return grad_x, grad_weights[0], grad_biases[0], *[None] * 9
        grad_x, *grad_residual = torch.ops.bt_fast.norm_backward(
            g, norm_inputs, moments, sums, weights, bias, ctx.count, relu and not is_masked
        )
        of_residual = (g if ctx.has_residual else None, None, None)
        if n == 2:
            of_residual = (*grad_residual, grad_weights[1], grad_biases[1])
        return grad_x, grad_weights[0], grad_biases[0], *of_residual, *[None] * 6


class _Partition(NamedTuple):
    """Partition of each view's matrix of rows by channels among programs."""

    num_rows: int  # of a view
    channels: int
    rows_per_part: int
    num_blocks: int  # blocks of channels
    num_parts: int  # ranges of rows
    num_views: int


def _make_partition(x: Tensor, num_views: int, tiling: Tiling) -> _Partition:
    """The partition of x [V n, C, ...], a function of its shape alone."""
    channels = x.shape[1]
    num_rows = x.numel() // (num_views * channels)
    num_blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    parts = max(1, tiling.num_programs // (num_blocks * num_views))
    rows_per_part = max(triton.cdiv(num_rows, parts), tiling.min_rows)
    rows_per_part = triton.cdiv(rows_per_part, ROW_MULTIPLE) * ROW_MULTIPLE
    num_parts = triton.cdiv(num_rows, rows_per_part)
    assert num_blocks * num_views <= _NUM_COUNTERS
    return _Partition(num_rows, channels, rows_per_part, num_blocks, num_parts, num_views)


def _launch(
    kernel: triton.JITFunction, tiling: Tiling, partition: _Partition, *args, **others
) -> None:
    """Run a kernel with those constants of the tiling that it takes; see `_has_memory`."""
    if _has_memory(args[0]):
        constants = {k: n for k, n in tiling.constants.items() if k in kernel.arg_names}
        kernel[partition.num_blocks, partition.num_parts, partition.num_views](
            *args, num_rows=partition.num_rows, channels=partition.channels,
            rows_per_part=partition.rows_per_part, VIEWS=partition.num_views,
            **others, **constants, **tiling.options,
        )  # fmt: skip


def _launch_pool(
    kernel: triton.JITFunction, x: Tensor, pooled: Tensor, num_views: int, *args, **others
) -> None:
    """Run a kernel of the max-pool of x, whose result has the shape of `pooled`."""
    height, width = pooled.shape[2:]
    grid = triton.cdiv(x.shape[1], BLOCK_CHANNELS), triton.cdiv(height, POOL_ROWS), len(x)
    if _has_memory(x):
        kernel[grid](
            *args, len(x) // num_views, *x.shape[1:], height, width, **others, VIEWS=num_views,
            ROWS=POOL_ROWS, BLOCK=POOL_BLOCK, BLOCK_CHANNELS=BLOCK_CHANNELS, **POOL_OPTIONS,
        )  # fmt: skip


def _has_memory(x: Tensor) -> bool:
    """Whether x has values; the compiler and dry runs only need the shapes of results."""
    return not (x.is_meta or isinstance(x, FakeTensor))


# For 2 million channels in two views: more than the projector of any GPU has.
_NUM_COUNTERS = 1 << 16
# By device: numbers of finished programs, for `_is_last`; zero between kernels.
_finished: dict[torch.device, Tensor] = {}


def initialise(device: torch.device) -> None:
    """Allocate the counters of finished programs and register the operators with the compiler.

    Must be called before a model is compiled or a CUDA graph captured. All norms of a device must
    run on one stream.
    """
    _counters(device)
    # For an operator not in this list, torch 2.11 prints the arguments with the expressions that
    # they were computed from, which exceeds the memory for a deep network.
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        for name in _OPERATORS:
            FALLBACK_ALLOW_LIST.add(name)


def _counters(device: torch.device) -> Tensor:
    if device in _finished:
        return _finished[device]
    counters = torch.zeros(_NUM_COUNTERS, dtype=torch.int32, device=device)
    if not isinstance(counters, FakeTensor):  # of the compiler or a test
        _finished[device] = counters
    return counters


def _channels_last(x: Tensor) -> Tensor:
    """x, or a copy, with its channels contiguous in memory."""
    return x.contiguous(memory_format=_memory_format(x))


def _empty_like(x: Tensor) -> Tensor:
    """Uninitialised tensor like x, channels-last."""
    return torch.empty_like(x, memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


# Operators --------------------------------------------------------------------------------------
#
# Sums and moments have three dimensions, views and channels in one: a tensor of four dimensions
# between two operators may be given the strides of a channels-last image by the compiler.

_OPERATORS: list[str] = []


def _operator(function: Callable[..., Any]) -> Any:
    """Register a function that allocates its results and launches a kernel: for tensors without
    memory, it computes the results' shapes."""
    name = f"bt_fast::{function.__name__}"
    tags = [torch.Tag.needs_fixed_stride_order]
    operator = torch.library.custom_op(name, function, mutates_args=(), tags=tags)
    operator.register_fake(function)
    _OPERATORS.append(name)
    return operator


@_operator
def norm_moments(xs: list[Tensor], num_views: int) -> Tensor:
    """For each x [V n, C, ...], the sums of x and of x^2: float64 [norms, 2, V * C]."""
    partition = _make_partition(xs[0], num_views, MOMENTS)
    counters = _counters(xs[0].device)
    sums = xs[0].new_empty(len(xs), 2, num_views * partition.channels, dtype=torch.float64)
    for x, sums_of_x in zip(xs, sums, strict=True):
        shape = num_views, partition.num_parts, 2, partition.channels
        partials = x.new_empty(shape, dtype=torch.float32)
        _launch(
            _norm_moments, MOMENTS, partition, _channels_last(x), partials, sums_of_x, counters,
            FIRST_ROWS=FIRST_ROWS,
        )  # fmt: skip
    return sums


@_operator
def norm_forward(
    xs: list[Tensor],
    residual: Tensor | None,
    sums: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    count: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(norm(x) + residual) for xs = [x], relu(norm(x) + norm(r)) for xs = [x, r].

    sums: over all ranks, from `norm_moments`; count: values per channel and view in them.
    Returns y; the mask y > 0, one bit per value, uint8 [rows, C / 8] (empty without residual); and
    float32 [norms, 3, V * C]: mean, 1 / deviation, unbiased variance.
    """
    x, num_norms, channels = _channels_last(xs[0]), len(xs), xs[0].shape[1]
    added = xs[1] if num_norms == 2 else residual
    y = _empty_like(x)
    num_rows = 0 if added is None else x.numel() // channels
    bits = x.new_empty(num_rows, triton.cdiv(channels, 8), dtype=torch.uint8)
    moments = sums.new_empty(num_norms, 3, *sums.shape[2:], dtype=torch.float32)
    tiling = FORWARD if num_norms == 1 else TWO_NORMS
    _launch(
        _norm_forward, tiling, _make_partition(x, sums.shape[2] // channels, tiling),
        x, y if added is None else _channels_last(added), y, bits,
        sums, moments, weights[0], biases[0], weights[-1], biases[-1], count=count, eps=eps,
        RELU=relu, RESIDUAL=added is not None, NORMS=num_norms,
    )  # fmt: skip
    return y, bits, moments


@_operator
def norm_sums(
    gradients: list[Tensor],
    xs: list[Tensor],
    bits: Tensor | None,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reductions of the backward pass.

    gradients: one or two gradients of y, which are added. bits: the mask y > 0, if it cannot be
    recomputed from x by weight and bias of its norm.
    Returns the masked gradient (empty if not needed later: one gradient and no bits); sums of the
    masked gradient g and of g (x - mean), float32 [norms, 2, V * C]; and this rank's gradients of
    the weights and of the biases (the same for two norms), each [norms, C].
    """
    gradients = [_channels_last(g) for g in gradients]
    num_norms, _, width = moments.shape
    channels = xs[0].shape[1]
    is_written = bits is not None or len(gradients) == 2
    masked = _empty_like(gradients[0]) if is_written else gradients[0].new_empty(0)
    sums = moments.new_empty(num_norms, 2, width)
    grad_weights, grad_biases = (moments.new_empty(num_norms, channels) for _ in range(2))
    tiling = SUMS if num_norms == 1 else TWO_NORMS
    partition = _make_partition(xs[0], width // channels, tiling)
    partials = sums.new_empty(partition.num_views, partition.num_parts, 1 + num_norms, channels)
    _launch(
        _norm_sums, tiling, partition,
        gradients[0], gradients[-1], _channels_last(xs[0]), _channels_last(xs[-1]),
        masked if bits is None else bits, masked, moments, weight, bias,
        partials, sums, grad_weights, grad_biases, _counters(xs[0].device),
        RELU=relu, BITS=bits is not None, GRADIENTS=len(gradients), NORMS=num_norms,
    )  # fmt: skip
    return masked, sums, grad_weights, grad_biases


@_operator
def norm_backward(
    g: Tensor,
    xs: list[Tensor],
    moments: Tensor,
    sums: Tensor,
    weights: list[Tensor],
    bias: Tensor,
    count: int,
    relu: bool,
) -> list[Tensor]:
    """d L / d x of every norm.

    g: gradient of y; relu: whether the kernel masks it by y > 0, from the bias of the first norm.
    sums: over all ranks.
    """
    xs = [_channels_last(x) for x in xs]
    grad_inputs = [_empty_like(x) for x in xs]
    tiling = BACKWARD if len(xs) == 1 else TWO_NORMS
    _launch(
        _norm_backward, tiling,
        _make_partition(xs[0], moments.shape[2] // xs[0].shape[1], tiling),
        _channels_last(g), xs[0], xs[-1], grad_inputs[0], grad_inputs[-1],
        moments, sums, weights[0], bias, weights[-1], count=count, RELU=relu, NORMS=len(xs),
    )  # fmt: skip
    return grad_inputs


@_operator
def norm_pool_forward(
    x: Tensor, sums: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """max_pool(relu(norm(x))), windows of 3 x 3 and stride 2: [V n, C, H, W] -> [.., ceil(H / 2),
    ceil(W / 2)].

    Returns y; x at the maximum of each window; the maximum's index in the window, uint8 (see
    `_window_index`; the first of equals, as in torch); and moments as `norm_forward`.
    """
    n, channels, height, width = x.shape
    shape = n, channels, (height + 1) // 2, (width + 1) // 2
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    maxima, argmax = torch.empty_like(y), torch.empty_like(y, dtype=torch.uint8)
    moments = sums.new_empty(1, 3, *sums.shape[2:], dtype=torch.float32)
    _launch_pool(
        _norm_pool_forward, x, y, sums.shape[2] // channels,
        _channels_last(x), y, maxima, argmax, sums, moments, weight, bias, count=count, eps=eps,
    )  # fmt: skip
    return y, maxima, argmax, moments


@_operator
def norm_pool_backward(
    g: Tensor,
    argmax: Tensor,
    x: Tensor,
    moments: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: int,
) -> Tensor:
    """d L / d x; g: gradient of the pooled result; argmax: from `norm_pool_forward`."""
    grad_x = _empty_like(x)
    _launch_pool(
        _norm_pool_backward, x, g, moments.shape[2] // x.shape[1], _channels_last(g), argmax,
        _channels_last(x), grad_x, moments, sums, weight, bias, count=count,
    )  # fmt: skip
    return grad_x


# Kernels ----------------------------------------------------------------------------------------


@triton.jit
def _load(pointers, mask):
    """Loads as float32. A bf16 is the upper half of a float32, so one shift converts it."""
    value = tl.load(pointers, mask, other=0.0)
    if value.dtype == tl.bfloat16:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _load_channels(base, row, channels, channel, inside):
    """[BLOCK_CHANNELS] of row `row` of a matrix of rows by channels."""
    return tl.load(base + row * channels + channel, inside, other=0.0)


@triton.jit
def _statistics(
    sums, moments, part, image, num_images, norm, view, channel, inside, channels, count, eps,
    VIEWS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of a norm in one view, from float64 sums. Of the programs that compute
    them, that of part 0 of the view's first image stores them, and the unbiased variance."""
    inverse_count = 1.0 / tl.cast(count, tl.float64)
    row = norm * 2 * VIEWS + view
    mean = _load_channels(sums, row, channels, channel, inside) * inverse_count
    mean_square = _load_channels(sums, row + VIEWS, channels, channel, inside) * inverse_count
    variance = tl.maximum(mean_square - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(variance.to(tl.float32) + eps))
    mean = mean.to(tl.float32)
    if (part == 0) & (image % num_images == 0):
        n = tl.cast(count, tl.float64)
        pointers = moments + (norm * 3 * VIEWS + view) * channels + channel
        tl.store(pointers, mean, inside)
        tl.store(pointers + VIEWS * channels, inverse, inside)
        unbiased = variance * (n / (n - 1.0))
        tl.store(pointers + 2 * VIEWS * channels, unbiased.to(tl.float32), inside)
    return mean, inverse


@triton.jit
def _is_last(finished, num_programs):
    """Whether this is the last of the programs that share a counter, which sees all partial sums.

    The barriers order the other threads' stores before, and loads after, the one atomic operation.
    """
    tl.debug_barrier()
    num_before = tl.atomic_add(finished, 1, sem="acq_rel")
    last = num_before == num_programs - 1
    if last:
        tl.store(finished, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _add_parts(
    partials, view, index, channel, inside, channels, num_parts,
    NUM_SUMS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Sum number `index` over all parts of a view, in a fixed order: float64 [BLOCK_CHANNELS]."""
    ACC_ROWS: tl.constexpr = BLOCK_PARTS // 4
    accumulator = tl.zeros([ACC_ROWS, channel.shape[0]], tl.float64)
    for start in range(0, num_parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        row = (view * num_parts + part) * NUM_SUMS + index
        mask = (part < num_parts)[:, None] & inside[None, :]
        pointers = partials + row[:, None] * channels + channel[None, :]
        value = tl.load(pointers, mask, other=0.0, cache_modifier=".cg")
        accumulator += _fold(value.to(tl.float64), ACC_ROWS)
    return tl.sum(accumulator, 0)


@triton.jit
def _fold(value, ROWS: tl.constexpr):
    """Sum of a block's groups of ROWS rows, within each thread: [n ROWS, C] -> [ROWS, C]."""
    GROUPS: tl.constexpr = value.shape[0] // ROWS
    if GROUPS <= 1:
        return value
    else:
        return tl.sum(tl.reshape(value, [GROUPS, ROWS, value.shape[1]]), 0)


@triton.jit
def _mean_of_first_rows(x, num_rows, channels, channel, inside, FIRST_ROWS: tl.constexpr):
    """Estimate of a view's mean, subtracted against cancellation: float32 [BLOCK_CHANNELS]."""
    row = tl.arange(0, FIRST_ROWS)
    mask = (row < num_rows)[:, None] & inside[None, :]
    offsets = row[:, None] * channels + channel[None, :]
    value = _load(x + offsets, mask)
    return tl.sum(value, 0) / tl.minimum(num_rows, FIRST_ROWS)


@triton.jit
def _norm_moments(
    x, partials, sums, finished, num_rows, channels, rows_per_part,
    VIEWS: tl.constexpr, FIRST_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr, ACC_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(1)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    x += tl.cast(num_rows, tl.int64) * channels * view
    shift = _mean_of_first_rows(x, num_rows, channels, channel, inside, FIRST_ROWS)
    part_start = part * rows_per_part
    part_rows = tl.minimum(rows_per_part, num_rows - part_start)
    x += tl.cast(part_start, tl.int64) * channels
    acc_x = tl.zeros([ACC_ROWS, BLOCK_CHANNELS], tl.float32)
    acc_square = tl.zeros([ACC_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in tl.range(0, part_rows, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < part_rows)[:, None] & inside[None, :]
        value = _load(x + row[:, None] * channels + channel[None, :], mask) - shift[None, :]
        value = tl.where(mask, value, 0.0)
        acc_x += _fold(value, ACC_ROWS)
        acc_square += _fold(value * value, ACC_ROWS)
    pointers = partials + (view * num_parts + part) * 2 * channels + channel
    tl.store(pointers, tl.sum(acc_x, 0), inside)
    tl.store(pointers + channels, tl.sum(acc_square, 0), inside)
    if _is_last(finished + block * VIEWS + view, num_parts):
        sum_x = _add_parts(partials, view, 0, channel, inside, channels, num_parts, 2, BLOCK_PARTS)
        sum_square = _add_parts(
            partials, view, 1, channel, inside, channels, num_parts, 2, BLOCK_PARTS
        )
        result = sums + view * channels + channel
        count = tl.cast(num_rows, tl.float64)
        exact_shift = shift.to(tl.float64)
        tl.store(result, sum_x + count * exact_shift, inside)
        sum_square += exact_shift * (2.0 * sum_x + count * exact_shift)
        tl.store(result + VIEWS * channels, sum_square, inside)


@triton.jit
def _affine(x, mean, scale, bias):
    """Normalised x; the same operations in all kernels, so that the mask y > 0 is the same."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def _relu(y):
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu_gradient(gradient, y):
    """The gradient of ReLU's input; passes where y is NaN, as in torch."""
    return tl.where(y <= 0.0, 0.0, gradient)


@triton.jit
def _norm_forward(
    x, residual, y, bits, sums, moments, weight, bias, residual_weight, residual_bias,
    num_rows, channels, rows_per_part, count, eps,
    VIEWS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, inverse = _statistics(
        sums, moments, part, 0, 1, 0, view, channel, inside, channels, count, eps, VIEWS
    )
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        residual_mean, residual_inverse = _statistics(
            sums, moments, part, 0, 1, 1, view, channel, inside, channels, count, eps, VIEWS
        )
        residual_scale = residual_inverse * tl.load(residual_weight + channel, inside, other=0.0)
        shift += tl.load(residual_bias + channel, inside, other=0.0)
    part_start = part * rows_per_part
    part_rows = tl.minimum(rows_per_part, num_rows - part_start)
    first_row = tl.cast(num_rows, tl.int64) * view + part_start
    begin = first_row * channels
    byte = block * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    num_bytes = tl.cdiv(channels, 8)
    for start in tl.range(0, part_rows, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < part_rows)[:, None] & inside[None, :]
        offsets = row[:, None] * channels + channel[None, :]
        value = _load(x + begin + offsets, mask)
        value = _affine(value, mean, scale, shift)
        if RESIDUAL:
            addend = _load(residual + begin + offsets, mask)
            if NORMS == 2:
                addend = (addend - residual_mean[None, :]) * residual_scale[None, :]
            value += addend
            _store_bits(bits + first_row * num_bytes, value, row, byte, part_rows, num_bytes)
        if RELU:
            value = _relu(value)
        tl.store(y + begin + offsets, value.to(y.dtype.element_ty), mask)


@triton.jit
def _store_bits(bits, value, row, byte, num_rows, num_bytes):
    """Store where the gradient passes: where value <= 0 is false."""
    passes = tl.where(value <= 0.0, 0, 1).to(tl.int32)
    passes = tl.reshape(passes, [value.shape[0], value.shape[1] // 8, 8])
    packed = tl.sum(passes << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
    mask = (row < num_rows)[:, None] & (byte < num_bytes)[None, :]
    tl.store(bits + row[:, None] * num_bytes + byte[None, :], packed, mask)


@triton.jit
def _load_bits(bits, row, byte, num_rows, num_bytes):
    mask = (row < num_rows)[:, None] & (byte < num_bytes)[None, :]
    packed = tl.load(bits + row[:, None] * num_bytes + byte[None, :], mask, other=0).to(tl.int32)
    passes = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(passes, [row.shape[0], 8 * byte.shape[0]]) != 0


@triton.jit
def _norm_sums(
    g, second_g, x, residual, bits, masked, moments, weight, bias,
    partials, sums, grad_weights, grad_biases, finished, num_rows, channels, rows_per_part,
    VIEWS: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr, GRADIENTS: tl.constexpr,
    NORMS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    STAGES: tl.constexpr, ACC_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_parts = tl.num_programs(1)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean = _load_channels(moments, view, channels, channel, inside)
    if RELU and not BITS:
        scale = _load_channels(moments, VIEWS + view, channels, channel, inside)
        scale *= tl.load(weight + channel, inside, other=0.0)
        shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        residual_mean = _load_channels(moments, 3 * VIEWS + view, channels, channel, inside)
    part_start = part * rows_per_part
    part_rows = tl.minimum(rows_per_part, num_rows - part_start)
    first_row = tl.cast(num_rows, tl.int64) * view + part_start
    begin = first_row * channels
    byte = block * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    num_bytes = tl.cdiv(channels, 8)
    acc_g = tl.zeros([ACC_ROWS, BLOCK_CHANNELS], tl.float32)
    acc_product = tl.zeros([ACC_ROWS, BLOCK_CHANNELS], tl.float32)
    if NORMS == 2:
        acc_residual = tl.zeros([ACC_ROWS, BLOCK_CHANNELS], tl.float32)
    for start in tl.range(0, part_rows, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < part_rows)[:, None] & inside[None, :]
        offsets = row[:, None] * channels + channel[None, :]
        gradient = _load(g + begin + offsets, mask)
        if GRADIENTS == 2:
            gradient += _load(second_g + begin + offsets, mask)
        value = _load(x + begin + offsets, mask)
        if BITS:
            passes = _load_bits(bits + first_row * num_bytes, row, byte, part_rows, num_bytes)
            gradient = tl.where(passes, gradient, 0.0)
        elif RELU:
            gradient = _relu_gradient(gradient, _affine(value, mean, scale, shift))
        if BITS or GRADIENTS == 2:
            rounded = gradient.to(masked.dtype.element_ty)
            tl.store(masked + begin + offsets, rounded, mask)
            gradient = rounded.to(tl.float32)  # as `_norm_backward` will read it
        acc_g += _fold(gradient, ACC_ROWS)
        acc_product += _fold(gradient * (value - mean[None, :]), ACC_ROWS)
        if NORMS == 2:
            value = _load(residual + begin + offsets, mask)
            acc_residual += _fold(gradient * (value - residual_mean[None, :]), ACC_ROWS)
    NUM_SUMS: tl.constexpr = 1 + NORMS
    pointers = partials + (view * num_parts + part) * NUM_SUMS * channels + channel
    tl.store(pointers, tl.sum(acc_g, 0), inside)
    tl.store(pointers + channels, tl.sum(acc_product, 0), inside)
    if NORMS == 2:
        tl.store(pointers + 2 * channels, tl.sum(acc_residual, 0), inside)
    if _is_last(finished + block, num_parts * VIEWS):
        for index in tl.static_range(NUM_SUMS):  # of g; of g (x - mean) for each norm
            gradient = tl.zeros([BLOCK_CHANNELS], tl.float64)  # of the bias; of a norm's weight
            for v in tl.static_range(VIEWS):
                total = _add_parts(
                    partials, v, index, channel, inside, channels, num_parts, NUM_SUMS, BLOCK_PARTS
                )
                if index == 0:
                    gradient += total
                    for norm in tl.static_range(NORMS):
                        result = sums + (2 * norm * VIEWS + v) * channels + channel
                        tl.store(result, total.to(tl.float32), inside)
                else:
                    row = ((2 * index - 1) * VIEWS + v) * channels
                    tl.store(sums + row + channel, total.to(tl.float32), inside)
                    inverse = _load_channels(
                        moments, (3 * index - 2) * VIEWS + v, channels, channel, inside
                    )
                    gradient += total * inverse.to(tl.float64)
            if index == 0:
                for norm in tl.static_range(NORMS):
                    pointers = grad_biases + norm * channels + channel
                    tl.store(pointers, gradient.to(tl.float32), inside)
            else:
                pointers = grad_weights + (index - 1) * channels + channel
                tl.store(pointers, gradient.to(tl.float32), inside)


@triton.jit
def _coefficients(
    moments, sums, norm, view, channel, inside, channels, count, weight, VIEWS: tl.constexpr
):
    """mean, scale, mean of g and slope: d L / d x = scale (g - mean_g - (x - mean) slope)."""
    row = norm * 3 * VIEWS + view
    mean = _load_channels(moments, row, channels, channel, inside)
    inverse = _load_channels(moments, row + VIEWS, channels, channel, inside)
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    n = tl.cast(count, tl.float32)
    row = norm * 2 * VIEWS + view
    mean_g = tl.div_rn(_load_channels(sums, row, channels, channel, inside), n)
    slope = tl.div_rn(_load_channels(sums, row + VIEWS, channels, channel, inside), n)
    return mean, scale, mean_g, slope * inverse * inverse


@triton.jit
def _input_gradient(gradient, x, mean, scale, mean_g, slope):
    centred = gradient - mean_g[None, :]
    return (centred - (x - mean[None, :]) * slope[None, :]) * scale[None, :]


@triton.jit
def _norm_backward(
    g, x, residual, grad_x, grad_residual, moments, sums, weight, bias, residual_weight,
    num_rows, channels, rows_per_part, count,
    VIEWS: tl.constexpr, RELU: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, part, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, scale, mean_g, slope = _coefficients(
        moments, sums, 0, view, channel, inside, channels, count, weight, VIEWS
    )
    if RELU:
        shift = tl.load(bias + channel, inside, other=0.0)
    if NORMS == 2:
        residual_mean, residual_scale, residual_mean_g, residual_slope = _coefficients(
            moments, sums, 1, view, channel, inside, channels, count, residual_weight, VIEWS
        )
    part_start = part * rows_per_part
    part_rows = tl.minimum(rows_per_part, num_rows - part_start)
    begin = (tl.cast(num_rows, tl.int64) * view + part_start) * channels
    for start in tl.range(0, part_rows, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < part_rows)[:, None] & inside[None, :]
        offsets = begin + row[:, None] * channels + channel[None, :]
        gradient = _load(g + offsets, mask)
        value = _load(x + offsets, mask)
        if RELU:
            gradient = _relu_gradient(gradient, _affine(value, mean, scale, shift))
        result = _input_gradient(gradient, value, mean, scale, mean_g, slope)
        tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask)
        if NORMS == 2:
            value = _load(residual + offsets, mask)
            result = _input_gradient(
                gradient, value, residual_mean, residual_scale, residual_mean_g, residual_slope
            )
            tl.store(grad_residual + offsets, result.to(grad_residual.dtype.element_ty), mask)


@triton.jit
def _norm_pool_forward(
    x, y, maxima, argmax, sums, moments, weight, bias,
    num_images, channels, height, width, pooled_height, pooled_width, count, eps,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one pooled image."""
    block, row_block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    view = image // num_images
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, inverse = _statistics(
        sums, moments, row_block, image, num_images, 0, view, channel, inside, channels, count, eps,
        VIEWS,
    )  # fmt: skip
    scale = inverse * tl.load(weight + channel, inside, other=0.0)
    shift = tl.load(bias + channel, inside, other=0.0)
    # Normalisation preserves the order of values or reverses it. (If the weight is exactly 0, all
    # results are equal; the index is that of the largest x here, the first in torch.)
    sign = tl.where(scale < 0.0, -1.0, 1.0)
    x += tl.cast(image, tl.int64) * height * width * channels
    first_pooled = tl.cast(image, tl.int64) * pooled_height * pooled_width * channels
    y += first_pooled
    maxima += first_pooled
    argmax += first_pooled
    first_row = row_block * ROWS
    for start in range(0, pooled_width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (j < pooled_width)[:, None] & inside[None, :]
        row = 2 * first_row - 1
        max_value, max_index = _row_max(x, row, j, mask, channel, channels, height, width, sign)
        max_value = tl.where(first_row > 0, max_value, float("-inf"))
        for i in range(first_row, tl.minimum(first_row + ROWS, pooled_height)):
            value, index = _row_max(x, 2 * i, j, mask, channel, channels, height, width, sign)
            max_index = tl.where(value > max_value, index, max_index)
            max_value = tl.maximum(value, max_value)
            value, index = _row_max(x, 2 * i + 1, j, mask, channel, channels, height, width, sign)
            is_better = (2 * i + 1 < height) & (value > max_value)
            max_index = tl.where(is_better, index, max_index)
            max_value = tl.where(is_better, value, max_value)
            maximum = max_value * sign[None, :]
            offsets = (i * pooled_width + j)[:, None] * channels + channel[None, :]
            result = _relu(_affine(maximum, mean, scale, shift))
            tl.store(y + offsets, result.to(y.dtype.element_ty), mask)
            tl.store(maxima + offsets, maximum.to(maxima.dtype.element_ty), mask)
            tl.store(argmax + offsets, max_index.to(tl.uint8), mask)
            max_value, max_index = value, index  # the last row of a window is the next one's first


@triton.jit
def _row_max(x, row, j, mask, channel, channels, height, width, sign):
    """For each window, the maximum of sign * x over its three values in a row, and the first index
    (`_window_index`) at which it occurs."""
    mask = mask & (row >= 0) & (row < height)
    pointers = x + (row * width + 2 * j)[:, None] * channels + channel[None, :]
    has_left = (j > 0)[:, None]
    has_right = (2 * j + 1 < width)[:, None]
    left = _load(pointers - channels, mask & has_left) * sign[None, :]
    middle = _load(pointers, mask) * sign[None, :]
    right = _load(pointers + channels, mask & has_right) * sign[None, :]
    is_left = has_left & (left >= middle)
    value = tl.where(is_left, left, middle)
    index = tl.where(is_left, _window_index(row, 0), _window_index(row, 1))
    is_right = has_right & (right > value)
    return tl.where(is_right, right, value), tl.where(is_right, _window_index(row, 2), index)


@triton.jit
def _window_index(row, column):
    """Index of a value in its window; the same in both windows that contain the row."""
    return 3 * (row & 3) + column


@triton.jit
def _norm_pool_backward(
    g, argmax, x, grad_x, moments, sums, weight, bias,
    num_images, channels, height, width, pooled_height, pooled_width, count,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of quads of pixels of one image.

    Pixel (2 i + p, 2 j + q) of quad (i, j), where p and q are 0 or 1, gets its gradient from the
    windows (i + k, j + m) with k <= p and m <= q.
    """
    block, row_block, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    view = image // num_images
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    mean, scale, mean_g, slope = _coefficients(
        moments, sums, 0, view, channel, inside, channels, count, weight, VIEWS
    )
    shift = tl.load(bias + channel, inside, other=0.0)
    first_pixel = tl.cast(image, tl.int64) * height * width
    x += first_pixel * channels
    grad_x += first_pixel * channels
    first_window = tl.cast(image, tl.int64) * pooled_height * pooled_width
    g += first_window * channels
    argmax += first_window * channels
    for i in range(row_block * ROWS, tl.minimum(row_block * ROWS + ROWS, pooled_height)):
        for start in range(0, pooled_width, BLOCK):
            j = start + tl.arange(0, BLOCK)
            for p in tl.static_range(2):
                for q in tl.static_range(2):
                    gradient = tl.zeros([BLOCK, BLOCK_CHANNELS], tl.float32)
                    for k in tl.static_range(p + 1):
                        for m in tl.static_range(q + 1):
                            exists = (i + k < pooled_height) & (j + m < pooled_width)
                            mask = exists[:, None] & inside[None, :]
                            offsets = ((i + k) * pooled_width + j + m)[:, None] * channels
                            offsets += channel[None, :]
                            index = tl.load(argmax + offsets, mask, other=255).to(tl.int32)
                            is_argmax = index == _window_index(2 * i + p, q + 1 - 2 * m)
                            value = _load(g + offsets, mask)
                            gradient += tl.where(is_argmax, value, 0.0)
                    row = 2 * i + p
                    column = 2 * j + q
                    mask = ((row < height) & (column < width))[:, None] & inside[None, :]
                    offsets = (row * width + column)[:, None] * channels + channel[None, :]
                    value = _load(x + offsets, mask)
                    gradient = _relu_gradient(gradient, _affine(value, mean, scale, shift))
                    result = _input_gradient(gradient, value, mean, scale, mean_g, slope)
                    tl.store(grad_x + offsets, result.to(grad_x.dtype.element_ty), mask)
