"""The objective over ranks: no rank ever holds the D x D matrix, gradients are the true ones.

W ranks hold n = N / W rows each of the embeddings z_a, z_b [N, D]. As in `loss`, a and b are z_a
and z_b with every column brought to mean 0 and variance 1 over all N rows, C = a^T b / N, and the
terms are on = sum_i (1 - C_ii)^2 and off = sum_ij C_ij^2 - sum_i C_ii^2. Both forms return the
global terms on every rank, and as gradient that of the global terms with respect to this rank's
rows: what is right to hand to a backward pass whose own cross-rank terms (batch norm) are exact.

Let A = d L / d a, B = d L / d b [N, D], for L = u on + v off. Since d off / d C = 2 C - 2 diag(C),

    A = b G^T / N,  B = a G / N,     G = 2 v (C - diag(C)) - 2 u diag(1 - C)

and the gradient through the standardisation of a column with deviation s is, for a (b likewise),

    d L / d z_a = (A - mean_rows(A) - a * mean_rows(A * a)) / s

rows (N small):  the Gram form. C is never formed: b C^T = b b^T a / N = K_b a / N, so with
                 g_i = -2 u (1 - C_ii) - 2 v C_ii this rank needs, for its rows,
                 A = (2 v K_b a / N + b g) / N with its n rows of K_b = b b^T, [n, N].
                 off is the sum over ranks of <K_a, K_b> on their rows, over N^2. The columns of a
                 and b sum to 0, hence those of A too: no mean to subtract. mean_rows(A * a) is one
                 all-reduce of [2, D]. Embeddings are gathered once, in the dtype they come in
                 (bf16 under autocast), everybody standardises all of them: (W - 1) 2 n D values.

columns (N large, or anything that needs the elements of C): rank r owns D / W columns. Rows are
                 exchanged for columns, which makes the standardisation local; a is gathered, and
                 C[:, r] = a^T b_r / N is [D, D / W]. B_r = a G[:, r] is local, A is the sum over
                 ranks of b_r G[:, r]^T, reduced to each rank's columns; then columns are exchanged
                 for rows again.
"""

import torch

from bt_fast.distributed.collectives import (
    Group,
    all_gather,
    all_sum,
    exchange,
    rank_in,
    size_of,
    sum_parts,
)

EPS = 1e-5


def rows(z_a: torch.Tensor, z_b: torch.Tensor, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """z_a, z_b [n, D] of this rank -> global (on, off), by rows of the Gram matrices."""
    return _Rows.apply(z_a, z_b, group)


def columns(
    z_a: torch.Tensor, z_b: torch.Tensor, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_a, z_b [n, D] of this rank -> global (on, off), by columns of C."""
    return _Columns.apply(z_a, z_b, group)


def compute_dtype(z: torch.Tensor) -> torch.dtype:
    """In which the loss of such embeddings is computed: float32 or better."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _standardise(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] -> (each column to mean 0 and variance 1, its 1 / deviation [D]); may overwrite z."""
    z = z.to(compute_dtype(z))
    variance, mean = torch.var_mean(z, 0, correction=0)
    inverse = torch.rsqrt(variance + EPS)
    return z.sub_(mean).mul_(inverse), inverse


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, group):
        n, width = z_a.shape
        rank = rank_in(group)
        whole = all_gather(torch.stack([z_a, z_b]), group)  # [W, 2, n, D]
        a, inverse_a = _standardise(whole[:, 0].reshape(-1, width))
        b, inverse_b = _standardise(whole[:, 1].reshape(-1, width))
        del whole
        num_samples = len(a)
        mine = slice(rank * n, (rank + 1) * n)
        gram_a, gram_b = a[mine] @ a.T, b[mine] @ b.T  # [n, N] each
        total = all_sum((gram_a * gram_b).sum(), group) / num_samples**2
        diagonal = (a * b).sum(0) / num_samples  # [D]
        ctx.save_for_backward(a, b, gram_a, gram_b, diagonal, inverse_a, inverse_b)
        ctx.group, ctx.mine, ctx.dtype = group, mine, z_a.dtype
        return (1 - diagonal).square().sum(), total - diagonal.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_on, grad_off):
        a, b, gram_a, gram_b, diagonal, inverse_a, inverse_b = ctx.saved_tensors
        num_samples, mine = len(a), ctx.mine
        g = -2 * grad_on * (1 - diagonal) - 2 * grad_off * diagonal  # [D]
        own_a, own_b = a[mine], b[mine]
        grad_a = (2 * grad_off / num_samples * (gram_b @ a)).addcmul_(own_b, g) / num_samples
        grad_b = (2 * grad_off / num_samples * (gram_a @ b)).addcmul_(own_a, g) / num_samples
        sums = torch.stack([(grad_a * own_a).sum(0), (grad_b * own_b).sum(0)])
        means = all_sum(sums, ctx.group) / num_samples  # [2, D]
        grad_a = grad_a.addcmul_(own_a, means[0], value=-1).mul_(inverse_a)
        grad_b = grad_b.addcmul_(own_b, means[1], value=-1).mul_(inverse_b)
        return grad_a.to(ctx.dtype), grad_b.to(ctx.dtype), None


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, group):
        ctx.group, ctx.dtype, ctx.width = group, z_a.dtype, z_a.shape[1]
        rank = rank_in(group)
        z = _to_columns(torch.stack([z_a, z_b]), group)  # [2, N, D / W]
        (a, inverse_a), (b, inverse_b) = _standardise(z[0]), _standardise(z[1])
        num_samples, share = a.shape
        first = rank * share
        whole = _all_columns(a, group)  # [N, D]
        block = whole.T @ b / num_samples  # [D, D / W], columns first .. first + share of C
        diagonal = block[first : first + share].diagonal()
        real = torch.arange(first, first + share, device=a.device) < ctx.width  # not padding
        on = ((1 - diagonal).square() * real).sum()
        off = block.square().sum() - diagonal.square().sum()
        terms = all_sum(torch.stack([on, off]), group)
        ctx.save_for_backward(whole, a, b, block, inverse_a, inverse_b)
        ctx.first = first
        return terms[0], terms[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_on, grad_off):
        whole, a, b, block, inverse_a, inverse_b = ctx.saved_tensors
        num_samples, share = a.shape
        own = slice(ctx.first, ctx.first + share)
        g = 2 * grad_off * block  # [D, D / W]
        diagonal = block[own].diagonal()
        g[own].diagonal().copy_(-2 * grad_on * (1 - diagonal))
        grad_b = whole @ g / num_samples
        grad_a = _sum_columns(b @ g.T / num_samples, ctx.group)  # [N, D] -> [N, D / W]
        grads = [
            (grad - grad.mean(0) - x * (grad * x).mean(0)) * inverse
            for grad, x, inverse in ((grad_a, a, inverse_a), (grad_b, b, inverse_b))
        ]
        of_rows = _to_rows(torch.stack(grads).to(ctx.dtype), ctx.width, ctx.group)
        return of_rows[0], of_rows[1], None


def _to_columns(z: torch.Tensor, group: Group) -> torch.Tensor:
    """[2, n, D] of this rank's rows -> [2, N, ceil(D / W)] of its columns; padding is 0."""
    world_size = size_of(group)
    z = torch.nn.functional.pad(z, (0, -z.shape[2] % world_size))
    parts = z.unflatten(2, (world_size, -1)).permute(2, 0, 1, 3)  # [W, 2, n, D / W]
    return exchange(parts, group).transpose(0, 1).flatten(1, 2)


def _to_rows(z: torch.Tensor, width: int, group: Group) -> torch.Tensor:
    """[2, N, D / W] of this rank's columns -> [2, n, D] of its rows."""
    parts = z.unflatten(1, (size_of(group), -1)).transpose(0, 1)  # [W, 2, n, D / W]
    return exchange(parts, group).permute(1, 2, 0, 3).flatten(2)[..., :width]


def _all_columns(a: torch.Tensor, group: Group) -> torch.Tensor:
    """[N, D / W] -> [N, D]."""
    return all_gather(a, group).transpose(0, 1).flatten(1)


def _sum_columns(partial: torch.Tensor, group: Group) -> torch.Tensor:
    """[N, D], to be summed over ranks -> this rank's columns of the sum [N, D / W]."""
    return sum_parts(partial.unflatten(1, (size_of(group), -1)).transpose(0, 1), group)
