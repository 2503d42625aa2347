"""`bt-fast eval linear`: a linear classifier on the frozen encoder (the paper's appendix B.1).

The full protocol trains it on a new random view of every image in each of 100 epochs. The quick
one, `--cached`, reads features once and trains a grid of classifiers on them: see `heads.py`.
"""

from dataclasses import dataclass

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.linear_cached import Grid, fit_grid
from bt_fast.evaluate.options import Subject, TrainedOptions, labelled, run_on_pair
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from bt_fast.evaluate.views import Images


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalLinear(TrainedOptions):
    """Train a linear classifier on the frozen encoder and classify the held-out images."""

    cached: bool = False
    """The quick protocol: read features once, train a grid of classifiers on them at once."""
    views: int = 4
    """Of each training image in the quick protocol: its central crop and random ones. Memory for
    each: 0.5 GB per 128,000 images of a ResNet-50."""
    epochs: int = 100
    """Passes over the images (or their features)."""
    lr: float = 0.3
    """Learning rate, not scaled by the batch; cosine to 0. The grid has its own."""
    weight_decay: float = 1e-6
    """On weights and bias. The grid has its own."""


def run_linear(options: EvalLinear, world: World = ALONE) -> int:
    """Print the accuracies; returns the exit status."""
    return run_on_pair("linear", options, measure_linear, world)


def measure_linear(
    options: EvalLinear, subject: Subject, train: Images, val: Images
) -> tuple[float, dict[str, str]]:
    """(top-1, rows of the table) by the protocol of the options."""
    part, held_out = labelled(train), labelled(val)
    min_scale = options.smallest_crop(subject)
    protocol = Protocol(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr_head=options.lr,
        weight_decay=options.weight_decay,
        min_scale=min_scale,
        seed=options.seed,
    )
    if options.cached:
        grid = Grid(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
        result = fit_grid(
            subject, part, held_out, grid, min_scale=min_scale, num_views=options.views
        )
        how = f"quick: features read once, {len(grid)} classifiers at once, {grid.epochs} epochs"
        chosen = {"chosen on a tenth of train": f"lr {result['lr']:g}, wd {result['decay']:g}"}
    else:
        result = train_classifier(subject, "linear", part, held_out, protocol)
        how = f"full: lr {options.lr:g}, wd {options.weight_decay:g}, {options.epochs} epochs"
        chosen = {}
    return result["top1"], {"protocol": how, **chosen, **accuracy_rows(result, held_out)}
