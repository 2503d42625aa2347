"""The paper's ablations: named changes to a recipe, with the paper's results.

An ablation applies to any recipe, on CIFAR-10 as on ImageNet: `bt-fast pretrain --recipe cifar10
--ablation no-projector-bn`. The results are linear top-1 on ImageNet of ResNet-50 after 300 epochs
at batch size 2048 (section 4); those the paper only plots or mentions are left out.
`tools/ablate.py` runs complete grids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bt_fast.config import Config

# By batch size: the learning rate of the weights that the authors found best on ImageNet at 300
# epochs, and its top-1 (github.com/facebookresearch/barlowtwins, issue 7).
BATCH_SIZES = {
    128: (0.7, 69.7),
    256: (0.4, 70.7),
    512: (0.3, 71.4),
    1024: (0.25, 71.7),
    2048: (0.2, 71.4),
    4096: (0.2, 70.7),
}


@dataclass(frozen=True, slots=True)
class Ablation:
    """A change to a recipe, and the paper's top-1 with it, percent."""

    summary: str
    change: Callable[[Config], Config]
    top1: float | None = None


def _set_views(config: Config, **changes: Any) -> Config:
    """The same changes in both views."""
    view_a, view_b = (replace(view, **changes) for view in (config.view_a, config.view_b))
    return replace(config, view_a=view_a, view_b=view_b)


def _set_batch_size(config: Config, *, size: int) -> Config:
    """Change the batch size, and the learning rates by the ratio of the authors' rates."""
    if config.batch_size not in BATCH_SIZES:
        raise ValueError(f"the authors give no learning rate for batch size {config.batch_size}")
    ratio = BATCH_SIZES[size][0] / BATCH_SIZES[config.batch_size][0]
    rates = (round(rate * ratio, 8) for rate in (config.lr_weights, config.lr_biases))
    lr_weights, lr_biases = rates
    return replace(config, batch_size=size, lr_weights=lr_weights, lr_biases=lr_biases)


def _set_width(config: Config, *, width: int) -> Config:
    """Change all layers, as the authors did for figure 4 (issue 48 of their code)."""
    return replace(config, projector=(width,) * len(config.projector))


def _set_last_width(config: Config, *, width: int) -> Config:
    """Change the last layer only: three layers of 65,536 would have 8.7 billion weights."""
    return replace(config, projector=(*config.projector[:-1], width))


def _set_depth(config: Config, *, depth: int) -> Config:
    return replace(config, projector=(config.projector[-1],) * depth)


_BASELINE = 71.4

ABLATIONS: dict[str, Ablation] = {
    "baseline": Ablation("the recipe as it is", replace, _BASELINE),
    # Table 5
    "invariance-only": Ablation("on-diagonal term, --lambd 0", partial(replace, lambd=0.0), 57.3),
    "redundancy-only": Ablation(
        "off-diagonal term", partial(replace, objective="redundancy-only"), 0.1
    ),
    "feature-norm": Ablation(
        "embeddings also normalised to length 1", partial(replace, objective="feature-norm"), 69.8
    ),
    "no-projector-bn": Ablation(
        "no projector batch norm", partial(replace, projector_norm=False), 71.2
    ),
    "no-normalisation": Ablation(
        "no projector batch norm, cross-covariance in the loss",
        partial(replace, projector_norm=False, objective="covariance"),
        53.4,
    ),
    "cross-entropy": Ablation(
        "cross-entropy, temperature 0.1, lambda 1",
        partial(replace, objective="cross-entropy", temperature=0.1, lambd=1.0),
        63.3,
    ),
    # Table 6
    "stop-gradient": Ablation(
        "stop-gradient on view B", partial(replace, stop_gradient=True), 70.5
    ),
    "predictor": Ablation("predictor on view A", partial(replace, predictor=True), 70.2),
    "predictor-stop-gradient": Ablation(
        "predictor on view A, stop-gradient on view B",
        partial(replace, predictor=True, stop_gradient=True),
        61.3,
    ),
    # Figure 2
    **{
        f"batch-{size}": Ablation(
            f"batch size {size}, {rate / BATCH_SIZES[2048][0]:g} times the rate of 2048",
            partial(_set_batch_size, size=size),
            top1,
        )
        for size, (rate, top1) in BATCH_SIZES.items()
    },
    # Figure 3, cumulative
    "no-grayscale": Ablation("no grayscale", partial(_set_views, grayscale=0.0)),
    "no-colour": Ablation(
        "no grayscale or colour jitter", partial(_set_views, grayscale=0.0, jitter=0.0)
    ),
    "crop-blur": Ablation(
        "crop and blur only",
        partial(_set_views, grayscale=0.0, jitter=0.0, flip=0.0, solarize=0.0),
    ),
    "crop": Ablation(
        "crop only",
        partial(_set_views, grayscale=0.0, jitter=0.0, flip=0.0, solarize=0.0, blur=0.0),
    ),
    # Figure 4: 16 to 16,384
    **{
        f"width-{width}": Ablation(
            f"width {width} of every projector layer",
            partial(_set_width, width=width),
            _BASELINE if width == 8192 else None,
        )
        for width in (2**k for k in range(4, 15))
    },
    **{
        f"last-width-{width}": Ablation(
            f"width {width} of the last projector layer", partial(_set_last_width, width=width)
        )
        for width in (32_768, 65_536)
    },
    **{
        f"depth-{depth}": Ablation(
            f"{depth} layer{'s' if depth > 1 else ''} in the projector",
            partial(_set_depth, depth=depth),
            _BASELINE if depth == 3 else None,
        )
        for depth in (1, 2, 3, 4)
    },
    # Discussion
    "auto-correlation": Ablation(
        "off-diagonal auto-correlations", partial(replace, objective="auto-correlation")
    ),
    "imax": Ablation("IMAX, lambda 1", partial(replace, objective="imax", lambd=1.0)),
}


def _between(first: str, last: str) -> tuple[str, ...]:
    """The baseline and the ablations from first to last."""
    names = list(ABLATIONS)
    return ("baseline", *names[names.index(first) : names.index(last) + 1])


GRIDS: dict[str, tuple[str, ...]] = {
    "table5": _between("invariance-only", "cross-entropy"),
    "table6": _between("stop-gradient", "predictor-stop-gradient"),
    "figure2": _between("batch-128", "batch-4096")[1:],
    "figure3": _between("no-grayscale", "crop"),
    "figure4": _between("width-16", "last-width-65536")[1:],
    "figure4-depth": _between("depth-1", "depth-4")[1:],
    "discussion": _between("auto-correlation", "imax"),
}


def ablate(recipe: Config, name: str) -> Config:
    """The recipe with a named change. Raises ValueError for an unknown name."""
    if name not in ABLATIONS:
        raise ValueError(f"--ablation {name} is not one of {', '.join(ABLATIONS)}")
    return replace(ABLATIONS[name].change(recipe), ablation=name)
