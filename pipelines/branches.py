"""Augmentation settings of the paper's two views. Does not import torch, so that --help is fast."""

import math
from dataclasses import dataclass

MAX_SIGMA = 2.0  # of the Gaussian blur, pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """Augmentations of one view after the crop. The defaults are the paper's.

    `bt-fast pretrain --help` has the unit of each field, under `--view-a`.
    """

    blur: float
    """Probability of Gaussian blur."""
    solarize: float
    """Probability of solarization."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Range of the brightness factor: [1 - brightness, 1 + brightness]."""
    contrast: float = 0.4
    """Range of the contrast factor: [1 - contrast, 1 + contrast]."""
    saturation: float = 0.2
    """Range of the saturation factor: [1 - saturation, 1 + saturation]."""
    hue: float = 0.1
    """Range of the hue shift: [-hue, hue], in turns of the colour wheel."""
    grayscale: float = 0.2
    """Probability of conversion to grayscale."""
    sigma: tuple[float, float] = (0.1, MAX_SIGMA)
    """Range of the blur's standard deviation, pixels."""

    def __post_init__(self) -> None:
        for name in ("blur", "solarize", "flip", "jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be a probability in [0, 1], got {getattr(self, name)}"
                )
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {self.hue}")
        if not 0 < self.sigma[0] <= self.sigma[1] <= MAX_SIGMA:
            raise ValueError(f"sigma must lie in (0, {MAX_SIGMA}], got {self.sigma}")


VIEW_A = Branch(blur=1.0, solarize=0.0)
VIEW_B = Branch(blur=0.1, solarize=0.2)
