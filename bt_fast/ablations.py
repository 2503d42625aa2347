"""The paper's ablations: named changes to a recipe, and what the paper found.

An ablation changes any recipe, so that it can be tried on CIFAR-10 as on ImageNet: `bt-fast
pretrain --recipe cifar10 --ablation no-projector-bn`. The paper's figures are linear top-1 and
top-5 on ImageNet, of ResNet-50 after 300 epochs at batch 2048 (section 4); what it only plots or
mentions has no figures here. `tools/ablate.py` runs whole grids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bt_fast.config import Config

# Learning rates of the weights the authors found best per batch, on ImageNet at 300 epochs, and
# the top-1 they gave (github.com/facebookresearch/barlowtwins, issue 7).
BATCHES = {
    128: (0.7, 69.7),
    256: (0.4, 70.7),
    512: (0.3, 71.4),
    1024: (0.25, 71.7),
    2048: (0.2, 71.4),
    4096: (0.2, 70.7),
}
WIDTHS = tuple(2**k for k in range(4, 15))  # figure 4: 16 to 16,384


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """A change to a recipe, and the paper's figures for it, percent."""

    what: str
    change: Callable[[Config], Config]
    top1: float | None = None
    top5: float | None = None


def _set(**changes: Any) -> Callable[[Config], Config]:
    return lambda config: replace(config, **changes)


def _branches(**changes: Any) -> Callable[[Config], Config]:
    """The same change of both views' branches."""
    return lambda config: replace(
        config,
        view_a=replace(config.view_a, **changes),
        view_b=replace(config.view_b, **changes),
    )


def _batch(config: Config, *, size: int) -> Config:
    """Another batch. The recipe's rates change by as much as the authors' do between the two."""
    if config.batch_size not in BATCHES:
        raise ValueError(f"the authors give no learning rate for batch {config.batch_size}")
    ratio = BATCHES[size][0] / BATCHES[config.batch_size][0]
    rates = (round(rate * ratio, 8) for rate in (config.lr_weights, config.lr_biases))
    lr_weights, lr_biases = rates
    return replace(config, batch_size=size, lr_weights=lr_weights, lr_biases=lr_biases)


def _width(config: Config, *, width: int) -> Config:
    """All layers: so was figure 4 made (issue 48 of the authors' code)."""
    return replace(config, projector=(width,) * len(config.projector))


def _last_width(config: Config, *, width: int) -> Config:
    """The last layer only: three layers of 65,536 would have 8.7 billion weights."""
    return replace(config, projector=(*config.projector[:-1], width))


def _depth(config: Config, *, depth: int) -> Config:
    return replace(config, projector=(config.projector[-1],) * depth)


_BASELINE = {"top1": 71.4, "top5": 90.2}

ABLATIONS: dict[str, Ablation] = {
    "baseline": Ablation(what="the recipe as it is", change=_set(), **_BASELINE),
    # Table 5
    "invariance-only": Ablation(
        what="on-diagonal term only: --lambd 0", change=_set(lambd=0.0), top1=57.3, top5=80.5
    ),
    "redundancy-only": Ablation(
        what="off-diagonal term only",
        change=_set(objective="redundancy-only"),
        top1=0.1,
        top5=0.5,
    ),
    "feature-norm": Ablation(
        what="embeddings also brought to length 1",
        change=_set(objective="feature-norm"),
        top1=69.8,
        top5=88.8,
    ),
    "no-projector-bn": Ablation(
        what="no batch norm in the projector",
        change=_set(projector_norm=False),
        top1=71.2,
        top5=89.7,
    ),
    "no-normalisation": Ablation(
        what="nor in the loss: cross-covariance",
        change=_set(projector_norm=False, objective="covariance"),
        top1=53.4,
        top5=76.7,
    ),
    "cross-entropy": Ablation(
        what="cross-entropy, temperature 0.1, lambda 1",
        change=_set(objective="cross-entropy", temperature=0.1, lambd=1.0),
        top1=63.3,
        top5=85.7,
    ),
    # Table 6
    "stop-gradient": Ablation(
        what="no gradient through view B", change=_set(stop_gradient=True), top1=70.5, top5=89.0
    ),
    "predictor": Ablation(
        what="two more layers behind view A", change=_set(predictor=True), top1=70.2, top5=89.0
    ),
    "predictor-stop-gradient": Ablation(
        what="both", change=_set(predictor=True, stop_gradient=True), top1=61.3, top5=83.5
    ),
    # Figure 2
    **{
        f"batch-{size}": Ablation(
            what=f"batch {size}, rate x {rate / BATCHES[2048][0]:g} of batch 2048's",
            change=partial(_batch, size=size),
            top1=top1,
        )
        for size, (rate, top1) in BATCHES.items()
    },
    # Figure 3: one after another
    "no-grayscale": Ablation(what="no grayscale", change=_branches(grayscale=0.0)),
    "no-colour": Ablation(what="nor colour jitter", change=_branches(grayscale=0.0, jitter=0.0)),
    "crop-blur": Ablation(
        what="crop and blur only",
        change=_branches(grayscale=0.0, jitter=0.0, flip=0.0, solarize=0.0),
    ),
    "crop": Ablation(
        what="crop only",
        change=_branches(grayscale=0.0, jitter=0.0, flip=0.0, solarize=0.0, blur=0.0),
    ),
    # Figure 4
    **{
        f"width-{width}": Ablation(
            what=f"every layer of the projector {width} wide",
            change=partial(_width, width=width),
            **(_BASELINE if width == 8192 else {}),
        )
        for width in WIDTHS
    },
    **{
        f"last-width-{width}": Ablation(
            what=f"the last layer of the projector {width} wide",
            change=partial(_last_width, width=width),
        )
        for width in (32_768, 65_536)
    },
    **{
        f"depth-{depth}": Ablation(
            what=f"{depth} layer{'s' * (depth > 1)} in the projector",
            change=partial(_depth, depth=depth),
            **(_BASELINE if depth == 3 else {}),
        )
        for depth in (1, 2, 3, 4)
    },
    # Discussion
    "auto-correlation": Ablation(
        what="off_diagonal of each view with itself", change=_set(objective="auto-correlation")
    ),
    "imax": Ablation(what="IMAX, lambda 1", change=_set(objective="imax", lambd=1.0)),
}


def _from(first: str, last: str) -> tuple[str, ...]:
    names = list(ABLATIONS)
    return ("baseline", *names[names.index(first) : names.index(last) + 1])


GRIDS: dict[str, tuple[str, ...]] = {
    "table5": _from("invariance-only", "cross-entropy"),
    "table6": _from("stop-gradient", "predictor-stop-gradient"),
    "figure2": _from("batch-128", "batch-4096")[1:],
    "figure3": _from("no-grayscale", "crop"),
    "figure4": _from("width-16", "last-width-65536")[1:],
    "figure4-depth": _from("depth-1", "depth-4")[1:],
    "discussion": _from("auto-correlation", "imax"),
}


def ablate(recipe: Config, name: str) -> Config:
    """The recipe with that change. Raises ValueError for an unknown name."""
    if name not in ABLATIONS:
        raise ValueError(f"--ablation {name} is not one of {', '.join(ABLATIONS)}")
    return replace(ABLATIONS[name].change(recipe), ablation=name)
