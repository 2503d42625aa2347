"""`bt-fast eval linear`: the linear probe, a linear classifier on the frozen encoder (section B.1).

The full protocol trains it on a new random view of every image in each of 100 epochs. The quick
one, `--cached`, extracts features once and trains a grid of classifiers: see `linear_cached.py`.
"""

from bt_fast.distributed.collectives import World
from bt_fast.evaluate.eval_setup import EvalSetup, run_protocol
from bt_fast.evaluate.linear_cached import Grid, fit_grid
from bt_fast.evaluate.options import EvalLinear
from bt_fast.evaluate.subset import labelled_subset
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from pipelines.common.console import plural
from pipelines.loading.datasets import ImageDataset


def run_linear(options: EvalLinear, world: World) -> int:
    """Print the accuracies; returns the exit status."""
    return run_protocol("linear", options, measure_linear, world)


def measure_linear(
    options: EvalLinear, setup: EvalSetup, train: ImageDataset, val: ImageDataset
) -> tuple[float, dict[str, str]]:
    """(top-1, rows of the table) by the quick or the full protocol."""
    train_subset, val_subset = labelled_subset(train), labelled_subset(val)
    min_scale = setup.min_scale if options.min_scale is None else options.min_scale
    protocol = Protocol(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr_head=options.lr,
        weight_decay=options.weight_decay,
        min_scale=min_scale,
        seed=options.seed,
    )
    epochs = plural(options.epochs, "epoch")
    if options.cached:
        grid = Grid(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
        result = fit_grid(
            setup, train_subset, val_subset, grid, min_scale=min_scale, num_views=options.views
        )
        number = len(grid.pairs)
        title = f"quick: features read once, {number} classifiers at once, {epochs}"
        chosen = {"chosen on a tenth of train": f"lr {result['lr']:g}, wd {result['decay']:g}"}
    else:
        result = train_classifier(setup, "linear", train_subset, val_subset, protocol)
        title = f"full: lr {options.lr:g}, wd {options.weight_decay:g}, {epochs}"
        chosen = {}
    return result["top1"], {
        "protocol": title,
        **chosen,
        **accuracy_rows(result, train_subset, val_subset),
    }
