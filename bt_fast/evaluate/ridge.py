"""A linear readout in closed form: ridge regression from features to classes.

With standardised features X [n, F] and centred one-hot labels Y [n, C]:

    W = argmin |X W - Y|^2 + lambda n |W|^2 = (X^T X + lambda n)^-1 X^T Y

lambda is the one with the smallest error of leaving out each image in turn, which one
eigendecomposition of X^T X gives for all: the residual of image i divided by 1 - h_i, with the
leverage h_i = x_i^T (X^T X + lambda n)^-1 x_i + 1 / n.
"""

import torch
import torch.nn.functional as F

LAMBDAS = tuple(10.0 ** (k / 2) for k in range(-10, 1))


def ridge_accuracy(
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    num_classes: int,
) -> float:
    """Accuracy on the queries in [0, 1]: features [n, F] and [m, F], labels int64 [n] and [m]."""
    tiny = torch.finfo(bank.dtype).tiny
    bank, queries = bank.double(), queries.double()  # in which squares of float32 are finite
    mean, deviation = bank.mean(0), bank.std(0)
    varies = deviation > 1e-6 * mean.abs() + tiny
    deviation = torch.where(varies, deviation, torch.inf)  # which leaves the others out
    x, q = ((part - mean) / deviation for part in (bank, queries))
    y = F.one_hot(bank_labels, num_classes).double()
    share = y.mean(0)  # of each class
    y -= share
    values, vectors = torch.linalg.eigh(x.T @ x)
    z = x @ vectors
    zy = z.T @ y  # [F, C]
    candidates = []
    for penalty in LAMBDAS:
        scale = 1 / (values.clamp_min(0) + penalty * len(x))
        weights = scale[:, None] * zy
        leverage = z.square() @ scale + 1 / len(x)
        errors = (y - z @ weights) / (1 - leverage)[:, None]
        candidates.append((errors.square().sum().item(), weights))
    _, weights = min(candidates, key=lambda candidate: candidate[0])
    predicted = (q @ vectors @ weights + share).argmax(1)
    return (predicted == query_labels).double().mean().item()
