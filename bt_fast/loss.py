"""The Barlow Twins objective (Zbontar et al. 2021, eqs. 1 and 2).

With N samples, D dimensions, and a, b [N, D] the two views' embeddings, each column brought to
mean 0 and variance 1 over the batch (biased variance, eps 1e-5: the affine-free batch norm of
the released code), the cross-correlation matrix and the loss are

    C = a^T b / N                                                   [D, D]
    loss = sum_i (1 - C_ii)^2  +  lambd * sum_{i != j} C_ij^2
           `on_diagonal`                   `off_diagonal`

Three forms, equal up to rounding:

* dense: form C. 2 N D^2 FLOP and a D x D matrix: the definition, for one process.
* gram:  sum_ij C_ij^2 = <a a^T, b b^T> / N^2, because both are tr(a^T b b^T a) / N^2. Only the
  diagonal of C and two N x N matrices are needed: 4 N^2 D FLOP. At D = 8192 and a few hundred
  samples that is many times less, and D = 65,536 becomes ordinary.
* columns: C in blocks of columns, one per rank; where N is large against D.

gram and columns run on any number of ranks (`loss_sharded`, with the gradients' derivation): the
batch is then that of all ranks, and so are its statistics.

Everything is computed in float32 or better, outside autocast. (On a GPU `perf.apply` lets float32
products use TF32; the released code forms C in float16.)
"""

from typing import Literal

import torch

from bt_fast import loss_sharded
from bt_fast.distributed.collectives import Group, size_of
from bt_fast.loss_sharded import EPS

Method = Literal["auto", "dense", "gram", "columns"]

# What a rank does and sends in a second, roughly; only their ratio matters to the choice.
_FLOP_PER_S = 3e14
_BYTES_PER_S = 5e10


def standardise(z: torch.Tensor) -> torch.Tensor:
    """Each column to mean 0, variance 1 over the batch: [N, D] -> [N, D]."""
    centred = z - z.mean(0)
    variance = centred.square().mean(0)
    return centred * torch.rsqrt(variance + EPS)


def choose_method(num_samples: int, num_dimensions: int, world_size: int = 1) -> Method:
    """The form whose arithmetic and traffic take less time on one rank.

    gram: 8 N^2 D / W FLOP forwards and backwards, 2 N D values sent. columns: 6 N D^2 / W FLOP, a
    gather and a reduction of N D values and exchanges of 4 N D / W. num_samples is the global N.
    """
    elements = num_samples * num_dimensions
    others = (world_size - 1) / world_size
    gram = 8 * elements * num_samples / world_size / _FLOP_PER_S
    columns = 6 * elements * num_dimensions / world_size / _FLOP_PER_S
    gram += 2 * elements * 2 * others / _BYTES_PER_S
    columns += (2 * 4 + 4 * 2 / world_size) * elements * others / _BYTES_PER_S
    if gram <= columns:
        return "gram"
    return "dense" if world_size == 1 else "columns"


def require_pairs(z_a: torch.Tensor, z_b: torch.Tensor, group: Group) -> int:
    """N, the samples of all ranks. Raises ValueError for what are not two views' embeddings."""
    if z_a.ndim != 2 or z_a.shape != z_b.shape or z_a.dtype != z_b.dtype:
        raise ValueError(
            "z_a and z_b must be [n, D] and alike,"
            f" got {z_a.dtype} {list(z_a.shape)} and {z_b.dtype} {list(z_b.shape)}"
        )
    num_samples = len(z_a) * size_of(group)
    if num_samples < 2:
        raise ValueError("the loss needs at least two samples: it normalises over the batch")
    return num_samples


def correlation_terms(
    z_a: torch.Tensor, z_b: torch.Tensor, *, group: Group = None, method: Method = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sums of the loss: (on_diagonal, off_diagonal), scalars.

    Args:
        z_a, z_b: [n, D], this rank's embeddings of the two views, row i of both from image i; as
            many rows on every rank.
        group: the process group the batch is spread over; None for one process.
        method: "dense" (one process), "gram", "columns", or "auto" for what costs least.
    Returns:
        the terms of the whole batch, on every rank; their gradients are the true ones with respect
        to this rank's embeddings, through the other ranks' share of the statistics too.
    Raises:
        ValueError: shapes that differ, fewer than two samples, an unknown method.
    """
    num_samples = require_pairs(z_a, z_b, group)
    world_size, num_dimensions = size_of(group), z_a.shape[1]
    if method == "auto":
        method = choose_method(num_samples, num_dimensions, world_size)
    if method == "dense" and world_size > 1:
        raise ValueError("method 'dense' holds a D x D matrix: for one process only")

    with torch.autocast(z_a.device.type, enabled=False):
        if method == "gram":
            return loss_sharded.rows(z_a, z_b, group)
        if method == "columns":
            return loss_sharded.columns(z_a, z_b, group)
        if method != "dense":
            raise ValueError(f"method must be auto, dense, gram or columns, got {method!r}")
        z_a, z_b = (z.to(loss_sharded.compute_dtype(z)) for z in (z_a, z_b))
        correlation = standardise(z_a).T @ standardise(z_b) / num_samples  # [D, D]
        diagonal = correlation.diagonal()
        on_diagonal = (1 - diagonal).square().sum()
        return on_diagonal, correlation.square().sum() - diagonal.square().sum()


def barlow_twins_loss(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    *,
    lambd: float = 5e-3,
    group: Group = None,
    method: Method = "auto",
) -> torch.Tensor:
    """on_diagonal + lambd * off_diagonal, a scalar; see `correlation_terms` for the arguments."""
    on_diagonal, off_diagonal = correlation_terms(z_a, z_b, group=group, method=method)
    return on_diagonal + lambd * off_diagonal
