"""Encoder, projector and the flat running statistics."""

import pytest
import torch

from bt_fast.models.batch_norm import RunningStatistics
from bt_fast.models.networks import BarlowTwins, build_encoder, build_projector, feature_width


@pytest.mark.parametrize("name,width", [("resnet18", 512), ("resnet50", 2048)])
def test_encoder_returns_its_pooled_features(name, width):
    encoder = build_encoder(name).eval()
    assert feature_width(encoder) == width
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, width)


def test_residual_branches_start_at_zero():
    encoder = build_encoder("resnet50")
    assert all((block.bn3.weight == 0).all() for block in encoder.layer3)


def test_projector_matches_the_paper():
    model = BarlowTwins("resnet50", (8192, 8192, 8192))
    layers = [type(layer).__name__ for layer in model.projector]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in model.projector if hasattr(layer, "in_features"))
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 151_027_712


def test_projector_applies_relu_only_where_it_has_one():
    layers = build_projector((8, 8, 8))
    x = torch.randn(6, 8)
    assert (layers[:2](x) < 0).any()
    expected = torch.nn.Sequential(*layers)(x)
    assert torch.equal(layers(x), expected)


def test_small_images_keep_their_resolution():
    encoder = build_encoder("resnet18", small_images=True)
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 64, 32, 32)]


def test_flat_statistics_share_memory_with_the_models_buffers():
    model = BarlowTwins("resnet18", (16, 16))
    running = RunningStatistics(model).running
    running[:64] = 3
    assert (model.state_dict()["encoder.bn1.running_mean"] == 3).all()
    assert (model.encoder.bn1.running_var == 1).all()


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="vgg16"):
        build_encoder("vgg16")
