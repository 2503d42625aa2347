"""Batch norm of two views in one call against torch's, called once per view."""

import copy

import pytest
import torch
from conftest import with_torchs_batch_norm
from ranks import run_ranks
from torch import nn

from bt_fast import norm
from bt_fast.model import BarlowTwins


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["forward", "_arithmetic"])
@pytest.mark.parametrize("shape", [(12, 5, 6, 7), (12, 5), (4, 3, 1, 1)])
def test_one_call_equals_two(method, shape):
    kinds = (
        (norm.BatchNorm2d, nn.BatchNorm2d)
        if len(shape) == 4
        else (norm.BatchNorm1d, nn.BatchNorm1d)
    )
    torch.manual_seed(0)
    ours, theirs = (kind(shape[1], momentum=0.3) for kind in kinds)
    weight = torch.randn(shape[1])
    for layer in (ours, theirs):
        nn.init.constant_(layer.bias, 0.5)
        layer.weight.data.copy_(weight)
    for _ in range(2):
        x = torch.randn(shape) * 3 + torch.linspace(-5, 5, shape[0]).view(
            -1, *[1] * (len(shape) - 1)
        )
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out = getattr(ours, method)(a)
        expected = torch.cat([theirs(half) for half in b.chunk(2)])
        gradient = torch.randn_like(out)
        out.backward(gradient)
        expected.backward(gradient)
        assert close(out, expected) and close(a.grad, b.grad)
        assert close(ours.weight.grad, theirs.weight.grad)
        assert close(ours.bias.grad, theirs.bias.grad)
    for name in ("running_mean", "running_var"):
        assert close(getattr(ours, name), getattr(theirs, name))
    ours.eval(), theirs.eval()
    assert torch.equal(
        ours(x[:3]),
        nn.functional.batch_norm(
            x[:3], ours.running_mean, ours.running_var, ours.weight, ours.bias, eps=ours.eps
        ),
    )


def test_the_arithmetic_keeps_dtype_and_memory_order():
    layer = norm.BatchNorm2d(4)
    x = torch.randn(6, 4, 5, 5).to(torch.bfloat16, memory_format=torch.channels_last)
    out = layer._arithmetic(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_an_odd_batch_is_refused():
    with pytest.raises(ValueError, match="two views of every image, got 5 rows"):
        norm.BatchNorm1d(3)(torch.randn(5, 3))


def test_the_model_equals_two_calls_of_the_plain_one():
    torch.manual_seed(0)
    ours = BarlowTwins("resnet18", (24, 24))
    theirs = with_torchs_batch_norm(ours)
    views = torch.randn(8, 3, 32, 32)
    z = ours(views)
    expected = torch.cat([theirs(half) for half in views.chunk(2)])
    assert torch.allclose(z, expected, rtol=1e-3, atol=1e-4)
    z.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-5
    state, other = ours.state_dict(), theirs.state_dict()
    assert state.keys() == other.keys()
    assert all(close(state[name].float(), other[name].float()) for name in state)


def test_checkpoints_fit_torchs_layers():
    ours = norm.BatchNorm2d(3)
    theirs = nn.BatchNorm2d(3)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))


COUNTS = (5, 2, 0)  # samples of each rank


def uneven_batch() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(torch's layer, a batch of one view, the gradient of what comes out), in float64."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(sum(COUNTS), 4, 3, 3, dtype=torch.float64) for _ in range(2))
    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    nn.init.normal_(model[0].weight)
    return model, x + torch.arange(7).view(7, 1, 1, 1), gradient


def results(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor):
    """([output, gradients of input, weight and bias], what the layer remembers)."""
    x = x.detach().requires_grad_()
    out = model(x)
    out.backward(gradient)
    return [out.detach(), x.grad, model[0].weight.grad, model[0].bias.grad], model.state_dict()


def uneven_layer(world):
    """Of a rank that holds its part of the batch."""
    model, *batch = uneven_batch()
    norm.over_uneven_ranks(model, world.group)
    return results(model, *(part.split(COUNTS)[world.rank] for part in batch))


def test_ranks_with_more_samples_than_others_normalise_as_one():
    expected, state = results(*uneven_batch())
    found = run_ranks(3, uneven_layer)
    for number, value in enumerate(expected):
        parts = [tensors[number] for tensors, _ in found]
        whole = torch.cat(parts) if number < 2 else sum(parts)
        assert torch.allclose(whole, value, rtol=1e-9, atol=1e-12)
    for _, theirs in found:
        assert theirs.keys() == state.keys()
        assert all(torch.allclose(theirs[name].double(), state[name].double()) for name in state)
