"""The Barlow Twins objective (Zbontar et al. 2021, eqs. 1 and 2).

With N samples, D dimensions, and a, b [N, D] the two views' embeddings, each column brought to
mean 0 and variance 1 over the batch (biased variance, eps 1e-5: the affine-free batch norm of
the released code), the cross-correlation matrix and the loss are

    C = a^T b / N                                                   [D, D]
    loss = sum_i (1 - C_ii)^2  +  lambd * sum_{i != j} C_ij^2
           `invariance`                   `redundancy`

Two forms, equal up to rounding:

* dense: form C. 2 N D^2 FLOP and a D x D matrix.
* gram:  sum_ij C_ij^2 = <a a^T, b b^T> / N^2, because both are tr(a^T b b^T a) / N^2. Only the
  diagonal of C and two N x N matrices are needed: 4 N^2 D FLOP. At D = 8192 and a few hundred
  samples that is many times less, and D = 65,536 becomes ordinary.

The gradient of the Gram form with respect to a is 2 (b b^T) a / N^2, and with the roles of a
and b exchanged for b: two more products of the same size.

Everything is computed in float32 or better, outside autocast. (On a GPU `perf.apply` lets float32
products use TF32; the released code forms C in float16.)
"""

from typing import Literal

import torch

Method = Literal["auto", "dense", "gram", "columns"]

EPS = 1e-5


def standardise(z: torch.Tensor) -> torch.Tensor:
    """Each column to mean 0, variance 1 over the batch: [N, D] -> [N, D]."""
    centred = z - z.mean(0)
    variance = centred.square().mean(0)
    return centred * torch.rsqrt(variance + EPS)


class _GramNorm(torch.autograd.Function):
    """<a a^T, b b^T> for a, b [N, D] -> scalar."""

    @staticmethod
    def forward(ctx, a, b):
        gram_a, gram_b = a @ a.T, b @ b.T  # [N, N] each
        ctx.save_for_backward(a, b, gram_a, gram_b)
        return (gram_a * gram_b).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        a, b, gram_a, gram_b = ctx.saved_tensors
        return 2 * grad * (gram_b @ a), 2 * grad * (gram_a @ b)


def choose_method(num_samples: int, num_dimensions: int) -> Method:
    """The form that costs fewer FLOP: gram 4 N^2 D, dense 2 N D^2."""
    return "gram" if 2 * num_samples <= num_dimensions else "dense"


def correlation_terms(
    z_a: torch.Tensor, z_b: torch.Tensor, *, group=None, method: Method = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums of the loss: (invariance, redundancy), scalars.

    Args:
        z_a, z_b: [N, D], the embeddings of the two views, row i of both from image i.
        group: the process group the batch is spread over; None for one process.
        method: "dense", "gram", or "auto" for the cheaper of the two.
    Raises:
        ValueError: shapes that differ, fewer than two samples, an unknown method.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape or z_a.dtype != z_b.dtype:
        raise ValueError(
            "z_a and z_b must be [N, D] and alike,"
            f" got {z_a.dtype} {list(z_a.shape)} and {z_b.dtype} {list(z_b.shape)}"
        )
    num_samples, num_dimensions = z_a.shape
    if num_samples < 2:
        raise ValueError("the loss needs at least two samples: it normalises over the batch")
    if group is not None or method == "columns":
        raise ValueError("the sharded forms (group=, method='columns') are not available yet")
    if method == "auto":
        method = choose_method(num_samples, num_dimensions)

    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (z if z.dtype == torch.float64 else z.float() for z in (z_a, z_b))
        a, b = standardise(z_a), standardise(z_b)
        if method == "dense":
            correlation = a.T @ b / num_samples  # [D, D]
            diagonal = correlation.diagonal()
            total = correlation.square().sum()
        elif method == "gram":
            diagonal = (a * b).sum(0) / num_samples  # [D]
            total = _GramNorm.apply(a, b) / num_samples**2
        else:
            raise ValueError(f"method must be auto, dense, gram or columns, got {method!r}")
        invariance = (1 - diagonal).square().sum()
        redundancy = total - diagonal.square().sum()
    return invariance, redundancy


def barlow_twins_loss(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    *,
    lambd: float = 5e-3,
    group=None,
    method: Method = "auto",
) -> torch.Tensor:
    """invariance + lambd * redundancy, a scalar; see `correlation_terms` for the arguments."""
    invariance, redundancy = correlation_terms(z_a, z_b, group=group, method=method)
    return invariance + lambd * redundancy
