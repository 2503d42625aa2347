"""Results of `ablate.py` beside the paper's figures: a table, a figure, JSON."""

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

Found = dict[str, dict[int, dict[str, float]]]  # {ablation: {seed: {measure: fraction}}}

MEASURES = {"knn": "kNN", "linear": "linear"}
PAPER = "paper"
NOTE = (
    "Top-1, percent: kNN (k = 20) and the quick linear protocol on the held-out images; the paper's"
    " linear figure on ImageNet, ResNet-50, 300 epochs, batch 2048. Δ is the difference to the"
    " baseline, ± the standard deviation over seeds."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An ablation: percent of every seed by measure, of the paper, differences to the baseline."""

    name: str
    change: str
    seeds: int
    values: dict[str, list[float]]
    differences: dict[str, float]

    def cells(self, measures: list[str]) -> list[str]:
        """Cells of the table; "-" for a missing value."""
        texts = [self.name, self.change, str(self.seeds)]
        for measure in measures:
            texts += [spread(self.values[measure]), "-"]
            if measure in self.differences:
                texts[-1] = f"{self.differences[measure]:+.1f}"
        return texts


def measured(table: list[Row]) -> list[str]:
    """The measures with a value in at least one row."""
    return [m for m in (*MEASURES.values(), PAPER) if any(row.values[m] for row in table)]


def spread(values: list[float]) -> str:
    """ "47.2 ± 0.3": mean and standard deviation over the seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def rows(found: Found) -> list[Row]:
    """Rows of the table, in the order of the grid."""
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
            change=ABLATIONS[name].summary,
            seeds=len(found[name]),
            values=by_measure,
            differences={
                measure: statistics.mean(percent) - statistics.mean(baseline[measure])
                for measure, percent in by_measure.items()
                if percent and baseline.get(measure) and name != "baseline"
            },
        )
        for name, by_measure in values.items()
    ]


def headings(measures: list[str]) -> list[str]:
    parts = [part for measure in measures for part in (measure, "Δ")]
    return ["ablation", "change", "seeds", *parts]


def write(folder: Path, table: list[Row], found: Found, flags: list[str]) -> None:
    """Write table.md, results.json and ablations.png, each atomically."""
    measures = measured(table)
    lines = [
        "| " + " | ".join(headings(measures)) + " |",
        "|---" * len(headings(measures)) + "|",
        *("| " + " | ".join(row.cells(measures)) + " |" for row in table),
        "",
        f"{NOTE} Flags of every run: `{' '.join(flags)}`.",
    ]
    runs = [figures for seeds in found.values() for figures in seeds.values()]
    random = [100 * figures["random"] for figures in runs if "random" in figures]
    if random:
        lines.append(f"kNN at random initialisation: {spread(random)}.")
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
    """Draw a panel per measure with values, a point per seed, the baseline dashed."""
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
            percent, colour = row.values[measure], "C1" if measure == PAPER else "C0"
            axis.plot(percent, [height] * len(percent), "o", color=colour, alpha=0.6)
            if percent:
                axis.plot(statistics.mean(percent), height, "|", color=colour, markersize=16)
            if row.name == "baseline" and percent:
                axis.axvline(statistics.mean(percent), linestyle="--", color="0.6", zorder=0)
        axis.set_title("paper: linear, ImageNet" if measure == PAPER else f"bt-fast: {measure}")
        axis.set_xlabel("top-1, %")
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(table)), [row.name for row in table])
    axes[0][0].set_ylim(len(table) - 0.5, -0.5)
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def show(table: list[Row]) -> None:
    """Print the table without the column "change", for which a terminal is too narrow."""
    printed = Table(title="Ablations", title_justify="left", caption=NOTE, caption_justify="left")
    (first, _, *others), measures = headings(measured(table)), measured(table)
    printed.add_column(first, no_wrap=True)
    for heading in others:
        printed.add_column(heading, justify="right")
    for row in table:
        name, _, *figures = row.cells(measures)
        printed.add_row(name, *figures)
    Console(soft_wrap=True).print(printed)
