"""`bt-fast eval linear`: a linear classifier on the frozen encoder (the paper's appendix B.1).

The full protocol trains it on a new random view of every image in each of 100 epochs. The quick
one, `--cached`, reads features once and trains a grid of classifiers on them: see `heads.py`.
"""

from dataclasses import dataclass

from rich.console import Console

from bt_fast.evaluate.heads import Grid, fit_grid
from bt_fast.evaluate.options import EvalOptions, Subject, labelled, open_pair, open_subject
from bt_fast.evaluate.supervised import Protocol, train_classifier
from bt_fast.evaluate.views import Images
from bt_fast.log import summary_table


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalLinear(EvalOptions):
    """Train a linear classifier on the frozen encoder and classify the held-out images."""

    cached: bool = False
    """The quick protocol: read features once, train a grid of classifiers on them at once."""
    views: int = 4
    """Of each training image in the quick protocol: its central crop and random ones. Memory for
    each: 0.5 GB per 128,000 images of a ResNet-50."""
    epochs: int = 100
    """Passes over the images (or their features)."""
    batch_size: int = 256
    """Images per step."""
    lr: float = 0.3
    """Learning rate, not scaled by the batch; cosine to 0. The grid has its own."""
    weight_decay: float = 1e-6
    """On weights and bias. The grid has its own."""
    min_scale: float | None = None
    """Smallest random crop, share of the image's area. Default: the run's; 0.08 for a file."""
    seed: int = 0
    """Of the classifier's start, the order and the crops."""


def run_linear(options: EvalLinear) -> int:
    """Print the accuracies; returns the exit status."""
    subject = open_subject(options)
    train, val = open_pair(options, subject)
    rows = {"encoder": subject.description, "data": f"{train.path}, {len(train)} images"}
    rows |= measure_linear(options, subject, train, val)[1]
    Console(soft_wrap=True).print(summary_table("bt-fast eval linear", rows))
    return 0


def measure_linear(
    options: EvalLinear, subject: Subject, train: Images, val: Images
) -> tuple[float, dict[str, str]]:
    """(top-1, rows of the table) by the protocol of the options."""
    part, held_out = labelled(train), labelled(val)
    min_scale = subject.min_scale if options.min_scale is None else options.min_scale
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
    rows = {
        "protocol": how,
        **chosen,
        f"top-1 of {len(held_out)}": f"{100 * result['top1']:.2f} %",
        "top-5": f"{100 * result['top5']:.2f} %",
    }
    return result["top1"], rows
