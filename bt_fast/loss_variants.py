"""Other objectives than the paper's own: its Table 5, and what its discussion names.

Every one gives two terms, and the loss is on_diagonal + lambd * off_diagonal, as in `loss`. z_a
and z_b [N, D] are the embeddings of the two views, a and b the same, standardised over the batch:

    barlow-twins      C = a^T b / N: sum_i (1 - C_ii)^2, sum_{i != j} C_ij^2      eqs. 1 and 2
    redundancy-only   0 in place of the first term                                Table 5
    feature-norm      both of C = a^T b, with rows of a and b of length 1         Table 5
    covariance        both of C = a^T b / N, with a and b centred only            Table 5
    cross-entropy     -log sum_i exp(C_ii / t),                                   Table 5
                      log sum_{i != j} exp(max(C_ij, 0) / t)
    auto-correlation  the second term of a^T a / N and of b^T b / N, their mean   section 5.2
    imax              log|cov(z_a - z_b)|,  -log|cov(z_a + z_b)|                  section 5.1

What the paper leaves open, and what is taken here:

* feature-norm: eq. 2 without its denominators, a sum over the batch. With a mean over it, the sum
  of all C_ij^2 could not exceed 1 and the second term would weigh nothing.
* auto-correlation: of "a single network"; the twins are alike, so the mean of both.
* cross-entropy: the paper names neither its temperature nor its lambda.
* imax: covariances have EPS added to their diagonals, without which they are singular for N <= D.
  Becker and Hinton's objective has no lambda: take 1.

redundancy-only and auto-correlation run sharded, as `loss` does. The others need all of the batch
at once: embeddings are gathered and every rank computes the same, so their gradients are the true
ones on any number of ranks, but the work is not shared. Only cross-entropy holds a D x D matrix
where N is less than D.
"""

import math
from typing import Literal

import torch

from bt_fast.distributed.collectives import Group, all_gather, rank_in
from bt_fast.loss import correlation_terms, require_pairs, standardise
from bt_fast.loss_sharded import EPS, compute_dtype

Objective = Literal[
    "barlow-twins",
    "redundancy-only",
    "feature-norm",
    "covariance",
    "cross-entropy",
    "auto-correlation",
    "imax",
]
Terms = tuple[torch.Tensor, torch.Tensor]


def objective_terms(
    objective: Objective,
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: Group = None,
) -> Terms:
    """The two terms of an objective: (on_diagonal, off_diagonal), scalars.

    Args:
        z_a, z_b, group: as in `loss.correlation_terms`.
        temperature: t of cross-entropy; the others have none.
    Returns:
        the terms of the whole batch, on every rank, with the true gradients.
    Raises:
        ValueError: shapes that differ, fewer than two samples, an unknown objective.
    """
    if objective == "barlow-twins":
        return correlation_terms(z_a, z_b, group=group)
    if objective == "redundancy-only":
        on_diagonal, off_diagonal = correlation_terms(z_a, z_b, group=group)
        return torch.zeros_like(on_diagonal), off_diagonal
    if objective == "auto-correlation":
        on_diagonal, _ = correlation_terms(z_a, z_b, group=group)
        _, of_a = correlation_terms(z_a, z_a, group=group)
        _, of_b = correlation_terms(z_b, z_b, group=group)
        return on_diagonal, (of_a + of_b) / 2
    require_pairs(z_a, z_b, group)
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (_Whole.apply(z, group).to(compute_dtype(z)) for z in (z_a, z_b))  # [N, D]
        if objective == "feature-norm":
            return _feature_norm(z_a, z_b)
        if objective == "covariance":
            return _matrix_terms(z_a - z_a.mean(0), z_b - z_b.mean(0), 1 / len(z_a))
        if objective == "cross-entropy":
            return _cross_entropy(z_a, z_b, temperature)
        if objective == "imax":
            return _log_determinant(z_a - z_b), -_log_determinant(z_a + z_b)
    raise ValueError(f"there is no objective {objective!r}")


class _Whole(torch.autograd.Function):
    """[n, D] of every rank -> [N, D]. Every rank goes on to compute the same of it, so the global
    value's gradient with respect to this rank's rows is already here: nothing to sum."""

    @staticmethod
    def forward(ctx, z, group):
        ctx.rank, ctx.n = rank_in(group), len(z)
        return all_gather(z, group).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad[ctx.rank * ctx.n : (ctx.rank + 1) * ctx.n], None


def _matrix_terms(a: torch.Tensor, b: torch.Tensor, weight: float) -> Terms:
    """Both sums of C = weight * a^T b; by the Gram matrices where they are smaller (see `loss`)."""
    diagonal = weight * (a * b).sum(0)  # [D]
    few = len(a) < a.shape[1]
    squares = (a @ a.T * (b @ b.T)).sum() if few else (a.T @ b).square().sum()
    on_diagonal = (1 - diagonal).square().sum()
    return on_diagonal, weight**2 * squares - diagonal.square().sum()


def _feature_norm(z_a: torch.Tensor, z_b: torch.Tensor) -> Terms:
    a, b = (torch.nn.functional.normalize(standardise(z), dim=1) for z in (z_a, z_b))
    return _matrix_terms(a, b, 1.0)


def _cross_entropy(z_a: torch.Tensor, z_b: torch.Tensor, temperature: float) -> Terms:
    correlation = standardise(z_a).T @ standardise(z_b) / len(z_a)  # [D, D]
    on_diagonal = -torch.logsumexp(correlation.diagonal() / temperature, 0)
    others = correlation.clamp_min(0) / temperature
    others.fill_diagonal_(-math.inf)
    return on_diagonal, torch.logsumexp(others.flatten(), 0)


def _log_determinant(z: torch.Tensor) -> torch.Tensor:
    """log|cov(z) + EPS I|, of z [N, D]; in float64, because the matrix is close to singular.

    With X the centred rows over sqrt(N), |EPS I + X^T X| = EPS^(D - N) |EPS I + X X^T|.
    """
    num_samples, width = z.shape
    x = (z.double() - z.double().mean(0)) / math.sqrt(num_samples)
    smaller = x @ x.T if num_samples < width else x.T @ x
    smaller = smaller + EPS * torch.eye(len(smaller), dtype=x.dtype, device=x.device)
    value = torch.linalg.slogdet(smaller).logabsdet
    return (value + max(width - num_samples, 0) * math.log(EPS)).to(compute_dtype(z))
