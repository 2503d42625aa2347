"""Values of flags: torch-free, so that --help needs no torch."""

from typing import Literal

from pipelines.loading import LoaderName as LoaderName

RecipeName = Literal["imagenet", "imagenet-8gpu", "imagenet-vit", "cifar10", "cifar10-cpu", "demo"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]
Compile = Literal["auto", "off", "default", "reduce-overhead", "max-autotune"]
Norm = Literal["auto", "compiled", "fused"]
Encoder = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2"]
Stem = Literal[
    "imagenet", "cifar", "solo-learn", "3x3-maxpool", "3x3-stride2", "3x3-stride2-maxpool"
]
OptimizerName = Literal["lars", "adamw", "sgd"]
Tracker = Literal["none", "wandb"]
Objective = Literal[
    "barlow-twins",
    "redundancy-only",
    "feature-norm",
    "covariance",
    "cross-entropy",
    "auto-correlation",
    "imax",
]


def is_of_library(encoder: str) -> bool:
    """Whether an encoder's name is timm/NAME or torchvision/NAME."""
    return encoder.startswith(("timm/", "torchvision/"))
