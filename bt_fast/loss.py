"""The Barlow Twins objective (Zbontar et al. 2021, eqs. 1 and 2), on any number of ranks.

With N samples, D dimensions, and a, b [N, D] the two views' embeddings, each column standardised to
mean 0 and variance 1 over the batch (biased variance, eps 1e-5: the affine-free batch norm of the
released code), the cross-correlation matrix and the loss are

    C = a^T b / N                                                   [D, D]
    loss = sum_i (1 - C_ii)^2  +  lambd * sum_{i != j} C_ij^2
           on-diagonal term               off-diagonal term

Three methods, equal up to rounding:

* dense: compute C, a D x D matrix, with 2 N D^2 FLOP: the definition, for one process.
* gram:  sum_ij C_ij^2 = <a a^T, b b^T> / N^2, because both are tr(a^T b b^T a) / N^2. Only the
  diagonal of C and two N x N matrices are needed: 4 N^2 D FLOP. For a few hundred samples that is
  many times less at D = 8192, and makes D = 65,536 affordable.
* columns: compute C in blocks of columns, one per rank, for N large compared with D.

gram and columns run on W ranks with n = N / W rows each of the embeddings z_a, z_b [N, D]; no rank
holds the D x D matrix. Both return the global terms on every rank, and their gradient is that of
the global terms with respect to this rank's rows, as batch norm over all ranks needs it. Let
A = d L / d a, B = d L / d b [N, D], for L = u on + v off. Since d off / d C = 2 C - 2 diag(C),

    A = b G^T / N,  B = a G / N,     G = 2 v (C - diag(C)) - 2 u diag(1 - C)

and the gradient through the standardisation of a column with deviation s is, for a (b likewise),

    d L / d z_a = (A - mean_rows(A) - a * mean_rows(A * a)) / s

gram:     C is not computed: b C^T = b b^T a / N = K_b a / N, so with
          g_i = -2 u (1 - C_ii) - 2 v C_ii this rank needs, for its rows,
          A = (2 v K_b a / N + b g) / N with its n rows of K_b = b b^T, [n, N].
          off is the sum over ranks of <K_a, K_b> on their rows, over N^2. The columns of a and b
          sum to 0, hence those of A too, so mean_rows(A) is 0. mean_rows(A * a) is one all-reduce
          of [2, D]. One all-gather sends the embeddings in their dtype (bf16 under autocast),
          (W - 1) 2 n D values, and every rank standardises all of them.

columns:  rank r has D / W columns. An all-to-all exchanges rows for columns, which makes the
          standardisation local; a is gathered, and C[:, r] = a^T b_r / N is [D, D / W].
          B_r = a G[:, r] is local, A is the sum over ranks of b_r G[:, r]^T, reduce-scattered by
          columns; then an all-to-all exchanges columns for rows.

Everything is computed in float32 or float64, outside autocast. (On a GPU `runtime.apply_switches`
lets float32 products use TF32; the released code computes C in float16.)
"""

import warnings
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from bt_fast.distributed.collectives import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    group_rank,
    group_size,
    reduce_scatter,
)

Method = Literal["auto", "dense", "gram", "columns"]
Term = TypeVar("Term", float, torch.Tensor)

EPS = 1e-5
# Assumed rates of a rank; only their ratio matters.
_FLOP_PER_S = 3e14
_BYTES_PER_S = 5e10


def barlow_twins_loss(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    *,
    lambd: float = 5e-3,
    group: Group = None,
    method: Method = "auto",
    ddp: bool = False,
) -> torch.Tensor:
    """The Barlow Twins loss of a batch, which may be spread over ranks (eqs. 1 and 2 of the paper).

    Args:
        z_a: [n, D], this rank's embeddings of view A; the same number of rows on every rank. No
            normalisation is needed before.
        z_b: the same of view B, row i from the image of row i of z_a.
        lambd: weight of the off-diagonal term.
        group: the process group over which the batch is spread; None: this process alone.
        method: "dense" (one process), "gram", "columns", or "auto" for the cheapest.
        ddp: whether `DistributedDataParallel` averages the gradients: multiplies the gradient, not
            the loss, by the number of ranks, which DDP divides it by.

    Returns:
        the loss of the global batch, a scalar on every rank, in float32 or float64. Its gradient is
        the true one with respect to this rank's embeddings; only that of "dense" can be
        differentiated again.

    Raises:
        ValueError: no floating-point tensors, shapes or dtypes that differ, fewer than two samples,
            an unknown method.

    Warns:
        UserWarning: without a group, where several ranks exist: each would minimise its own loss.
    """
    if (
        group is None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        warnings.warn(
            "barlow_twins_loss without a group is the loss of this rank's batch alone; pass"
            " group=torch.distributed.group.WORLD, and ddp=True under DistributedDataParallel",
            stacklevel=2,
        )
    loss = weighted_sum(*correlation_terms(z_a, z_b, group=group, method=method), lambd)
    if ddp and loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * group_size(group))
    return loss


def weighted_sum(on_diagonal: Term, off_diagonal: Term, lambd: float) -> Term:
    """The loss from its two terms."""
    return on_diagonal + lambd * off_diagonal


def correlation_terms(
    z_a: torch.Tensor, z_b: torch.Tensor, *, group: Group = None, method: Method = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss's terms (on_diagonal, off_diagonal), scalars; see `barlow_twins_loss`."""
    num_samples = require_embeddings(z_a, z_b, group)
    world_size, num_dimensions = group_size(group), z_a.shape[1]
    if method == "auto":
        method = choose_method(num_samples, num_dimensions, world_size)
    if method == "dense" and world_size > 1:
        raise ValueError("method 'dense' needs a D x D matrix: for one process only")

    with torch.autocast(z_a.device.type, enabled=False):
        if method == "gram":
            return _Gram.apply(z_a, z_b, group)
        if method == "columns":
            return _Columns.apply(z_a, z_b, group)
        if method != "dense":
            raise ValueError(f"method must be auto, dense, gram or columns, got {method!r}")
        z_a, z_b = (z.to(compute_dtype(z)) for z in (z_a, z_b))
        correlation = standardise(z_a).T @ standardise(z_b) / num_samples  # [D, D]
        diagonal = correlation.diagonal()
        on_diagonal = (1 - diagonal).square().sum()
        return on_diagonal, correlation.square().sum() - diagonal.square().sum()


def choose_method(num_samples: int, num_dimensions: int, world_size: int = 1) -> Method:
    """The method whose arithmetic and communication take less time on one rank.

    gram: 8 N^2 D / W FLOP in both passes, 2 N D values sent. columns: 6 N D^2 / W FLOP, an
    all-gather and a reduce-scatter of N D values and all-to-alls of 4 N D / W. num_samples is the
    global N.
    """
    num_values = num_samples * num_dimensions
    remote = (world_size - 1) / world_size  # fraction of all rows that other ranks have
    gram_s = 8 * num_values * num_samples / world_size / _FLOP_PER_S
    columns_s = 6 * num_values * num_dimensions / world_size / _FLOP_PER_S
    gram_s += 2 * num_values * 2 * remote / _BYTES_PER_S
    columns_s += (2 * 4 + 4 * 2 / world_size) * num_values * remote / _BYTES_PER_S
    if gram_s <= columns_s:
        return "gram"
    return "dense" if world_size == 1 else "columns"


def require_embeddings(z_a: torch.Tensor, z_b: torch.Tensor, group: Group) -> int:
    """Raise ValueError unless these are two views' embeddings; returns the global N."""
    for name, z in ("z_a", z_a), ("z_b", z_b):
        if not isinstance(z, torch.Tensor) or not z.is_floating_point():
            kind = z.dtype if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"{name} must be a floating-point tensor [n, D], got {kind}")
    if z_a.ndim != 2 or z_a.shape != z_b.shape or z_a.dtype != z_b.dtype:
        raise ValueError(
            "z_a and z_b must be [n, D] of the same shape and dtype,"
            f" got {z_a.dtype} {list(z_a.shape)} and {z_b.dtype} {list(z_b.shape)}"
        )
    num_samples = len(z_a) * group_size(group)
    if num_samples < 2:
        raise ValueError("the loss needs at least two samples: it standardises over the batch")
    return num_samples


def standardise(z: torch.Tensor) -> torch.Tensor:
    """Standardise each column to mean 0, variance 1: [N, D] -> [N, D]."""
    centred = z - z.mean(0)
    variance = centred.square().mean(0)
    return centred * torch.rsqrt(variance + EPS)


def compute_dtype(z: torch.Tensor) -> torch.dtype:
    """Dtype in which the loss of embeddings is computed: float64 for float64, else float32."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _standardise_in_place(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] -> (standardised columns, 1 / deviation [D]); may overwrite z."""
    z = z.to(compute_dtype(z))
    variance, mean = torch.var_mean(z, 0, correction=0)
    inverse = torch.rsqrt(variance + EPS)
    return z.sub_(mean).mul_(inverse), inverse


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, group):
        n, width = z_a.shape
        rank = group_rank(group)
        gathered = all_gather(torch.stack([z_a, z_b]), group)  # [W, 2, n, D]
        a, inverse_a = _standardise_in_place(gathered[:, 0].reshape(-1, width))
        b, inverse_b = _standardise_in_place(gathered[:, 1].reshape(-1, width))
        del gathered
        num_samples = len(a)
        local = slice(rank * n, (rank + 1) * n)
        gram_a, gram_b = a[local] @ a.T, b[local] @ b.T  # [n, N] each
        squared_norm = all_reduce((gram_a * gram_b).sum(), group) / num_samples**2  # of C
        diagonal = (a * b).sum(0) / num_samples  # [D]
        ctx.save_for_backward(a, b, gram_a, gram_b, diagonal, inverse_a, inverse_b)
        ctx.group, ctx.local, ctx.dtype = group, local, z_a.dtype
        return (1 - diagonal).square().sum(), squared_norm - diagonal.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_on, grad_off):
        a, b, gram_a, gram_b, diagonal, inverse_a, inverse_b = ctx.saved_tensors
        num_samples, local_a, local_b = len(a), a[ctx.local], b[ctx.local]
        g = -2 * grad_on * (1 - diagonal) - 2 * grad_off * diagonal  # [D]
        grad_a = (2 * grad_off / num_samples * (gram_b @ a)).addcmul_(local_b, g) / num_samples
        grad_b = (2 * grad_off / num_samples * (gram_a @ b)).addcmul_(local_a, g) / num_samples
        sums = torch.stack([(grad_a * local_a).sum(0), (grad_b * local_b).sum(0)])
        means = all_reduce(sums, ctx.group) / num_samples  # [2, D]
        grad_a = grad_a.addcmul_(local_a, means[0], value=-1).mul_(inverse_a)
        grad_b = grad_b.addcmul_(local_b, means[1], value=-1).mul_(inverse_b)
        return grad_a.to(ctx.dtype), grad_b.to(ctx.dtype), None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, group):
        ctx.group, ctx.dtype, ctx.width = group, z_a.dtype, z_a.shape[1]
        rank = group_rank(group)
        z = _to_columns(torch.stack([z_a, z_b]), group)  # [2, N, D / W]
        (a, inverse_a), (b, inverse_b) = _standardise_in_place(z[0]), _standardise_in_place(z[1])
        num_samples, num_local = a.shape
        first, end = rank * num_local, (rank + 1) * num_local
        all_a = all_gather(a, group).transpose(0, 1).flatten(1)  # [N, D]
        block = all_a.T @ b / num_samples  # [D, D / W], columns first .. end of C
        diagonal = block[first:end].diagonal()
        is_column = torch.arange(first, end, device=a.device) < ctx.width  # not padding
        on = ((1 - diagonal).square() * is_column).sum()
        off = block.square().sum() - diagonal.square().sum()
        terms = all_reduce(torch.stack([on, off]), group)
        ctx.save_for_backward(all_a, a, b, block, inverse_a, inverse_b)
        ctx.local = slice(first, end)
        return terms[0], terms[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_on, grad_off):
        all_a, a, b, block, inverse_a, inverse_b = ctx.saved_tensors
        num_samples = len(a)
        g = 2 * grad_off * block  # [D, D / W]
        diagonal = block[ctx.local].diagonal()
        g[ctx.local].diagonal().copy_(-2 * grad_on * (1 - diagonal))
        grad_b = all_a @ g / num_samples
        parts = (b @ g.T / num_samples).unflatten(1, (group_size(ctx.group), -1))  # [N, W, D / W]
        grad_a = reduce_scatter(parts.transpose(0, 1), ctx.group)  # [N, D / W]
        grads = [
            (grad - grad.mean(0) - x * (grad * x).mean(0)) * inverse
            for grad, x, inverse in ((grad_a, a, inverse_a), (grad_b, b, inverse_b))
        ]
        grad_z = _to_rows(torch.stack(grads).to(ctx.dtype), ctx.width, ctx.group)
        return grad_z[0], grad_z[1], None


def _to_columns(z: torch.Tensor, group: Group) -> torch.Tensor:
    """This rank's rows [2, n, D] -> its columns [2, N, ceil(D / W)], padded with 0."""
    world_size = group_size(group)
    z = torch.nn.functional.pad(z, (0, -z.shape[2] % world_size))
    parts = z.unflatten(2, (world_size, -1)).permute(2, 0, 1, 3)  # [W, 2, n, D / W]
    return all_to_all(parts, group).transpose(0, 1).flatten(1, 2)


def _to_rows(z: torch.Tensor, width: int, group: Group) -> torch.Tensor:
    """This rank's columns [2, N, D / W] -> its rows [2, n, D]."""
    parts = z.unflatten(1, (group_size(group), -1)).transpose(0, 1)  # [W, 2, n, D / W]
    return all_to_all(parts, group).permute(1, 2, 0, 3).flatten(2)[..., :width]
