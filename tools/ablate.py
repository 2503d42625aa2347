"""Run the paper's ablations over seeds and compare the results with the paper's figures.

    python tools/ablate.py table5 --seeds 0 1 2 -- --recipe cifar10-cpu --data cifar10.beton
    python tools/ablate.py baseline imax --linear -- --data imagenet.beton --epochs 300 --gpus 8

Flags of `bt-fast pretrain` follow `--`. OUT/NAME-seedN is the run directory of each run. After an
interruption the same command continues: finished runs are not repeated, unfinished ones are
resumed. OUT/table.md, results.json and ablations.png are updated after every run.
"""

import _checkout  # noqa: F401  # isort: skip

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bt_fast import cli
from bt_fast.ablations import ABLATIONS, GRIDS
from bt_fast.config import Config, immutable_changes, load_config
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.evaluate.eval_setup import build_setup, open_labelled_splits
from bt_fast.evaluate.linear import measure_linear
from bt_fast.evaluate.options import EvalLinear
from bt_fast.run.console import duration
from bt_fast.run.directory import RunDirectory, read_metrics
from pipelines.common.console import print_line
from pipelines.common.flags import parse_flags
from pipelines.loading.datasets import open_data, open_val
from tools import ablate_report

_RESERVED_FLAGS = ("--ablation", "--seed", "--run-dir", "--resume", "--dry-run")
# Settings that change the results although a resumed run may change them.
_DATA_SETTINGS = ("data", "val_data", "max_steps", "probe_images")
_GRACE_PERIOD = 60  # seconds for the last step of a run after a stop request


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Run ablations over seeds. Flags of `bt-fast pretrain` follow --."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Grids (table5, table6, figure2, figure3, figure4, figure4-depth, discussion) or names of
    ablations from docs/ablations.md."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each ablation runs once with each."""
    out: Path = Path("ablations")
    """Folder for all runs, the table and the figure."""
    linear: bool = False
    """Additional quick linear protocol (`bt-fast eval linear --cached`) on held-out images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run of the grid."""

    name: str
    seed: int
    folder: Path
    config: Config

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def figures(self) -> dict[str, float] | None:
        """Accuracies, fractions, of the finished run; None before it is finished."""
        if not (self.folder / "encoder.safetensors").exists():
            return None
        probes = [r for _, r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "probe"]
        found = {"random": probes[0]["knn_20"], "knn": probes[-1]["knn_20"]} if probes else {}
        linear = self.folder / "linear.json"
        return found | (json.loads(linear.read_text()) if linear.exists() else {})


def main() -> int:
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own_flags, flags = arguments[:at], arguments[at + 1 :]
    return cli.run_command(
        "ablate.py", lambda: run(parse_flags(Options, "ablate.py", own_flags), flags)
    )


def run(options: Options, flags: list[str]) -> int:
    """Run all cells in sequence; returns the exit status."""
    cells = grid(options, flags)
    began, num_run, failed = time.perf_counter(), 0, []
    for number, cell in enumerate(cells):
        figures = cell.figures()
        if figures is None:
            left = ""
            if num_run:
                seconds = (time.perf_counter() - began) / num_run * (len(cells) - number)
                left = f", about {duration(seconds)} left"
            print_line(f"[{number + 1}/{len(cells)}] {cell.title}{left}")
            status = pretrain(cell, flags)
            if status == EXIT_STOPPED:
                print_line("stopped; repeat the command to continue")
                return status
            num_run += 1
        if cell.figures() is None:
            failed.append(cell.title)
            continue
        missing = options.linear and "linear" not in (figures or {})
        if missing:
            measure(cell)
        if missing or figures is None:
            report(options, cells, flags)
    ablate_report.show(report(options, cells, flags))
    if failed:
        print_line(
            f"not finished: {'; '.join(failed)}. Repeat the command to retry", file=sys.stderr
        )
    return 1 if failed else 0


def grid(options: Options, flags: list[str]) -> list[Cell]:
    """Every run, ordered by seed. Raises ValueError if one cannot be run or continued."""
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in _RESERVED_FLAGS:
            raise ValueError(f"{flag} after -- is set by ablate.py for every run; leave it out")
    names = []
    for name in options.names:
        if name not in GRIDS and name not in ABLATIONS:
            known = ", ".join([*GRIDS, *ABLATIONS])
            raise ValueError(f"{name} is neither a grid nor an ablation; choose from {known}")
        names += GRIDS.get(name, (name,))
    if not names or not options.seeds:
        raise ValueError("a grid or an ablation is missing, or a seed, as in: ablate.py table5")
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
    config = cells[0].config
    open_data(config.data, "--data")
    if options.linear and open_val(config.data, config.val_data) is None:
        raise ValueError(
            f"--linear needs held-out images: there are none beside {config.data}; pass them as"
            " --val-data after --"
        )
    for cell in cells:
        check(cell)
    return cells


def check(cell: Cell) -> None:
    """Raise ValueError if the cell's folder contains anything but this run."""
    if (cell.folder / "config.json").exists():
        saved = load_config(cell.folder, "--out")
        config = dataclasses.replace(
            cell.config,
            data=cell.config.data.resolve(),
            val_data=cell.config.val_data and cell.config.val_data.resolve(),
        )
        changed = immutable_changes(dataclasses.replace(config, run_dir=saved.run_dir), saved)
        changed += [
            f"--{name.replace('_', '-')}"
            for name in _DATA_SETTINGS
            if getattr(config, name) != getattr(saved, name)
        ]
        if changed:
            raise ValueError(
                f"{cell.folder} was started with other values of {' '.join(changed)};"
                " pass the same flags or another --out"
            )
    elif cell.folder.exists() and any(
        entry.name != ".lock" and ".tmp-" not in entry.name for entry in cell.folder.iterdir()
    ):
        raise ValueError(f"{cell.folder} contains other files; choose another --out")


def pretrain(cell: Cell, flags: list[str]) -> int:
    """Run or resume one cell in a new process; returns its exit status.

    The run directory is created first, so that the run can be resumed after a kill at any moment.
    """
    if not prepare_folder(cell):
        print_line(f"{cell.folder} is in use by another process and is skipped")
        return 1
    arguments = ["--resume", str(cell.folder), *flags]
    process = multiprocessing.get_context("spawn").Process(target=_pretrain, args=(arguments,))
    is_stopped = False
    with StopFlag() as stop:
        process.start()
        while process.is_alive():
            process.join(0.1)
            if stop.requested and not is_stopped:
                process.terminate()
                is_stopped = True
    return EXIT_STOPPED if is_stopped else process.exitcode or 0


def prepare_folder(cell: Cell) -> bool:
    """Write the configuration once no process uses the folder. Returns False after a timeout."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _GRACE_PERIOD
    while True:
        try:
            with RunDirectory(cell.folder) as folder:
                if not (cell.folder / "config.json").exists():
                    folder.record_config(cell.config)
                return True
        except ValueError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def _pretrain(arguments: list[str]) -> None:
    """Train in the new process, which stops with a checkpoint when its parent process ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def stop_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, daemon=True).start()
    sys.exit(cli.main(["pretrain", *arguments]))


def measure(cell: Cell) -> None:
    """Run the quick linear protocol and write linear.json into the run directory."""
    config = cell.config
    options = EvalLinear(
        run=cell.folder,
        cached=True,
        device=config.device,
        precision=config.precision,
        workers=config.workers,
        cache_gb=config.cache_gb,
    )
    setup = build_setup(options)
    train, val = open_labelled_splits(options, setup.config)
    top1, _ = measure_linear(options, setup, train, val)
    with RunDirectory(cell.folder) as folder:
        folder.write("linear.json", json.dumps({"linear": top1}) + "\n")


def report(options: Options, cells: list[Cell], flags: list[str]) -> list[ablate_report.Row]:
    """Write the results so far; returns the rows of the table."""
    found: dict[str, dict[int, dict[str, float]]] = {cell.name: {} for cell in cells}
    for cell in cells:
        figures = cell.figures()
        if figures is not None:
            found[cell.name][cell.seed] = figures
    rows = ablate_report.rows(found)
    ablate_report.write(options.out, rows, found, flags)
    return rows


if __name__ == "__main__":
    sys.exit(main())
