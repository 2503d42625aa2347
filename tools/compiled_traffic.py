"""Bytes and kernels of a compiled training step on an H100, counted without one.

    python tools/compiled_traffic.py --blocks 1 1 1 1 [--images 256] [--ranks 8] [--norm fused]

Lowers forward and backward pass of encoder and projector, with views in bf16 and channels-last,
without loss, augmentation and optimizer. `lowering` documents the method and the counts. The
numbers are valid for the installed version of torch. ResNet-50 takes minutes.
"""

import _checkout  # noqa: F401  # isort: skip

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bt_fast.models import networks as models
from bt_fast.models.batch_norm import choose_norm, fuse
from pipelines.common.flags import parse_flags
from tools.lowering import Traffic, Unsupported, build, measure


@dataclass(frozen=True, kw_only=True)
class Options:
    """Bytes and kernels of a compiled training step on an H100, counted without one."""

    encoder: models.Encoder = "resnet50"
    """Encoder to compile. ResNet-50 takes minutes."""
    blocks: tuple[int, int, int, int] | None = None
    """Bottlenecks per stage, instead of --encoder; 1 1 1 1 is quick."""
    images: int = 256
    """Number of images per rank and step, with two views each."""
    size: int = 224
    """Side of a view, pixels."""
    ranks: int = 1
    """Number of ranks with common batch statistics."""
    norm: Literal["compiled", "fused"] = "compiled"
    """Implementation of batch norm, as --norm of pretrain."""
    top: int = 20
    """Number of kernels to list, the largest first."""
    out: Path | None = None
    """Folder for the generated code."""

    def __post_init__(self) -> None:
        for name, least in {"images": 2, "size": 32, "ranks": 1, "top": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.blocks and min(self.blocks) < 1:
            raise ValueError(f"--blocks {' '.join(map(str, self.blocks))}: must be at least 1")
        if self.blocks and self.encoder != "resnet50":
            raise ValueError("--blocks replaces --encoder; leave one of them out")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is not a folder")


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse_flags(Options, "compiled_traffic", arguments)
        shape = (2 * options.images, 3, options.size, options.size)
        model = build(options.encoder, options.blocks)
        if choose_norm(options.norm, torch.device("cuda")) == "fused":
            fuse(model)
        traffic = measure(model, shape, num_ranks=options.ranks, out=options.out)
    except (ValueError, Unsupported) as error:
        print(f"compiled_traffic: {error}", file=sys.stderr)
        return 2
    print(report(traffic, options.top))
    return 0


def report(traffic: Traffic, top: int) -> str:
    """The counts of a step by pass, and its largest kernels."""
    rows = {
        "fused and custom kernels": ("fused", "custom"),
        "  custom kernels": ("custom",),
        "convolutions, matrix products": ("library",),
        "all of these": ("fused", "custom", "library"),
        "collectives": ("collective",),
    }
    lines = [f"{'GB':30} {'number':>7} {'< 1 MB':>7}  forward backward     both  arguments once"]
    for title, names in rows.items():
        kernels = traffic.of(*names)
        small = sum(kernel.accesses < 1e6 for kernel in kernels)
        passes = [traffic.gigabytes(*names, backward=backward) for backward in (False, True, None)]
        figures = " ".join(f"{figure:8.3f}" for figure in passes)
        once = traffic.gigabytes(*names, once=True)
        lines.append(f"{title:30} {len(kernels):7} {small:7} {figures} {once:15.3f}")
    lines.append(f"saved for the backward pass: {traffic.saved / 1e9:.2f} GB")
    for kernel in sorted(traffic.of(), key=lambda kernel: -kernel.accesses)[:top]:
        direction = "backward" if kernel.backward else "forward"
        sizes = f"{kernel.accesses / 1e6:6.0f} MB ({kernel.once / 1e6:.0f} once)"
        lines.append(f"{sizes} {direction} {kernel.name}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
