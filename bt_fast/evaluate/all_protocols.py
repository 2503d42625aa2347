"""`bt-fast eval all`: a table that compares random initialisation with pretraining.

kNN, the quick linear protocol and fine-tuning on 10 % of the labels, each for both encoders. States
and results are kept in the run's eval/ folder; the same command continues from them.
"""

import dataclasses

from rich.console import Console
from rich.table import Table

from bt_fast.distributed.collectives import World
from bt_fast.evaluate.eval_setup import build_setup, open_labelled_splits
from bt_fast.evaluate.knn import measure_knn
from bt_fast.evaluate.knn_classifier import choose_data
from bt_fast.evaluate.linear import measure_linear
from bt_fast.evaluate.options import EvalAll, EvalLinear, EvalSemi
from bt_fast.evaluate.overlap import warn_of_overlap
from bt_fast.evaluate.semi import measure_semi
from bt_fast.evaluate.subset import labelled_subset
from pipelines.common.console import print_line


def run_all(options: EvalAll, world: World) -> int:
    """Print the table; returns the exit status."""
    linear = "linear" if options.full_linear else "linear, quick protocol"
    semi = f"{options.percent:g} % of the labels, fine-tuned"
    scores: dict[str, list[float]] = {"kNN, k = 20": [], linear: [], semi: []}
    for random in (True, False):
        setup = build_setup(dataclasses.replace(options, random=random), world=world)
        train, val = open_labelled_splits(options, setup.config)
        if random and world.is_first:
            warn_of_overlap(train, val)
        print_line(f"{setup.description}:")
        data = choose_data(train, val, setup.seed)
        assert data is not None  # open_labelled_splits requires two classes
        scores["kNN, k = 20"].append(measure_knn(setup, data)[0])
        linear_options = EvalLinear(
            run=options.run, cached=not options.full_linear, seed=options.seed
        )
        scores[linear].append(measure_linear(linear_options, setup, train, val)[0])
        semi_options = EvalSemi(
            run=options.run,
            percent=options.percent,
            epochs=options.semi_epochs,
            batch_size=options.semi_batch_size,
            seed=options.seed,
        )
        scores[semi].append(measure_semi(semi_options, setup, train, val)[0])  # changes the encoder
    num_images = len(labelled_subset(val))
    table = Table(title=f"bt-fast eval all {options.run}: top-1 of {num_images} held-out images")
    table.title_justify = "left"
    for heading in ("", "random", "pretrained", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (before, after) in scores.items():
        table.add_row(
            name, f"{100 * before:.2f} %", f"{100 * after:.2f} %", f"{100 * (after - before):+.2f}"
        )
    Console(soft_wrap=True).print(table)
    return 0
