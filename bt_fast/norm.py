"""Batch normalisation for two views that pass through the encoder in one call.

The views' statistics must not mix: each view is normalised by its own mean and variance, as in
the released code, which calls the encoder twice. One call with both views, [2 n, ...] with view A
first, reads every weight once, adds no gradients of two calls and launches half the kernels.

Names, shapes and evaluation are those of torch's BatchNorm, whose checkpoints fit. The running
statistics see view A, then view B, as two calls would show them.

Over ranks (`over_ranks`) statistics are those of all ranks' samples: one gather forwards, of every
rank's means and variances of both views, and one sum backwards. All ranks hold as many samples, so
no counts travel and nothing is read back. With x^ the normalised input, y = w x^ + b and m samples
in all, the gradient is

    d L / d x = w / s * (g - sum(g) / m - x^ * sum(g * x^) / m)        g = d L / d y

with sums over all ranks; the gradients of w and b stay this rank's share, as those of any weight.

Fine-tuning has one view, and ranks that hold more samples than others, or none, in the last batch
of an epoch (`over_uneven_ranks`): then counts travel with the statistics.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.dist import Group, all_gather, all_sum, size_of


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Training mode normalises the two halves of a batch apart."""

    num_views = 2
    uneven = False  # whether ranks may hold different numbers of samples
    momentum: float  # never None here, as torch's may be; nor are the statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    group: Group = None  # the ranks whose samples are normalised together

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [2 n, C, ...] in training mode, view A first; any batch in evaluation mode."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if len(x) % self.num_views:
            raise ValueError(f"a training batch holds two views of every image, got {len(x)} rows")
        self.num_batches_tracked.add_(self.num_views)
        if self.group is not None:
            y, mean, variance, count = _OverRanks.apply(
                x, self.weight, self.bias, self.eps, self.num_views, self.uneven, self.group
            )
            self._remember(mean, variance, count)
            return y
        if torch.compiler.is_compiling():
            return self._arithmetic(x)
        halves = [
            F.batch_norm(
                half,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum,
                eps=self.eps,
            )
            for half in x.chunk(self.num_views)
        ]
        return torch.cat(halves)

    def _arithmetic(self, x: torch.Tensor) -> torch.Tensor:
        """The same written out, for a compiler to fuse with what comes before and after."""
        views = _split(x, self.num_views)  # [2, n, C, ...]
        variance, mean = torch.var_mean(views, _reduced(views), correction=0, keepdim=True)
        self._remember(mean, variance, views.numel() / mean.numel())
        shape = mean.shape[1:]
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(shape)
        return ((views - mean) * scale + self.bias.view(shape)).to(x.dtype).flatten(0, 1)

    @torch.no_grad()
    def _remember(
        self, mean: torch.Tensor, variance: torch.Tensor, count: float | torch.Tensor
    ) -> None:
        """Move the running statistics towards each view's, [2, ...], of so many values."""
        if not isinstance(count, torch.Tensor) and count < 2:
            raise ValueError("batch norm needs more than one value per channel and view")
        for view in range(self.num_views):
            self.running_mean.lerp_(mean[view].flatten().to(self.running_mean), self.momentum)
            unbiased = variance[view].flatten() * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


def _apart(x: torch.Tensor, num_views: int) -> torch.Tensor:
    """[2 n, C, ...] -> [2, n, C, ...]."""
    return x.unflatten(0, (num_views, len(x) // num_views))


def _split(x: torch.Tensor, num_views: int) -> torch.Tensor:
    """[2 n, C, ...] -> [2, n, C, ...], float32 or better."""
    views = _apart(x, num_views)
    return views if views.dtype == torch.float64 else views.float()


def _reduced(views: torch.Tensor) -> list[int]:
    """The dimensions of [2, n, C, ...] that statistics are taken over."""
    return [1, *range(3, views.ndim)]


def _of_all(views: torch.Tensor, uneven: bool, group: Group):
    """Of all ranks' samples: mean and variance, [2 views, 1, C, ...], and count, a number or a
    scalar on the device."""
    if views.numel():
        variance, mean = torch.var_mean(views, _reduced(views), correction=0, keepdim=True)
    else:  # the statistics of no samples are not numbers
        variance = mean = views.sum(_reduced(views), True)
    count = views.numel() / mean.numel()
    if not uneven:
        everyones = all_gather(torch.stack([variance, mean]), group)
        variances, means = everyones.unbind(1)  # [W, 2 views, 1, C, ...]
        mean = means.mean(0)
        return mean, variances.mean(0) + (means - mean).square().mean(0), count * size_of(group)
    ours = torch.stack([variance, mean, torch.full_like(mean, count)])
    variances, means, counts = all_gather(ours, group).unbind(1)
    weights = counts / counts.sum(0)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean).square())).sum(0)
    return mean, variance, counts.sum(0).flatten()[0]


class _OverRanks(torch.autograd.Function):
    """(x [2 n, C, ...], weight, bias, eps, number of views, uneven, group)
    -> (y; mean, variance and count of all ranks' samples)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, num_views, uneven, group):
        views = _split(x, num_views)
        mean, variance, count = _of_all(views, uneven, group)
        inverse = torch.rsqrt(variance + eps)
        shape = mean.shape[1:]
        y = torch.empty_like(x)  # a tensor of its own: the next layer may work in place
        _apart(y, num_views).copy_(
            (views - mean) * (inverse * weight.view(shape)) + bias.view(shape)
        )
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.num_views, ctx.count, ctx.group = num_views, count, group
        ctx.mark_non_differentiable(mean, variance, *([count] if uneven else []))
        return y, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, inverse = ctx.saved_tensors
        g = _split(grad, ctx.num_views)
        normalised = (_split(x, ctx.num_views) - mean) * inverse
        sums = torch.stack([g.sum(_reduced(g), True), (g * normalised).sum(_reduced(g), True)])
        means = all_sum(sums, ctx.group) / ctx.count  # [2 sums, 2 views, 1, C, ...]
        scale = inverse * weight.view(mean.shape[1:])
        grad_x = ((g - means[0] - normalised * means[1]) * scale).to(grad.dtype).flatten(0, 1)
        grad_bias, grad_weight = (part.sum(0).flatten().to(weight.dtype) for part in sums)
        return grad_x, grad_weight, grad_bias, None, None, None, None


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
