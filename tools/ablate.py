"""Run the paper's ablations over seeds and compare the results with the paper's figures.

    python tools/ablate.py table5 --seeds 0 1 2 -- --recipe cifar10-cpu --data cifar10.beton
    python tools/ablate.py baseline imax --linear -- --data imagenet.beton --epochs 300 --gpus 8

Flags of `bt-fast pretrain` follow `--`. OUT/NAME-seedN is the run directory of each run. After an
interruption the same command continues: finished runs are not repeated, unfinished ones are
resumed. OUT/table.md and results.json are updated after every run.
"""

import _checkout  # noqa: F401  # isort: skip

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bt_fast import cli
from bt_fast.ablations import ABLATIONS, GRIDS, ablate
from bt_fast.config import Config, differences
from bt_fast.distributed.signals import EXIT_STOPPED
from bt_fast.run.probe import READOUTS
from pipelines.common.atomic import write_text
from pipelines.common.flags import parse_flags
from pipelines.loading.datasets import open_val
from tools import seeded_runs

MEASURES = READOUTS | {"linear_cached": "linear, cached protocol", "paper": "paper"}
NOTE = (
    "Top-1 of the held-out images, percent: the readouts of the last probe (`linear` is ridge"
    " regression) and, with --linear, `bt-fast eval linear --cached`; the paper's linear figure on"
    " ImageNet, ResNet-50, 300 epochs, batch 2048. Δ is the difference to the baseline, ± the"
    " standard deviation over seeds."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Run ablations over seeds. Flags of `bt-fast pretrain` follow --."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Grids (table5, table6, figure2, figure3, figure4, figure4-depth, discussion) or names of
    ablations from docs/ablations.md."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each ablation runs once with each."""
    out: Path = Path("ablations")
    """Folder for all runs and the table."""
    linear: bool = False
    """Additional cached linear protocol (`bt-fast eval linear --cached`) on held-out images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of the grid."""

    name: str
    seed: int
    folder: Path
    config: Config

    def figures(self) -> dict[str, float]:
        """Accuracies, fractions, of the finished run; empty before it is finished."""
        probes = seeded_runs.probes(self.folder)
        if not probes:
            return {}
        found = {name: probes[-1][name] for name in READOUTS if name in probes[-1]}
        found["random"] = probes[0]["knn_20"]
        for result in self.folder.glob("eval/linear-cached-*/result.json"):
            found["linear_cached"] = json.loads(result.read_text())["top1"]
        return found


def main() -> int:
    own_flags, flags = seeded_runs.split_flags(sys.argv[1:])
    return cli.run_command(
        "ablate.py", lambda: run(parse_flags(Options, "ablate.py", own_flags), flags)
    )


def run(options: Options, flags: list[str]) -> int:
    """Run all cells in sequence; returns the exit status."""
    cells, failed = grid(options, flags), []
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.folder.name}", flush=True)
        status = 0
        if not seeded_runs.is_finished(cell.folder):
            own = [f"--ablation={cell.name}", f"--seed={cell.seed}"]
            status = seeded_runs.pretrain(cell.folder, [*own, *flags])
        if status == 0 and options.linear and "linear_cached" not in cell.figures():
            status = measure(cell)
        if status == EXIT_STOPPED:
            print("stopped; repeat the command to continue")
            return status
        if status:
            failed.append(cell.folder.name)
        write(options.out, cells, flags)
    print((options.out / "table.md").read_text(), end="")
    if failed:
        print(f"not finished: {', '.join(failed)}. Repeat the command to retry", file=sys.stderr)
    return 1 if failed else 0


def grid(options: Options, flags: list[str]) -> list[Cell]:
    """Every run, ordered by seed. Raises ValueError if one cannot be run or continued."""
    seeded_runs.require_options(flags, options.seeds, options.out)
    names: list[str] = []
    for name in options.names:
        if name not in GRIDS and name not in ABLATIONS:
            known = ", ".join([*GRIDS, *ABLATIONS])
            raise ValueError(f"{name} is neither a grid nor an ablation; choose from {known}")
        names += GRIDS.get(name, (name,))
    if not names:
        raise ValueError("a grid or an ablation is missing, as in: ablate.py table5")
    cells = [
        Cell(
            name=name,
            seed=seed,
            folder=options.out / f"{name}-seed{seed}",
            config=cli.parse_pretrain([f"--ablation={name}", f"--seed={seed}", *flags]),
        )
        for seed in dict.fromkeys(options.seeds)
        for name in dict.fromkeys(names)
    ]
    for cell in cells:
        plain = cli.parse_pretrain([f"--seed={cell.seed}", *flags])
        if undone := differences(ablate(plain, cell.name), cell.config):
            raise ValueError(
                f"{' '.join(undone)} after -- undoes the ablation {cell.name}; leave it out"
            )
    config = cells[0].config
    seeded_runs.require_readouts(config)
    if options.linear and open_val(config.data, config.val_data) is None:
        raise ValueError(
            f"--linear needs held-out images: there are none beside {config.data}; pass them as"
            " --val-data after --"
        )
    for cell in cells:
        seeded_runs.require_same_flags(cell.folder, cell.config)
    return cells


def measure(cell: Cell) -> int:
    """Run the cached linear protocol; returns its exit status."""
    flags = [
        word
        for name in ("device", "precision", "workers", "cache_gb")
        if (value := getattr(cell.config, name)) is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    return seeded_runs.bt_fast("eval", "linear", cell.folder, "--cached", *flags)


def write(out: Path, cells: list[Cell], flags: list[str]) -> None:
    """Write table.md and results.json of the runs so far."""
    found: dict[str, dict[int, dict[str, float]]] = {cell.name: {} for cell in cells}
    for cell in cells:
        if figures := cell.figures():
            found[cell.name][cell.seed] = figures
    text = table(found) + f"\n\n{NOTE} Flags of every run: `{' '.join(flags)}`.\n"
    random = [100 * f["random"] for runs in found.values() for f in runs.values() if "random" in f]
    if random:
        text += f"kNN (k = 20) at random initialisation: {spread(random)}.\n"
    out.mkdir(parents=True, exist_ok=True)
    results = json.dumps({"flags": flags, "found": found}, indent=2)
    for name, content in (("table.md", text), ("results.json", results)):
        write_text(out / name, content, overwrite=True)


def table(found: dict[str, dict[int, dict[str, float]]]) -> str:
    """The results {ablation: {seed: {measure: fraction}}} and the paper's as Markdown."""
    percent: dict[str, dict[str, list[float]]] = {}
    for name, runs in found.items():
        percent[name] = {m: [100 * f[m] for f in runs.values() if m in f] for m in MEASURES}
        percent[name]["paper"] = [p for p in [ABLATIONS[name].top1] if p is not None]
    measures = [m for m in MEASURES if any(values[m] for values in percent.values())]
    headings = ["ablation", "change", "runs"]
    headings += [part for m in measures for part in (MEASURES[m], "Δ")]
    rows = [headings, ["---"] * len(headings)]
    for name, values in percent.items():
        row = [name, ABLATIONS[name].summary, str(len(found[name]))]
        for m in measures:
            baseline = percent.get("baseline", values)[m] if name != "baseline" else []
            delta = "-"
            if values[m] and baseline:
                delta = f"{statistics.mean(values[m]) - statistics.mean(baseline):+.1f}"
            row += [spread(values[m]), delta]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: list[float]) -> str:
    """ "47.2 ± 0.3": mean and standard deviation over the seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
