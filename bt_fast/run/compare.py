"""`bt-fast compare RUN RUN...`: several runs in one table and one picture."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

READOUTS = ("knn_20", "linear", "rank")
_MAX_FLAGS = 8  # in one cell; the others follow from --recipe, or are in config.json


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """Compare runs: their last loss, first and last readouts, and all curves."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folders of runs, finished or not."""
    out: Path = Path("compare.png")
    """Picture of the curves; an existing one is replaced only with --overwrite."""
    overwrite: bool = False
    """Permission to replace an existing picture."""


def run_compare(options: Compare) -> int:
    """Print the table and draw the picture; returns the exit status."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from bt_fast.config import RESULTS_DEPEND_ON, differences, load_config, written
    from bt_fast.run.directory import read_metrics
    from bt_fast.run.plots import curves
    from pipelines.common.atomic import require_place

    if not options.runs:
        raise ValueError("RUN: name the folder of at least one run")
    if len({path.resolve() for path in options.runs}) < len(options.runs):
        raise ValueError("RUN: a run is named twice; name each once")
    if options.out.suffix != ".png":
        raise ValueError(f"--out {options.out} must end in .png")
    require_place(options.out, "--out")
    if options.out.exists() and not options.overwrite:
        raise ValueError(f"--out {options.out} exists; choose another, or replace it: --overwrite")
    configs = [load_config(path, "RUN") for path in options.runs]
    first, others = configs[0], configs[1:]
    changes = [differences(config, first, also=RESULTS_DEPEND_ON) for config in others]
    # Of the first run, its own values of all that the others change.
    own = [differences(first, config, also=RESULTS_DEPEND_ON) for config in others]
    changes.insert(0, {flag: value for found in own for flag, value in found.items()})
    table = Table(Column("run", overflow="fold"), Column("differs in", overflow="fold"))
    for title in ("epoch", "loss", "kNN, %", "linear, %", "rank", "images/s"):
        table.add_column(title, no_wrap=True)
    for path, changed in zip(options.runs, changes, strict=True):
        records = [record for _, record in read_metrics(path / "metrics.jsonl")]
        if not records:
            raise ValueError(f"{path} has no metrics yet")
        changed.pop("--run-dir", None)
        flags = [written(flag, value) for flag, value in changed.items()]
        if (more := len(flags) - _MAX_FLAGS) > 0:
            flags[_MAX_FLAGS:] = [f"and {more} more"]
        table.add_row(Text(str(path)), Text("\n".join(flags)), *summary(records))
    console = Console()
    console.width = max(console.width, 120)  # in narrower ones, names would vanish
    console.print(table, soft_wrap=True)
    curves({str(path): [path / "metrics.jsonl"] for path in options.runs}, options.out)
    print(f"curves: {options.out}")
    return 0


def summary(records: list[dict[str, Any]]) -> list[str]:
    """Epoch, loss, readouts "first -> last" and median images/s of a run's records.

    The epoch of the last readouts stands beside the last one, if it is an earlier one.
    """
    train = [record for record in records if record["kind"] == "train"]
    probes = [record for record in records if record["kind"] == "probe"]
    newest = (train or probes)[-1]
    epoch, loss, rate = f"{newest['epoch']:.4g}", "none", "none"
    if train:
        # None is the loss of a record whose loss was not finite.
        loss = "not finite" if newest["loss"] is None else f"{newest['loss']:.4g}"
        rate = f"{statistics.median(record['images_per_s'] for record in train):.0f}"
    if probes and probes[-1]["step"] < newest["step"]:
        epoch += f" (readouts: {probes[-1]['epoch']:.4g})"
    cells = [epoch, loss]
    for name in READOUTS:
        values = [probe[name] for probe in probes if probe.get(name) is not None]
        factor = 1 if name == "rank" else 100
        ends = [*values[:1], *values[1:][-1:]]
        cells.append(" -> ".join(f"{factor * value:.1f}" for value in ends) or "none")
    return [*cells, rate]
