"""Projector, and the encoder of small images."""

import torch

from bt_fast.models.networks import BarlowTwins, build_encoder


def test_projector_matches_the_paper():
    model = BarlowTwins("resnet50", (8192, 8192, 8192))
    layers = [type(layer).__name__ for layer in model.projector]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert all(layer.bias is None for layer in model.projector if hasattr(layer, "in_features"))
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 151_027_712


def test_small_images_keep_their_resolution():
    encoder = build_encoder("resnet18", stem="cifar")
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 64, 32, 32)]
