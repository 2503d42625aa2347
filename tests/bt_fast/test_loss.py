"""The loss against an independent float64 oracle: values and gradients of all methods."""

import pytest
import torch

from bt_fast.loss import barlow_twins_loss, choose_method, correlation_terms


def oracle(z_a: torch.Tensor, z_b: torch.Tensor, lambd: float) -> torch.Tensor:
    """The paper's pseudo-code, element by element; shares nothing with the implementation."""
    norm = torch.nn.BatchNorm1d(z_a.shape[1], affine=False, dtype=z_a.dtype)
    correlation = torch.einsum("ni,nj->ij", norm(z_a), norm(z_b)) / z_a.shape[0]
    target = torch.eye(z_a.shape[1], dtype=z_a.dtype)
    weight = target + lambd * (1 - target)
    return (weight * (correlation - target) ** 2).sum()


def embeddings(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated, shifted and unevenly scaled float64 embeddings, like those of a network."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, d, dtype=torch.float64, generator=generator)
    scale = torch.logspace(-2, 2, d, dtype=torch.float64)
    views = []
    for _ in range(2):
        noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
        views.append(((shared + 0.7 * noise) * scale + 3).requires_grad_())
    return views[0], views[1]


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


def test_gradients_pass_gradcheck():
    z_a, z_b = embeddings(6, 9)
    for method in ("dense", "gram", "columns"):
        assert torch.autograd.gradcheck(
            lambda a, b, m=method: barlow_twins_loss(a, b, method=m), (z_a, z_b)
        )


def test_the_loss_is_the_weighted_sum_of_its_terms():
    z_a, z_b = embeddings(32, 20)
    for method in ("dense", "gram", "columns"):
        on_diagonal, off_diagonal = correlation_terms(z_a, z_b, method=method)
        loss = barlow_twins_loss(z_a, z_b, lambd=0.1, method=method)
        assert torch.allclose(on_diagonal + 0.1 * off_diagonal, loss, rtol=1e-14)
        assert torch.allclose(on_diagonal, oracle(z_a, z_b, 0.0), rtol=1e-12)


def test_loss_is_invariant_to_a_shift_of_every_dimension():
    z_a, z_b = embeddings(64, 8)
    shifted = barlow_twins_loss(z_a * 1000 + 5, z_b * 1000 - 7)
    assert torch.allclose(shifted, barlow_twins_loss(z_a * 1000, z_b * 1000), rtol=1e-9)


def test_the_loss_of_identical_decorrelated_views_is_zero():
    z = torch.linalg.qr(torch.randn(64, 9, dtype=torch.float64))[0]
    z = torch.linalg.qr(z - z.mean(0))[0] * 1000
    assert barlow_twins_loss(z, z).item() < 1e-6


def test_half_precision_embeddings_are_computed_in_float32():
    z_a, z_b = (z.detach().bfloat16() for z in embeddings(32, 64))
    for method in ("dense", "gram", "columns"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = barlow_twins_loss(z_a, z_b, method=method)
        assert loss.dtype == torch.float32
        expected = oracle(z_a.double(), z_b.double(), 5e-3)
        assert abs(loss.item() / expected.item() - 1) < 1e-5


def test_auto_selects_the_faster_method():
    assert choose_method(256, 8192) == "gram"
    assert choose_method(6144, 8192) == "gram"  # 8 N^2 D = 6 N D^2
    assert choose_method(6145, 8192) == "dense"
    assert choose_method(2048, 8192, world_size=32) == "gram"
    assert choose_method(65_536, 512, world_size=8) == "columns"


@pytest.mark.parametrize(
    "shape_a,shape_b,message",
    [((4, 3), (4, 2), "same shape"), ((4,), (4,), r"\[n, D\]"), ((1, 3), (1, 3), "two samples")],
)
def test_wrong_shapes_are_refused(shape_a, shape_b, message):
    with pytest.raises(ValueError, match=message):
        barlow_twins_loss(torch.zeros(shape_a), torch.zeros(shape_b))


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method"):
        barlow_twins_loss(torch.randn(4, 3), torch.randn(4, 3), method="fast")
