"""The objectives of the paper's Table 5 and discussion, beside its own.

Each has two terms, and the loss is on_diagonal + lambd * off_diagonal, as in `loss`. z_a and z_b
[N, D] are the embeddings of the two views, a and b the same, standardised over the batch:

    barlow-twins      C = a^T b / N: sum_i (1 - C_ii)^2, sum_{i != j} C_ij^2      eqs. 1 and 2
    redundancy-only   0 in place of the first term                                Table 5
    feature-norm      as barlow-twins, C = a^T b, rows of a and b of length 1     Table 5
    covariance        as barlow-twins, C = a^T b / N, a and b centred only        Table 5
    cross-entropy     -log sum_i exp(C_ii / t),                                   Table 5
                      log sum_{i != j} exp(max(C_ij, 0) / t)
    auto-correlation  second term: its mean for a^T a / N and b^T b / N           section 5.2
    imax              log|cov(z_a - z_b)|,  -log|cov(z_a + z_b)|                  section 5.1

Choices where the paper is silent:

* feature-norm: C is eq. 2 without its denominators, a sum over the batch. With a mean, the sum of
  all C_ij^2 could not exceed 1 and the second term would be negligible.
* auto-correlation: the paper has that of "a single network"; the two networks share their weights,
  so it is the mean over both views.
* cross-entropy: temperature and lambda are not given.
* imax: EPS is added to the covariances' diagonals; they are singular for N <= D. Becker and
  Hinton's objective has no lambda; use 1.

redundancy-only and auto-correlation are sharded, as in `loss`. The others need the global batch:
embeddings are gathered and every rank computes the same terms, so the gradients are the true ones
on any number of ranks, but the work is replicated. For N < D only cross-entropy holds a D x D
matrix.
"""

import functools
import math
from collections.abc import Callable

import torch

from bt_fast.choices import Objective
from bt_fast.distributed.collectives import Group, all_gather, group_rank
from bt_fast.loss import EPS, compute_dtype, correlation_terms, require_embeddings, standardise

Terms = tuple[torch.Tensor, torch.Tensor]


def objective_function(
    objective: Objective, temperature: float = 0.1, group: Group = None
) -> Callable[[torch.Tensor, torch.Tensor], Terms]:
    """An objective as a function (z_a, z_b) -> (on-diagonal term, off-diagonal term), scalars.

    The terms are those of the global batch, on every rank, with the true gradients.
    ValueError is raised for shapes that differ and for fewer than two samples.
    temperature: softmax temperature of the cross-entropy objective.
    """
    if objective == "barlow-twins":
        return functools.partial(correlation_terms, group=group)
    return functools.partial(_variant_terms, objective, temperature=temperature, group=group)


def _variant_terms(
    objective: Objective, z_a: torch.Tensor, z_b: torch.Tensor, *, temperature: float, group: Group
) -> Terms:
    if objective == "redundancy-only":
        on_diagonal, off_diagonal = correlation_terms(z_a, z_b, group=group)
        return torch.zeros_like(on_diagonal), off_diagonal
    if objective == "auto-correlation":
        on_diagonal, _ = correlation_terms(z_a, z_b, group=group)
        _, off_diagonal_a = correlation_terms(z_a, z_a, group=group)
        _, off_diagonal_b = correlation_terms(z_b, z_b, group=group)
        return on_diagonal, (off_diagonal_a + off_diagonal_b) / 2
    require_embeddings(z_a, z_b, group)
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (_Gather.apply(z, group).to(compute_dtype(z)) for z in (z_a, z_b))  # [N, D]
        if objective == "feature-norm":
            a, b = (torch.nn.functional.normalize(standardise(z), dim=1) for z in (z_a, z_b))
            return _matrix_terms(a, b, 1.0)
        if objective == "covariance":
            return _matrix_terms(z_a - z_a.mean(0), z_b - z_b.mean(0), 1 / len(z_a))
        if objective == "cross-entropy":
            return _cross_entropy(z_a, z_b, temperature)
        if objective == "imax":
            return _log_determinant(z_a - z_b), -_log_determinant(z_a + z_b)
    raise ValueError(f"unknown objective {objective!r}")


class _Gather(torch.autograd.Function):
    """[n, D] of every rank -> [N, D]. All ranks compute the same: gradients need no reduction."""

    @staticmethod
    def forward(ctx, z, group):
        ctx.rank, ctx.n = group_rank(group), len(z)
        return all_gather(z, group).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad[ctx.rank * ctx.n : (ctx.rank + 1) * ctx.n], None


def _matrix_terms(a: torch.Tensor, b: torch.Tensor, weight: float) -> Terms:
    """Both terms for C = weight * a^T b; by Gram matrices if they are smaller (see `loss`)."""
    diagonal = weight * (a * b).sum(0)  # [D]
    use_gram = len(a) < a.shape[1]
    squared_norm = (a @ a.T * (b @ b.T)).sum() if use_gram else (a.T @ b).square().sum()
    on_diagonal = (1 - diagonal).square().sum()
    return on_diagonal, weight**2 * squared_norm - diagonal.square().sum()


def _cross_entropy(z_a: torch.Tensor, z_b: torch.Tensor, temperature: float) -> Terms:
    correlation = standardise(z_a).T @ standardise(z_b) / len(z_a)  # [D, D]
    on_diagonal = -torch.logsumexp(correlation.diagonal() / temperature, 0)
    logits = correlation.clamp_min(0) / temperature
    logits.fill_diagonal_(-math.inf)
    return on_diagonal, torch.logsumexp(logits.flatten(), 0)


def _log_determinant(z: torch.Tensor) -> torch.Tensor:
    """log|cov(z) + EPS I| for z [N, D]; in float64, because the matrix is nearly singular.

    With X the centred rows over sqrt(N), |EPS I + X^T X| = EPS^(D - N) |EPS I + X X^T|.
    """
    num_samples, width = z.shape
    x = (z.double() - z.double().mean(0)) / math.sqrt(num_samples)
    smaller = x @ x.T if num_samples < width else x.T @ x
    smaller = smaller + EPS * torch.eye(len(smaller), dtype=x.dtype, device=x.device)
    value = torch.linalg.slogdet(smaller).logabsdet
    return (value + max(width - num_samples, 0) * math.log(EPS)).to(compute_dtype(z))
