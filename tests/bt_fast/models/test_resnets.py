"""The ResNets' forward pass against torchvision's, and the projector."""

import pytest
import torch
from torch import nn
from torchvision import models

from bt_fast.config import Config
from bt_fast.models.networks import ARCHITECTURES, BarlowTwins, build_encoder


def pair(name: str, per_view: bool, stem="imagenet"):
    """Our encoder and torchvision's, with the same float64 weights; no norm's weight is zero."""
    ours = build_encoder(name, per_view=per_view, stem=stem).double()
    for layer in ours.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    theirs = getattr(models, name)().double()
    theirs.fc = nn.Identity()
    if stem == "cifar":
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.double().load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,stem", [*((name, "imagenet") for name in ARCHITECTURES), ("resnet18", "cifar")]
)
def test_features_and_gradients_equal_torchvisions_for_each_view(name, stem):
    torch.manual_seed(0)
    ours, theirs = pair(name, True, stem)
    views = torch.randn(6, 3, 40, 40, dtype=torch.float64)
    weights = torch.randn(6, 1, dtype=torch.float64)
    features = ours(views)
    (features * weights).sum().backward()
    expected = torch.cat([theirs(view) for view in views.chunk(2)])
    (expected * weights).sum().backward()
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        scale = gradients[key].grad.abs().max()
        difference = (parameter.grad - gradients[key].grad).abs().max()
        assert difference <= 1e-10 * scale, key
    for (key, value), expected in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10, msg=key)
    with torch.no_grad():
        features = ours.eval()(views)
        torch.testing.assert_close(features, theirs.eval()(views), rtol=1e-10, atol=1e-10)


def test_with_torchs_batch_norm_features_equal_torchvisions_bit_for_bit():
    ours, theirs = pair("resnet18", False)
    images = torch.randn(4, 3, 40, 40, dtype=torch.float64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_initialisation_equals_torchvisions(name):
    torch.manual_seed(3)
    ours = build_encoder(name).state_dict()
    torch.manual_seed(3)
    theirs = getattr(models, name)(zero_init_residual=True)
    theirs.fc = nn.Identity()
    assert list(ours) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.values(), theirs.state_dict().values()))


def test_projector_matches_the_paper():
    model = BarlowTwins(Config())
    layers = [type(layer).__name__ for layer in model.projector]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in model.projector if hasattr(layer, "in_features"))
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 151_027_712


@pytest.mark.parametrize("zero_init", [True, False])
def test_residual_branches_start_at_zero_on_request(zero_init):
    config = Config(encoder="resnet18", projector=(8,), zero_init=zero_init)
    encoder = BarlowTwins(config).encoder
    last = [module.bn2.weight for module in encoder.modules() if hasattr(module, "bn2")]
    assert len(last) == 8 and all((weight == (0 if zero_init else 1)).all() for weight in last)
