"""Batch normalisation for two views that pass through the encoder in one call.

The views' statistics must not mix: each view is normalised by its own mean and variance, as in
the released code, which calls the encoder twice. One call with both views, [2 n, ...] with view A
first, reads every weight once, adds no gradients of two calls and launches half the kernels.

Names, shapes and evaluation are those of torch's BatchNorm, whose checkpoints fit.

`normalise` is one explicit function for one rank and for many. With mean m and deviation s of a
channel in one view over the samples of all ranks, weight w, bias b and M samples in all:

    scale = w / s      shift = b - m scale      y = x scale + shift
    d L / d x = scale (g - sum(g) / M - (x - m) sum(g (x - m)) / (s^2 M))           g = d L / d y

The gradients of w and b stay this rank's share, as those of any weight. Arithmetic is float32 or
better, but nothing of an activation's size is saved, or written by a compiled layer, in a wider
dtype than the activation's: it reads x twice and writes y once, and reads x and g twice and writes
d L / d x once. Over ranks there is one all-reduce forwards, of sums and sums of squares, and one
backwards, of the two sums above. The first is in float64, where the difference of mean square and
squared mean loses nothing.

Alone and not compiled, a layer takes torch's own kernels, which need less memory traffic there.

Of a ResNet, `norm_act` does all that lies between two convolutions: norm, residual sum, ReLU and
max-pool. `fuse` lets it run as the Triton kernels of `norm_triton`, which move three quarters of
the bytes.

Running statistics see view A, then view B, as two calls would show them. A layer on its own moves
them in its forward pass. The layers of a model in training leave their batch's statistics to
`RunningStatistics`, which moves all of them at once after the update, or not at all if the update
is skipped.

Fine-tuning has one view, and ranks that hold more samples than others, or none, in the last batch
of an epoch (`over_uneven_ranks`): then counts travel with the sums.
"""

import importlib.util
import os
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.distributed.collectives import Group, all_sum, size_of

Norm = Literal["auto", "compiled", "fused"]
# What a block returns: y, or, from fused norms in training, y twice, one for each of two ways on
# which it goes on: their gradients then arrive apart and are added without a pass of their own.
Activation = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    num_views: int = 2,
    group: Group = None,
    uneven: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Normalise every view of a batch by its own statistics.

    Args:
        x: [V n, C, ...], V = `num_views`, view after view; any floating-point dtype.
        weight, bias: [C].
        group: the ranks whose samples are normalised together; None for this process alone.
        uneven: whether ranks may hold different numbers of samples, or none.
    Returns:
        y like x, in memory of its own; mean and biased variance [V, C] of all ranks' samples,
        float32 or better; and how many values each is of: a number, or a scalar on the device if
        `uneven`. Only y has a gradient.
    """
    return _Normalise.apply(x, weight, bias, eps, num_views, group, uneven)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, num_views, group, uneven):
        mean, variance, count = _statistics(x, num_views, group, uneven)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse * weight
        y = _cast(x * _rows(scale, x) + _rows(bias - mean * scale, x), x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.count, ctx.group = count, group
        counted = [count] if isinstance(count, torch.Tensor) else []
        ctx.mark_non_differentiable(mean, variance, *counted)
        return y, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        x, weight, mean, inverse = ctx.saved_tensors
        num_views, dtype = len(mean), mean.dtype
        centred = x - _rows(mean, x)
        sums = torch.stack([_sum(g, num_views, dtype), _sum(g * centred, num_views, dtype)])
        means = all_sum(sums, ctx.group) / ctx.count  # [2 sums, V, C]
        scale, slope = inverse * weight, means[1] * inverse.square()
        grad_x = (g - _rows(means[0], x) - centred * _rows(slope, x)) * _rows(scale, x)
        grad_weight = (sums[1] * inverse).sum(0)
        return _cast(grad_x, x.dtype), grad_weight, sums[0].sum(0), None, None, None, None


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), never called for nothing: compiled by torch 2.11, a function whose output
    `.to` has returned as it was loses its gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def _by_view(x: torch.Tensor, num_views: int) -> torch.Tensor:
    """[V n, C, ...] -> [V, n, C, ...]."""
    return x.unflatten(0, (num_views, len(x) // num_views))


def _reduced(x: torch.Tensor) -> list[int]:
    """The dimensions of [V, n, C, ...] that statistics are taken over."""
    return [1, *range(3, x.ndim + 1)]


def _sum(x: torch.Tensor, num_views: int, dtype: torch.dtype) -> torch.Tensor:
    """[V n, C, ...] -> [V, C]."""
    return _by_view(x, num_views).sum(_reduced(x), dtype=dtype)


def _rows(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[V, C], one value per view and channel -> [V n, C, 1, ...], to be broadcast over x."""
    num_views, channels = values.shape
    rows = values.unsqueeze(1).expand(-1, len(x) // num_views, -1)
    return rows.reshape(len(x), channels, *[1] * (x.ndim - 2))


def _statistics(
    x: torch.Tensor, num_views: int, group: Group, uneven: bool
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Of all ranks' samples: mean and biased variance, [V, C], and count, a number or a scalar."""
    views = _by_view(x, num_views)
    views = views.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        variance, mean = torch.var_mean(views, _reduced(x), correction=0)
    else:  # the statistics of no samples are not numbers
        variance = mean = views.sum(_reduced(x))
    count = x.numel() // mean.numel()
    if group is None:
        return mean, variance, count
    total: int | torch.Tensor = count * size_of(group)
    moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
    sums = (count * moments).flatten()
    if uneven:
        sums = all_sum(torch.cat([sums, sums.new_full((1,), count)]), group)
        sums, total = sums[:-1], sums[-1]
    else:
        sums = all_sum(sums, group, overwrite=True)
    first, second = (sums / total).view_as(moments).unbind()  # of x, and of its square
    variance = (second - first.square()).clamp(min=0).to(mean.dtype)
    return first.to(mean.dtype), variance, total


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Training mode normalises the views of a batch apart."""

    num_views = 2
    uneven = False  # whether ranks may hold different numbers of samples
    momentum: float  # never None here, as torch's may be; nor are the statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    group: Group = None  # the ranks whose samples are normalised together
    fused = False  # whether `norm_triton` does it in training
    # With `RunningStatistics`: mean and unbiased variance of the last batch, each [V, C].
    updated_externally = False
    batch_statistics: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [2 n, C, ...] in training mode, view A first; any batch in evaluation mode."""
        if not self.training:
            return super().forward(x)
        self.check(x)
        if self.fused:
            return ways(_fused(self, x, relu=False))[0]
        if self.group is None and not torch.compiler.is_compiling():
            y, mean, variance = self._forward_native(x)
        else:
            y, mean, variance, count = normalise(
                x,
                self.weight,
                self.bias,
                eps=self.eps,
                num_views=self.num_views,
                group=self.group,
                uneven=self.uneven,
            )
            if not isinstance(count, torch.Tensor) and count < 2:
                raise ValueError("batch norm needs more than one value per channel and view")
            variance = variance * (count / (count - 1))
        self.keep(mean, variance)
        return y

    def check(self, x: torch.Tensor) -> None:
        """Raise ValueError unless x is a training batch of this layer."""
        self._check_input_dim(x)
        if len(x) % self.num_views:
            raise ValueError(f"a training batch holds two views of every image, got {len(x)} rows")

    def keep(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Take a batch's mean and unbiased variance, [V, C], for the running statistics."""
        if self.updated_externally:
            # Detached: torch 2.11's DDP optimizer takes outputs of a graph for differentiable.
            self.batch_statistics = mean.detach(), variance.detach()
        else:
            self.num_batches_tracked.add_(self.num_views)
            _update(self.running_mean, mean, self.momentum)
            _update(self.running_var, variance, self.momentum)

    def _forward_native(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, mean and unbiased variance by torch's kernels, whose running statistics with a
        momentum of 1 are those of the batch."""
        mean, variance = self.running_mean.new_zeros(2, self.num_views, self.num_features)
        views = [
            F.batch_norm(
                view,
                mean[index],
                variance[index],
                self.weight,
                self.bias,
                training=True,
                momentum=1.0,
                eps=self.eps,
            )
            for index, view in enumerate(x.chunk(self.num_views))
        ]
        return torch.cat(views), mean, variance


@torch.no_grad()
def _update(running: torch.Tensor, batch: torch.Tensor, momentum: float) -> None:
    """Move running statistics [values] towards each view's, [V, values], in place."""
    running.copy_(_updated(running, batch, momentum))


def _updated(running: torch.Tensor, batch: torch.Tensor, momentum: float) -> torch.Tensor:
    for view in batch.to(running.dtype):
        running = running.lerp(view, momentum)
    return running


class RunningStatistics:
    """The running statistics of all batch norms of a model, moved together.

    The layers' buffers become parts of two tensors, so that a training step moves all of them with
    a few operations, outside of the compiled forward pass, and a skipped step moves none.

    Attributes: `running`, float32 [values], all running means and variances; `counts`, int64
    [layers].
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _PerView)]
        if len({layer.momentum for layer in self.layers}) > 1:
            raise ValueError("the batch norms of a model need the same momentum")
        for layer in self.layers:
            layer.updated_externally = True
        self.running = self._flatten("running_mean", "running_var")
        self.counts = self._flatten("num_batches_tracked")

    def _flatten(self, *names: str) -> torch.Tensor:
        buffers = [(layer, name) for layer in self.layers for name in names]
        flat = torch.cat([layer.get_buffer(name).flatten() for layer, name in buffers])
        parts = flat.split([layer.get_buffer(name).numel() for layer, name in buffers])
        for (layer, name), part in zip(buffers, parts, strict=True):
            setattr(layer, name, part.view_as(layer.get_buffer(name)))
        return flat

    @torch.no_grad()
    def update(self, applied: torch.Tensor) -> None:
        """Move the statistics towards those of the batch that has just passed through the model.

        applied: bool scalar on their device; where it is false, nothing moves.
        """
        parts = [part for layer in self.layers for part in layer.batch_statistics]
        assert len(parts) == 2 * len(self.layers), "no forward pass in training mode to update from"
        batch = torch.cat(parts, 1)
        for layer in self.layers:
            layer.batch_statistics = ()
        moved = _updated(self.running, batch, self.layers[0].momentum)
        torch.where(applied, moved, self.running, out=self.running)
        self.counts.add_(applied, alpha=self.layers[0].num_views)


@overload
def norm_act(layer: nn.Module, x: torch.Tensor) -> torch.Tensor: ...
@overload
def norm_act(
    layer: nn.Module,
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    residual_norm: nn.Module | None = None,
    pool: nn.Module | None = None,
    twice: bool,
) -> Activation: ...
def norm_act(layer, x, *, residual=None, residual_norm=None, pool=None, twice=False):
    """relu(norm(x) + residual), and what a ResNet's stem has after it.

    Args:
        layer: a batch norm, torch's or one of this module's.
        x: [n, C, H, W] or [n, C].
        residual: like x; residual_norm: a batch norm that it passes first.
        pool: what comes at the end, a 3 x 3 max-pool of stride 2 and padding 1.
        twice: the result goes on along two ways.
    Returns:
        y, or y twice (see `Activation`).
    """
    if getattr(layer, "fused", False) and layer.training:
        assert pool is None or (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
        y = _fused(
            layer,
            x,
            residual=residual,
            residual_norm=residual_norm,
            pool=pool is not None,
            twice=twice,
        )
        return y if twice else ways(y)[0]
    y = layer(x)
    if residual is not None:
        y += residual if residual_norm is None else residual_norm(residual)
    y = F.relu(y, inplace=True)
    return y if pool is None else pool(y)


def ways(y: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """y for each of the two ways on which it goes on."""
    return y if isinstance(y, tuple) else (y, y)


def _fused(layer, x, *, residual=None, residual_norm=None, **options) -> Activation:
    from bt_fast.models import batch_norm_triton  # triton comes with torch's CUDA builds only

    layer.check(x)
    layers = [layer] if residual_norm is None else [layer, residual_norm]
    second = None if residual_norm is None else (residual_norm.weight, residual_norm.bias)
    y, again, moments = batch_norm_triton.norm_act(
        x,
        layer.weight,
        layer.bias,
        residual=residual,
        residual_norm=second,
        eps=layer.eps,
        num_views=layer.num_views,
        group=layer.group,
        **options,
    )
    for one, (mean, variance) in zip(layers, moments, strict=True):
        one.keep(mean, variance)
    return y, again


def choose(norm: Norm, device: torch.device) -> Literal["compiled", "fused"]:
    """Settle what was left to `auto`, which is `compiled` until a GPU's figures say otherwise.

    Raises ValueError for what this device cannot run.
    """
    # The interpreter runs the kernels on a CPU, slowly, for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if norm == "fused" and device.type != "cuda" and not interpreted:
        raise ValueError("--norm fused needs a GPU; leave it out")
    if norm == "fused" and importlib.util.find_spec("triton") is None:
        raise ValueError("--norm fused needs triton, of torch's builds for CUDA; leave it out")
    return "fused" if norm == "fused" else "compiled"


def fuse(model: nn.Module) -> None:
    """Let the batch norms of a model, on its device, run as Triton kernels in training."""
    from bt_fast.models import batch_norm_triton

    for layer in model.modules():
        if isinstance(layer, _PerView):
            assert not layer.uneven, "the kernels take as many samples from every rank"
            layer.fused = True
            batch_norm_triton.prepare(layer.weight.device)


def over_ranks(model: nn.Module, group: Group) -> None:
    """Let every batch norm of a model normalise over the samples of all ranks of a group."""
    for layer in model.modules():
        if isinstance(layer, _PerView):
            layer.group = group


class BatchNorm1d(_PerView, nn.BatchNorm1d):
    """[2 n, C] -> [2 n, C]."""


class BatchNorm2d(_PerView, nn.BatchNorm2d):
    """[2 n, C, H, W] -> [2 n, C, H, W]."""


class _OneView2d(BatchNorm2d):
    """[n, C, H, W] -> [n, C, H, W], n any number of this rank's samples."""

    num_views = 1
    uneven = True


def over_uneven_ranks(model: nn.Module, group: Group) -> None:
    """Let torch's batch norms of a model normalise over the samples of all ranks of a group, in
    batches of one view; in place, with their weights. Nothing to do without a group."""
    for layer in model.modules():
        if group is not None and type(layer) is nn.BatchNorm2d:
            layer.__class__ = _OneView2d  # which adds no state
            over_ranks(layer, group)
