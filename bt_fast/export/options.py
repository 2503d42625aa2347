"""Flags of `bt-fast export`: torch-free, so that --help needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bt_fast.choices import Stem

Target = Literal["torchvision", "timm", "detectron2", "safetensors", "onnx"]

SUFFIXES: dict[Target, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt"),
    "timm": (".pth", ".pt"),
    "detectron2": (".pth",),  # it reads a .pkl as a pickle of arrays
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsOptions:
    """Flags of every command that reads an encoder."""

    which: str | None = None
    """ResNet of a file that holds several, such as teacher, encoder_q or momentum_backbone."""
    stem: Stem | None = None
    """Stride, padding and max-pool of a 3x3 stem, for a file that does not record them. cifar:
    stride 1, padding 1, no max-pool; solo-learn: padding 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export(WeightsOptions):
    """Write an encoder in the format of another library."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Folder of a pretraining run, or a file of weights."""
    to: Target
    """Library or format to write for."""
    out: Path
    """File to write."""
    overwrite: bool = False
    """Permission to replace an existing file."""
