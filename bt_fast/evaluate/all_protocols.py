"""`bt-fast eval all`: random initialisation against pretraining, in one table from one saved run.

kNN, the quick linear protocol and fine-tuning on 10 % of the labels, each for both encoders. What
is done is kept in the run's eval/ folder; running the command again goes on from there.
"""

import dataclasses
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.knn import measure_knn
from bt_fast.evaluate.knn_classifier import choose_data
from bt_fast.evaluate.linear import EvalLinear, measure_linear
from bt_fast.evaluate.options import EvalOptions, labelled, open_pair, open_subject
from bt_fast.evaluate.semi import EvalSemi, measure_semi
from pipelines.common.console import say


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalAll(EvalOptions):
    """Random initialisation against pretraining: kNN, linear and 10 % of the labels."""

    full_linear: bool = False
    """The paper's linear protocol instead of the quick one."""
    percent: float = 10
    """Share of the labels in the semi-supervised part."""
    semi_epochs: int = 20
    """Passes over that share."""
    semi_batch_size: int = 256
    """Images per step there."""
    seed: int = 0
    """Of everything drawn."""


def run_all(options: EvalAll, world: World = ALONE) -> int:
    """Print the table; returns the exit status."""
    common = {field.name: getattr(options, field.name) for field in dataclasses.fields(EvalOptions)}
    linear = "linear" if options.full_linear else "linear, quick protocol"
    semi = f"{options.percent:g} % of the labels, fine-tuned"
    scores: dict[str, list[float]] = {"kNN, k = 20": [], linear: [], semi: []}
    for random in (True, False):
        common["random"] = random
        subject = open_subject(EvalOptions(**common), world=world)
        train, val = open_pair(EvalOptions(**common), subject)
        say(f"{subject.description}:")
        data = choose_data(train, val, subject.seed)
        assert data is not None  # open_pair has seen two classes
        scores["kNN, k = 20"].append(measure_knn(subject, data)[0])
        settings = EvalLinear(**common, cached=not options.full_linear, seed=options.seed)
        scores[linear].append(measure_linear(settings, subject, train, val)[0])
        tuning = EvalSemi(
            **common,
            percent=options.percent,
            epochs=options.semi_epochs,
            batch_size=options.semi_batch_size,
            seed=options.seed,
        )
        scores[semi].append(measure_semi(tuning, subject, train, val)[0])  # last: it fine-tunes
    Console(soft_wrap=True).print(comparison(scores, str(options.run), len(labelled(val))))
    return 0


def comparison(scores: dict[str, list[float]], run: str, held_out: int) -> Table:
    """One row per evaluation: top-1 at random initialisation, pretrained, and the difference."""
    table = Table(title=f"bt-fast eval all {run}: top-1 of {held_out} held-out images")
    table.title_justify = "left"
    for heading in ("", "random", "pretrained", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (before, after) in scores.items():
        table.add_row(
            name, f"{100 * before:.2f} %", f"{100 * after:.2f} %", f"{100 * (after - before):+.2f}"
        )
    return table
