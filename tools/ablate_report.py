"""What `ablate.py` found, beside the paper's figures: a table, a picture, JSON."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed or opened
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from bt_fast.ablations import ABLATIONS
from pipelines.common.atomic import atomic_file

Found = dict[str, dict[int, dict[str, float]]]  # {ablation: {seed: {figure: share}}}

MEASURES = {"knn": "kNN", "linear": "linear"}
PAPER = "paper"
NOTE = (
    "Top-1, percent: kNN (k = 20) and the quick linear protocol on the held-out images; the paper's"
    " linear figure on ImageNet, ResNet-50, 300 epochs, batch 2048. Δ is the difference to the"
    " baseline, ± the standard deviation over seeds."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An ablation: percent of every seed by measure, and of the paper; differences to baseline."""

    name: str
    what: str
    seeds: int
    values: dict[str, list[float]]
    differences: dict[str, float]

    def cells(self, measures: list[str]) -> list[str]:
        """For a table; what is not there is "-"."""
        texts = [self.name, self.what, str(self.seeds)]
        for measure in measures:
            texts += [spread(self.values[measure]), "-"]
            if measure in self.differences:
                texts[-1] = f"{self.differences[measure]:+.1f}"
        return texts


def measured(table: list[Row]) -> list[str]:
    """The measures that have a figure in some row."""
    return [m for m in (*MEASURES.values(), PAPER) if any(row.values[m] for row in table)]


def spread(values: list[float]) -> str:
    """ "47.2 ± 0.3": mean and standard deviation over the seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def rows(found: Found) -> list[Row]:
    """In the order of the grid."""
    values = {
        name: {
            **{
                label: [100 * figures[key] for figures in seeds.values() if key in figures]
                for key, label in MEASURES.items()
            },
            PAPER: [top1] if (top1 := ABLATIONS[name].top1) is not None else [],
        }
        for name, seeds in found.items()
    }
    baseline = values.get("baseline", {})
    return [
        Row(
            name=name,
            what=ABLATIONS[name].what,
            seeds=len(found[name]),
            values=own,
            differences={
                measure: statistics.mean(own[measure]) - statistics.mean(baseline[measure])
                for measure in own
                if own[measure] and baseline.get(measure) and name != "baseline"
            },
        )
        for name, own in values.items()
    ]


def headings(measures: list[str]) -> list[str]:
    parts = [part for measure in measures for part in (measure, "Δ")]
    return ["ablation", "what changes", "seeds", *parts]


def write(folder: Path, table: list[Row], found: Found, flags: list[str]) -> None:
    """table.md, results.json and ablations.png, each replaced as a whole."""
    measures = measured(table)
    lines = [
        "| " + " | ".join(headings(measures)) + " |",
        "|---" * len(headings(measures)) + "|",
        *("| " + " | ".join(row.cells(measures)) + " |" for row in table),
        "",
        f"{NOTE} Flags of every run: `{' '.join(flags)}`.",
    ]
    every = [figures for seeds in found.values() for figures in seeds.values()]
    starts = [figures["random"] for figures in every if "random" in figures]
    if starts:
        lines.append(f"kNN at random initialisation: {spread([100 * start for start in starts])}.")
    results = {"flags": flags, "found": found, "paper": {r.name: r.values[PAPER] for r in table}}
    for name, text in (
        ("table.md", "\n".join(lines)),
        ("results.json", json.dumps(results, indent=2)),
    ):
        with atomic_file(folder / name, overwrite=True) as file:
            file.write(f"{text}\n".encode())
    with atomic_file(folder / "ablations.png", overwrite=True) as file:
        draw(table, file)


def draw(table: list[Row], file) -> None:
    """A panel per measure that has figures, a point per seed; dashed: the baseline."""
    shown = measured(table)
    figure, axes = plt.subplots(
        1,
        max(len(shown), 1),
        figsize=(2.2 + 3.4 * max(len(shown), 1), 1.2 + 0.34 * len(table)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, measure in zip(axes[0], shown, strict=False):
        for height, row in enumerate(table):
            own, colour = row.values[measure], "C1" if measure == PAPER else "C0"
            axis.plot(own, [height] * len(own), "o", color=colour, alpha=0.6)
            if own:
                axis.plot(statistics.mean(own), height, "|", color=colour, markersize=16)
            if row.name == "baseline" and own:
                axis.axvline(statistics.mean(own), linestyle="--", color="0.6", zorder=0)
        axis.set_title("paper: linear, ImageNet" if measure == PAPER else f"here: {measure}")
        axis.set_xlabel("top-1, %")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(table)), [row.name for row in table])
    axes[0][0].set_ylim(len(table) - 0.5, -0.5)
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def show(table: list[Row]) -> None:
    """Print the table, but for the column of words: for it a terminal is too narrow."""
    printed = Table(title="Ablations", title_justify="left", caption=NOTE, caption_justify="left")
    (first, _, *others), measures = headings(measured(table)), measured(table)
    printed.add_column(first, no_wrap=True)
    for heading in others:
        printed.add_column(heading, justify="right")
    for row in table:
        name, _, *figures = row.cells(measures)
        printed.add_row(name, *figures)
    Console(soft_wrap=True).print(printed)
