"""Batch normalisation of two views that pass through the encoder in one call.

Each view is normalised by its own mean and variance, as in the released code, which calls the
encoder twice. One call with both views, [2 n, ...] with view A first, reads every weight once, adds
no gradients of two calls and launches half as many kernels. Names, shapes and evaluation mode are
those of torch's BatchNorm, whose checkpoints load.

`normalise` is one explicit function for any number of ranks. With mean m and standard deviation s
of a channel in one view over M values on all ranks, weight w and bias b:

    scale = w / s      shift = b - m scale      y = x scale + shift
    d L / d x = scale (g - sum(g) / M - (x - m) sum(g (x - m)) / (s^2 M))           g = d L / d y

The gradients of w and b are sums over this rank's samples, as those of any weight. Arithmetic is
float32 or wider, but no tensor of an activation's size is saved, or written by a compiled layer, in
a wider dtype than the activation's: the forward pass reads x twice and writes y once, the backward
pass reads x and g twice and writes d L / d x once. Each pass has one all-reduce: forwards of sums
and sums of squares, in float64, where mean square - squared mean loses no digits; backwards of the
two sums above. A layer on a single rank that is not compiled calls torch's own kernels, which need
less memory traffic there.

`norm_act` is everything between two convolutions of a ResNet: norm, residual sum, ReLU and
max-pool. `fuse` selects the Triton kernels of `batch_norm_triton`, which move three quarters of the
bytes.

Running statistics are updated by view A, then by view B, as in two calls. A single layer updates
them in its forward pass. With `RunningStatistics`, all layers of a model are updated together after
the optimizer's step, or none if that is skipped.

Fine-tuning has one view, and in the last batch of an epoch ranks may hold different numbers of
samples, or none (`convert_sync_batch_norm`): then counts are reduced with the sums.
"""

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.choices import Norm
from bt_fast.distributed.collectives import Group, all_reduce, group_size
from bt_fast.runtime import is_interpreted, runs_triton

# Output of a block: y, or from fused norms in training a pair (y, y), one for each consumer: their
# gradients then arrive separately and are added inside the next kernel.
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
        y like x, in new memory; mean and biased variance [V, C] over all ranks, float32 or wider;
        and the number of values behind each: an int, or a scalar tensor on the device if `uneven`.
        Only y is differentiable.
    """
    return _Normalise.apply(x, weight, bias, eps, num_views, group, uneven)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, num_views, group, uneven):
        mean, variance, count = _statistics(x, num_views, group, uneven)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse * weight
        y = _cast(x * _expand(scale, x) + _expand(bias - mean * scale, x), x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.count, ctx.group = count, group
        count_tensor = [count] if isinstance(count, torch.Tensor) else []
        ctx.mark_non_differentiable(mean, variance, *count_tensor)
        return y, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        x, weight, mean, inverse = ctx.saved_tensors
        num_views, dtype = len(mean), mean.dtype
        centred = x - _expand(mean, x)
        sums = torch.stack([_sum(g, num_views, dtype), _sum(g * centred, num_views, dtype)])
        means = all_reduce(sums, ctx.group) / ctx.count  # [2 sums, V, C]
        scale, slope = inverse * weight, means[1] * inverse.square()
        grad_x = (g - _expand(means[0], x) - centred * _expand(slope, x)) * _expand(scale, x)
        grad_weight = (sums[1] * inverse).sum(0)
        return _cast(grad_x, x.dtype), grad_weight, sums[0].sum(0), None, None, None, None


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), or x itself: torch 2.11's compiler loses gradients of unchanged outputs."""
    return x if x.dtype == dtype else x.to(dtype)


def _split_views(x: torch.Tensor, num_views: int) -> torch.Tensor:
    """[V n, C, ...] -> [V, n, C, ...]."""
    return x.unflatten(0, (num_views, len(x) // num_views))


def _reduction_dims(x: torch.Tensor) -> list[int]:
    """The dimensions of x [V, n, C, ...] over which statistics are computed."""
    return [1, *range(3, x.ndim + 1)]


def _sum(x: torch.Tensor, num_views: int, dtype: torch.dtype) -> torch.Tensor:
    """[V n, C, ...] -> [V, C]."""
    return _split_views(x, num_views).sum(_reduction_dims(x), dtype=dtype)


def _expand(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[V, C], one value per view and channel -> [V n, C, 1, ...], which broadcasts over x."""
    num_views, channels = values.shape
    rows = values.unsqueeze(1).expand(-1, len(x) // num_views, -1)
    return rows.reshape(len(x), channels, *[1] * (x.ndim - 2))


def _statistics(
    x: torch.Tensor, num_views: int, group: Group, uneven: bool
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Over all ranks: mean and biased variance, [V, C], and the number of values of each."""
    views = _split_views(x, num_views)
    views = views.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        variance, mean = torch.var_mean(views, _reduction_dims(x), correction=0)
    else:  # var_mean of no samples is NaN
        variance = mean = views.sum(_reduction_dims(x))
    local_count = x.numel() // mean.numel()
    if group is None:
        return mean, variance, local_count
    count: int | torch.Tensor = local_count * group_size(group)
    moments = torch.stack([mean.double(), variance.double() + mean.double().square()])
    sums = (local_count * moments).flatten()
    if uneven:
        sums = all_reduce(torch.cat([sums, sums.new_full((1,), local_count)]), group)
        sums, count = sums[:-1], sums[-1]
    else:
        sums = all_reduce(sums, group, overwrite=True)
    global_mean, mean_square = (sums / count).view_as(moments).unbind()
    variance = (mean_square - global_mean.square()).clamp(min=0).to(mean.dtype)
    return global_mean.to(mean.dtype), variance, count


class _PerViewBatchNorm(nn.modules.batchnorm._BatchNorm):
    """In training mode, each view of a batch is normalised by its own statistics."""

    num_views = 2
    uneven = False  # whether ranks may hold different numbers of samples
    momentum: float  # never None, which torch allows; nor are the statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    group: Group = None  # the ranks whose samples are normalised together
    fused = False  # whether training runs the kernels of `batch_norm_triton`
    # With `RunningStatistics`: mean and unbiased variance of the last batch, each [V, C].
    updated_externally = False
    batch_statistics: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [2 n, C, ...] in training mode, view A first; any batch in evaluation mode."""
        if not self.training:
            return super().forward(x)
        self.require_views(x)
        if self.fused:
            return as_pair(_fused(self, x, relu=False))[0]
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
        self.record_statistics(mean, variance)
        return y

    def require_views(self, x: torch.Tensor) -> None:
        """Raise ValueError unless x is a training batch of this layer."""
        self._check_input_dim(x)
        if len(x) % self.num_views:
            raise ValueError(f"a training batch holds two views of every image, got {len(x)} rows")

    def record_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Store or apply a batch's mean and unbiased variance, [V, C] each."""
        if self.updated_externally:
            # Detached: torch 2.11's DDP optimizer treats outputs of a graph as differentiable.
            self.batch_statistics = mean.detach(), variance.detach()
        else:
            with torch.no_grad():
                self.num_batches_tracked.add_(self.num_views)
                for running, batch in (self.running_mean, mean), (self.running_var, variance):
                    running.copy_(_moving_average(running, batch, self.momentum))

    def _forward_native(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, mean, unbiased variance: with a momentum of 1, torch's running statistics."""
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


def _moving_average(
    running: torch.Tensor, batch: torch.Tensor, momentum: float | torch.Tensor
) -> torch.Tensor:
    """Running statistics [values] after those of the views, [V, values]."""
    for view in batch.to(running.dtype):
        running = running.lerp(view, momentum)
    return running


class RunningStatistics:
    """The running statistics of all batch norms of a model, updated together or not at all.

    The layers' buffers become views of `running`, float32 [values], all means and variances, and
    `counts`, int64 [layers], all `num_batches_tracked`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _PerViewBatchNorm)]
        for layer in self.layers:
            layer.updated_externally = True
        self._parts: list[torch.Tensor] = []  # statistics of parts of a batch, [V, values] each
        self.running = self._flatten("running_mean", "running_var")
        self.counts = self._flatten("num_batches_tracked")
        # One value, or one for every value of `running`: those of encoders may differ.
        momenta = [layer.momentum for layer in self.layers]
        self._momentum: float | torch.Tensor = momenta[0] if momenta else 0.0
        if len(set(momenta)) > 1:
            lengths = torch.tensor([2 * layer.num_features for layer in self.layers])
            values = torch.repeat_interleave(torch.tensor(momenta), lengths)
            self._momentum = values.to(self.running)

    def _flatten(self, *names: str) -> torch.Tensor:
        buffers = [(layer, name) for layer in self.layers for name in names]
        if not buffers:
            return torch.empty(0)
        flat = torch.cat([layer.get_buffer(name).flatten() for layer, name in buffers])
        parts = flat.split([layer.get_buffer(name).numel() for layer, name in buffers])
        for (layer, name), part in zip(buffers, parts, strict=True):
            setattr(layer, name, part.view_as(layer.get_buffer(name)))
        return flat

    @torch.no_grad()
    def record(self) -> None:
        """Keep the statistics of the last forward pass, of one part of a batch, for `update`."""
        if not self.layers:
            return
        values = [value for layer in self.layers for value in layer.batch_statistics]
        assert len(values) == 2 * len(self.layers), "needs a forward pass in training mode"
        self._parts.append(torch.cat(values, 1))

    @torch.no_grad()
    def update(self, applied: torch.Tensor) -> None:
        """Update if `applied`, a bool scalar on the device, is true: by the last forward pass, or
        by the mean of the recorded ones."""
        if not self.layers:
            return
        if not self._parts:
            self.record()
        batch = self._parts[0] if len(self._parts) == 1 else torch.stack(self._parts).mean(0)
        self._parts = []
        for layer in self.layers:
            layer.batch_statistics = ()
        updated = _moving_average(self.running, batch, self._momentum)
        torch.where(applied, updated, self.running, out=self.running)
        self.counts.add_(applied, alpha=self.layers[0].num_views)


def norm_act(
    layer: Any,
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    residual_norm: nn.Module | None = None,
    pool: Any = None,
    two_consumers: bool = False,
) -> Any:
    """pool(relu(norm(x) + residual)), where residual and pool are optional.

    x: [n, C, H, W] or [n, C]. residual: like x; residual_norm: a batch norm applied to it.
    pool: the stem's 3 x 3 max-pool of stride 2 and padding 1.
    two_consumers: whether two operations read the result, which then is a pair (y, y).
    """
    if getattr(layer, "fused", False) and layer.training:
        assert pool is None or (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
        y = _fused(
            layer,
            x,
            residual=residual,
            residual_norm=residual_norm,
            pool=pool is not None,
            two_consumers=two_consumers,
        )
        return y if two_consumers else as_pair(y)[0]
    y = layer(x)
    if residual is not None:
        y += residual if residual_norm is None else residual_norm(residual)
    y = F.relu(y, inplace=True)
    return y if pool is None else pool(y)


def as_pair(y: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """y for each of its two consumers."""
    return y if isinstance(y, tuple) else (y, y)


def _fused(layer, x, *, residual=None, residual_norm=None, **options) -> Activation:
    from bt_fast.models import batch_norm_triton  # triton comes with torch's CUDA builds only

    layer.require_views(x)
    layers = [layer] if residual_norm is None else [layer, residual_norm]
    affine = None if residual_norm is None else (residual_norm.weight, residual_norm.bias)
    y, alias, moments = batch_norm_triton.norm_act(
        x,
        layer.weight,
        layer.bias,
        residual=residual,
        residual_norm=affine,
        eps=layer.eps,
        num_views=layer.num_views,
        group=layer.group,
        **options,
    )
    for norm, (mean, variance) in zip(layers, moments, strict=True):
        norm.record_statistics(mean, variance)
    return y, alias


def choose_norm(norm: Norm, device: torch.device) -> Literal["compiled", "fused"]:
    """Resolve `auto` to `fused` on a GPU that runs the kernels, and to `compiled` elsewhere.

    A step of ResNet-50 with 256 images takes 82.0 ms fused and 92.5 ms compiled on an H100.
    Raises ValueError if `fused` is asked of a device that cannot run the kernels.
    """
    if norm == "auto":
        return "fused" if runs_triton(device) else "compiled"
    if norm == "fused" and device.type != "cuda" and not is_interpreted():
        raise ValueError("--norm fused needs a GPU; leave it out")
    if norm == "fused" and importlib.util.find_spec("triton") is None:
        raise ValueError("--norm fused needs triton, of torch's builds for CUDA; leave it out")
    return norm


def fuse(model: nn.Module) -> None:
    """Run the batch norms of a model, on its device, as Triton kernels in training."""
    from bt_fast.models import batch_norm_triton

    for layer in model.modules():
        if isinstance(layer, _PerViewBatchNorm):
            assert not layer.uneven, "the kernels need the same number of samples on every rank"
            layer.fused = True
            batch_norm_triton.initialise(layer.weight.device)


def set_process_group(model: nn.Module, group: Group) -> None:
    """Let every batch norm of a model normalise over the samples of all ranks of a group."""
    for layer in model.modules():
        if isinstance(layer, _PerViewBatchNorm):
            layer.group = group


class BatchNorm1d(_PerViewBatchNorm, nn.BatchNorm1d):
    """[2 n, C] -> [2 n, C]."""


class BatchNorm2d(_PerViewBatchNorm, nn.BatchNorm2d):
    """[2 n, C, H, W] -> [2 n, C, H, W]."""


class BatchNormAct2d(BatchNorm2d):
    """timm's batch norm with an activation: [2 n, C, H, W] -> [2 n, C, H, W]."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


def _per_view_class(layer: nn.Module) -> type[_PerViewBatchNorm] | None:
    """Ours for a batch norm of torch, or of timm with an activation; None for other layers."""
    kind: Any = type(layer)
    if kind.__module__.startswith("timm.") and kind.__name__ == "BatchNormAct2d":
        return BatchNormAct2d
    return {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d}.get(kind)


def convert_to_per_view(model: nn.Module, name: str) -> None:
    """Let all batch norms of an encoder normalise each of two views; in place, without new state.

    Raises ValueError, with the encoder's name, for a norm over the batch of another kind.
    """
    for path, layer in model.named_modules():
        ours, buffers = _per_view_class(layer), dict(layer.named_buffers(recurse=False))
        if ours is not None and layer.affine and layer.momentum and "running_var" in buffers:
            layer.__class__ = ours  # which adds no state
        elif ours is not None or "running_mean" in buffers or "running_var" in buffers:
            raise ValueError(
                f"--encoder {name}: {path} is a {type(layer).__name__}, a norm over the batch that"
                " cannot be computed for each view; choose another encoder"
            )


def convert_sync_batch_norm(model: nn.Module, group: Group) -> None:
    """Let torch's batch norms use the samples of all ranks of a group, of one view; in place."""
    for layer in model.modules():
        if group is not None and (ours := _per_view_class(layer)) is not None:
            layer.__class__ = ours  # which adds no state
            layer.num_views, layer.uneven = 1, True  # type: ignore[assignment]
            set_process_group(layer, group)
