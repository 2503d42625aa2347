"""Batch normalisation for two views that pass through the encoder in one call.

The views' statistics must not mix: each view is normalised by its own mean and variance, as in
the released code, which calls the encoder twice. One call with both views, [2 n, ...] with view A
first, reads every weight once, adds no gradients of two calls and launches half the kernels.

Names, shapes and evaluation are those of torch's BatchNorm, whose checkpoints fit. The running
statistics see view A, then view B, as two calls would show them.
"""

import torch
import torch.nn.functional as F
from torch import nn

NUM_VIEWS = 2


class _PerView(nn.modules.batchnorm._BatchNorm):
    """Training mode normalises the two halves of a batch apart."""

    momentum: float  # never None here, as torch's may be; nor are the statistics
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [2 n, C, ...] in training mode, view A first; any batch in evaluation mode."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if len(x) % NUM_VIEWS:
            raise ValueError(f"a training batch holds two views of every image, got {len(x)} rows")
        self.num_batches_tracked.add_(NUM_VIEWS)
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
        views = x.unflatten(0, (NUM_VIEWS, -1)).float()  # [2, n, C, ...]
        over = [1, *range(3, views.ndim)]
        variance, mean = torch.var_mean(views, over, correction=0, keepdim=True)  # [2, 1, C, ...]
        count = views.numel() / mean.numel()
        with torch.no_grad():
            for view in range(NUM_VIEWS):
                self.running_mean.lerp_(mean[view].flatten(), self.momentum)
                unbiased = variance[view].flatten() * (count / (count - 1))
                self.running_var.lerp_(unbiased, self.momentum)
        shape = mean.shape[1:]
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(shape)
        return ((views - mean) * scale + self.bias.view(shape)).to(x.dtype).flatten(0, 1)


class BatchNorm1d(_PerView, nn.BatchNorm1d):
    """[2 n, C] -> [2 n, C]."""


class BatchNorm2d(_PerView, nn.BatchNorm2d):
    """[2 n, C, H, W] -> [2 n, C, H, W]."""
