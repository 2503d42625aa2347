"""The linear readout against ridge regression that leaves out each image in turn."""

import numpy as np
import pytest
import torch

from bt_fast.evaluate.ridge import LAMBDAS, ridge_accuracy


def explicit_accuracy(x, labels, q, query_labels, num_classes: int) -> float:
    """By definition: for every lambda, n regressions without one image each."""
    mean, deviation = x.mean(0), x.std(0, ddof=1)
    x, q = (x - mean) / deviation, (q - mean) / deviation
    y = np.eye(num_classes)[labels]

    def fit(x, y, penalty):  # the bias is not penalised
        bias = y.mean(0) - 0.0
        centre = x.mean(0)
        gram = (x - centre).T @ (x - centre) + penalty * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, (x - centre).T @ (y - bias))
        return lambda points: (points - centre) @ weights + bias

    def error(penalty):
        rows = np.arange(len(x))
        left_out = (rows != i for i in rows)
        models = [fit(x[rest], y[rest], penalty) for rest in left_out]
        return sum(((y[i] - models[i](x[i])) ** 2).sum() for i in rows)

    penalty = min((share * len(x) for share in LAMBDAS), key=error)
    return float((fit(x, y, penalty)(q).argmax(1) == query_labels).mean())


@pytest.mark.parametrize("width,noise", [(6, 0.5), (6, 3.0), (40, 1.0)])  # 40: more than images
def test_it_is_ridge_regression_with_the_best_left_out_error(width, noise):
    generator = np.random.default_rng(width)
    centres = generator.normal(size=(3, width))
    labels, query_labels = generator.integers(0, 3, 30), generator.integers(0, 3, 200)
    x, q = (
        centres[k] + noise * generator.normal(size=(len(k), width)) for k in (labels, query_labels)
    )
    x[:, 0] *= 100  # features of another scale
    q[:, 0] *= 100
    tensors = map(torch.from_numpy, (x, labels, q, query_labels))
    expected = explicit_accuracy(x, labels, q, query_labels, 3)
    assert ridge_accuracy(*tensors, 3) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("scale", [1.0, 3e37])  # the largest features whose norms are finite
def test_a_constant_feature_and_an_absent_class_change_nothing(scale):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    x = labels[:, None] + 0.1 * torch.randn(40, 5, generator=generator)
    x[:, 3] = 0.7
    queries = x.clone()
    queries[:, 3] = 0.1 * torch.arange(40)
    assert ridge_accuracy(x * scale, labels, queries * scale, labels, 4) == 1.0
