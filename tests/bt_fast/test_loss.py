"""The loss against an independent float64 oracle: values and gradients of all methods."""

import pytest
import torch
from ranks import embeddings

from bt_fast.loss import barlow_twins_loss, choose_method, correlation_terms


def oracle(z_a: torch.Tensor, z_b: torch.Tensor, lambd: float) -> torch.Tensor:
    """The paper's pseudo-code, element by element; shares nothing with the implementation."""
    norm = torch.nn.BatchNorm1d(z_a.shape[1], affine=False, dtype=z_a.dtype)
    correlation = torch.einsum("ni,nj->ij", norm(z_a), norm(z_b)) / z_a.shape[0]
    target = torch.eye(z_a.shape[1], dtype=z_a.dtype)
    weight = target + lambd * (1 - target)
    return (weight * (correlation - target) ** 2).sum()


@pytest.mark.parametrize("method", ["dense", "gram", "columns", "auto"])
@pytest.mark.parametrize("n,d", [(2, 3), (16, 64), (64, 16), (128, 128), (5, 1)])
def test_loss_and_gradients_equal_the_oracle(method, n, d):
    z_a, z_b = embeddings(n, d)
    expected = oracle(z_a, z_b, 5e-3)
    expected_gradients = torch.autograd.grad(expected, (z_a, z_b))
    loss = barlow_twins_loss(z_a, z_b, lambd=5e-3, method=method)
    gradients = torch.autograd.grad(loss, (z_a, z_b))
    assert abs(loss.item() - expected.item()) <= 1e-10 * max(1, abs(expected.item()))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * max(1, theirs.abs().max())


def test_the_loss_is_the_weighted_sum_of_its_terms():
    z_a, z_b = embeddings(32, 20)
    for method in ("dense", "gram", "columns"):
        on_diagonal, off_diagonal = correlation_terms(z_a, z_b, method=method)
        loss = barlow_twins_loss(z_a, z_b, lambd=0.1, method=method)
        assert torch.allclose(on_diagonal + 0.1 * off_diagonal, loss, rtol=1e-14)
        assert torch.allclose(on_diagonal, oracle(z_a, z_b, 0.0), rtol=1e-12)


@pytest.mark.parametrize("n,d", [(2, 400), (3, 400), (32, 512), (256, 512)])
def test_correlations_of_independent_dimensions_have_the_documented_variance(n, d):
    """1 / (n - 1), as docs/small-data.md says of the first loss."""
    generator = torch.Generator().manual_seed(n)
    z_a, z_b = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    on_diagonal, off_diagonal = correlation_terms(z_a, z_b)
    assert off_diagonal.item() == pytest.approx(d * (d - 1) / (n - 1), rel=0.02)
    assert on_diagonal.item() == pytest.approx(d * (1 + 1 / (n - 1)), rel=0.15)


def test_half_precision_embeddings_are_computed_in_float32():
    z_a, z_b = (z.detach().bfloat16() for z in embeddings(32, 64))
    for method in ("dense", "gram", "columns"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = barlow_twins_loss(z_a, z_b, method=method)
        assert loss.dtype == torch.float32
        expected = oracle(z_a.double(), z_b.double(), 5e-3)
        assert abs(loss.item() / expected.item() - 1) < 1e-5


def test_auto_selects_the_faster_method():
    assert choose_method(2048, 8192) == choose_method(2048, 8192, world_size=32) == "gram"
    assert choose_method(65_536, 512) == "dense"
    assert choose_method(65_536, 512, world_size=8) == "columns"


@pytest.mark.parametrize(
    "shape_a,shape_b,message",
    [((4, 3), (4, 2), "same shape"), ((4,), (4,), r"\[n, D\]"), ((1, 3), (1, 3), "two samples")],
)
def test_wrong_shapes_are_refused(shape_a, shape_b, message):
    with pytest.raises(ValueError, match=message):
        barlow_twins_loss(torch.zeros(shape_a), torch.zeros(shape_b))
