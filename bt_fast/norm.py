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
"""

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.dist import Group, all_gather, all_sum

NUM_VIEWS = 2


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Training mode normalises the two halves of a batch apart."""

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
        if len(x) % NUM_VIEWS:
            raise ValueError(f"a training batch holds two views of every image, got {len(x)} rows")
        self.num_batches_tracked.add_(NUM_VIEWS)
        if self.group is not None:
            y, mean, variance = _OverRanks.apply(x, self.weight, self.bias, self.eps, self.group)
            self._remember(mean, variance, x.numel() / mean.numel() * self.group.size())
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
            for half in x.chunk(NUM_VIEWS)
        ]
        return torch.cat(halves)

    def _arithmetic(self, x: torch.Tensor) -> torch.Tensor:
        """The same written out, for a compiler to fuse with what comes before and after."""
        views = _split(x)  # [2, n, C, ...]
        variance, mean = torch.var_mean(views, _reduced(views), correction=0, keepdim=True)
        self._remember(mean, variance, views.numel() / mean.numel())
        shape = mean.shape[1:]
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(shape)
        return ((views - mean) * scale + self.bias.view(shape)).to(x.dtype).flatten(0, 1)

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: float) -> None:
        """Move the running statistics towards each view's, [2, ...], of so many values."""
        if count < 2:
            raise ValueError("batch norm needs more than one value per channel and view")
        for view in range(NUM_VIEWS):
            self.running_mean.lerp_(mean[view].flatten().to(self.running_mean), self.momentum)
            unbiased = variance[view].flatten() * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """[2 n, C, ...] -> [2, n, C, ...]."""
    return x.unflatten(0, (NUM_VIEWS, -1))


def _split(x: torch.Tensor) -> torch.Tensor:
    """[2 n, C, ...] -> [2, n, C, ...], float32 or better."""
    views = _halves(x)
    return views if views.dtype == torch.float64 else views.float()


def _reduced(views: torch.Tensor) -> list[int]:
    """The dimensions of [2, n, C, ...] that statistics are taken over."""
    return [1, *range(3, views.ndim)]


class _OverRanks(torch.autograd.Function):
    """(x [2 n, C, ...], weight, bias, eps, group) -> (y, mean, variance of all ranks' samples)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        views = _split(x)
        ours = torch.var_mean(views, _reduced(views), correction=0, keepdim=True)
        everyones = all_gather(torch.stack(ours), group)  # [W, 2 statistics, 2 views, 1, C, ...]
        variances, means = everyones[:, 0], everyones[:, 1]
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        inverse = torch.rsqrt(variance + eps)
        shape = mean.shape[1:]
        y = torch.empty_like(x)  # a tensor of its own: the next layer may work in place
        _halves(y).copy_((views - mean) * (inverse * weight.view(shape)) + bias.view(shape))
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _variance):
        x, weight, mean, inverse = ctx.saved_tensors
        g, normalised = _split(grad), (_split(x) - mean) * inverse
        sums = torch.stack([g.sum(_reduced(g), True), (g * normalised).sum(_reduced(g), True)])
        count = g.numel() / mean.numel() * ctx.group.size()
        means = all_sum(sums, ctx.group) / count  # [2 sums, 2 views, 1, C, ...]
        scale = inverse * weight.view(mean.shape[1:])
        grad_x = ((g - means[0] - normalised * means[1]) * scale).to(grad.dtype).flatten(0, 1)
        grad_bias, grad_weight = (part.sum(0).flatten().to(weight.dtype) for part in sums)
        return grad_x, grad_weight, grad_bias, None, None


def over_ranks(model: nn.Module, group: Group) -> None:
    """Let every batch norm of a model normalise over the samples of all ranks of a group."""
    for layer in model.modules():
        if isinstance(layer, _PerView):
            layer.group = group


class BatchNorm1d(_PerView, nn.BatchNorm1d):
    """[2 n, C] -> [2 n, C]."""


class BatchNorm2d(_PerView, nn.BatchNorm2d):
    """[2 n, C, H, W] -> [2 n, C, H, W]."""
