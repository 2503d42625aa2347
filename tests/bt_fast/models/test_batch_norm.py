"""Batch norm of two views in one call against torch's, called once per view."""

import pytest
import torch
from conftest import with_torchs_batch_norm
from ranks import run_ranks
from torch import nn

from bt_fast.config import Config
from bt_fast.models import batch_norm
from bt_fast.models.networks import BarlowTwins


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def max_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the largest value; absolute if all values are zero."""
    return ((ours - theirs).abs().max() / (theirs.abs().max() or 1)).item()


def native(layer, x: torch.Tensor) -> torch.Tensor:
    """A layer's forward pass with torch's kernels: not compiled, on a single rank."""
    return layer(x)


def explicit(layer, x: torch.Tensor) -> torch.Tensor:
    """The forward pass with `normalise`, the function that is compiled."""
    y, mean, variance, count = batch_norm.normalise(x, layer.weight, layer.bias, eps=layer.eps)
    values = x.detach().to(mean.dtype).unflatten(0, (2, -1)).transpose(1, 2).flatten(2)
    assert count == values.shape[2]
    assert torch.allclose(mean, values.mean(2), rtol=1e-5, atol=1e-5)
    assert torch.allclose(variance, values.var(2, correction=0), rtol=1e-5)
    return y


def traced(layer, x: torch.Tensor) -> torch.Tensor:
    """The forward pass as the compiler traces it."""
    compiled = torch.compile(layer, backend="aot_eager", dynamic=False, fullgraph=True)
    return compiled(x)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("forward", [native, explicit, traced])
@pytest.mark.parametrize("shape", [(12, 5, 6, 7), (12, 5), (12, 3, 1, 1)])
def test_one_call_equals_two(forward, shape, dtype, tolerance):
    name = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d"
    torch.manual_seed(0)
    ours, theirs = (getattr(module, name)(shape[1]).to(dtype) for module in (batch_norm, nn))
    weight = torch.randn(shape[1], dtype=dtype)
    for layer in (ours, theirs):
        nn.init.constant_(layer.bias, 0.5)
        layer.weight.data.copy_(weight)
    offsets = torch.linspace(-5, 5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    for _ in range(2):
        x = (torch.randn(shape) * 3 + offsets).to(dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = forward(ours, a)
        expected = torch.cat([theirs(half) for half in b.chunk(2)]).relu()
        gradient = torch.randn_like(out)
        torch.relu_(out).backward(gradient)  # in place, as in a network
        expected.backward(gradient)
        assert max_difference(out, expected) < tolerance
        assert max_difference(a.grad, b.grad) < tolerance
        assert max_difference(ours.weight.grad, theirs.weight.grad) < tolerance
        assert max_difference(ours.bias.grad, theirs.bias.grad) < tolerance


@pytest.mark.parametrize("compiled", [False, True])
def test_a_single_layer_updates_its_statistics_in_the_forward_pass(compiled):
    torch.manual_seed(0)
    ours, theirs = batch_norm.BatchNorm2d(5, momentum=0.3), nn.BatchNorm2d(5, momentum=0.3)
    forward = torch.compile(ours, backend="eager", dynamic=False) if compiled else ours
    for _ in range(2):
        x = torch.randn(12, 5, 3, 3) * 3 + 1
        forward(x)
        for half in x.chunk(2):
            theirs(half)
    ours.eval(), theirs.eval()
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 4
    for name in ("running_mean", "running_var"):
        assert close(getattr(ours, name), getattr(theirs, name))
    assert close(ours(x[:3]), theirs(x[:3]))


def test_statistics_of_a_model_are_updated_together_or_not_at_all():
    torch.manual_seed(0)
    model = BarlowTwins(Config(encoder="resnet18", projector=(16, 16)))
    reference = with_torchs_batch_norm(model)
    statistics = batch_norm.RunningStatistics(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    views = torch.randn(8, 3, 32, 32)
    for applied in (False, True):
        model(views)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        statistics.update(torch.tensor(applied))
    for half in views.chunk(2):
        reference(half)
    for name, value in reference.state_dict().items():
        assert close(model.state_dict()[name].float(), value.float()), name


@pytest.mark.slow
def test_variance_over_ranks_is_exact_for_a_large_mean():
    """In float32, mean square - squared mean would lose all digits of a variance of 1."""
    for variance, count in run_ranks(2, variance_with_a_large_mean):
        assert variance == pytest.approx(1.25, rel=1e-3) and count == 8


def variance_with_a_large_mean(world) -> tuple[float, int]:
    x = 4096 + torch.arange(8.0).view(2, 4).repeat(1, 2)[:, 4 * world.rank :][:, :4].reshape(8, 1)
    ones, zeros = torch.ones(1), torch.zeros(1)
    _, _, variance, count = batch_norm.normalise(x, ones, zeros, eps=1e-5, group=world.group)
    return variance[0, 0].item(), count


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="two views of every image, got 5 rows"):
        batch_norm.BatchNorm1d(3)(torch.randn(5, 3))
