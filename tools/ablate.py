"""Run the paper's ablations over seeds, and set what they give beside the paper's figures.

    python tools/ablate.py table5 --seeds 0 1 2 -- --recipe cifar10-cpu --data cifar10.beton
    python tools/ablate.py baseline imax --linear -- --data imagenet.beton --epochs 300 --gpus 8

What follows `--` are flags of `bt-fast pretrain`. Each run lies in OUT/NAME-seedN, an ordinary run
directory. The same command, after whatever happened, goes on: finished runs are not repeated, begun
ones are resumed. After every run OUT/table.md, results.json and ablations.png tell what is there.
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
from bt_fast.build import open_data, open_val
from bt_fast.config import Config
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.evaluate.linear import EvalLinear, measure_linear
from bt_fast.evaluate.options import open_pair, open_subject
from bt_fast.run.console import duration
from bt_fast.run.directory import RunDirectory, load_config, read_metrics
from pipelines.common.console import say
from pipelines.common.flags import parse_flags
from tools import ablate_report

_CHOSEN_HERE = ("--ablation", "--seed", "--run-dir", "--resume", "--dry-run")
# What a figure depends on beside what is learned.
_MEASURED = ("data", "val_data", "max_steps", "probe_images")
_PATIENCE = 60  # seconds that a run which was told to end may take for its last step


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Run ablations over seeds. Flags of `bt-fast pretrain` follow after --."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Grids (table5, table6, figure2, figure3, figure4, figure4-depth, discussion), or ablations by
    name: docs/ablations.md."""
    seeds: tuple[int, ...] = (0,)
    """Every ablation runs once with each."""
    out: Path = Path("ablations")
    """Folder for all runs, the table and the figure."""
    linear: bool = False
    """Also the quick linear protocol (`bt-fast eval linear --cached`), which takes held-out
    images."""


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
        """What the finished run found; None before it is finished."""
        if not (self.folder / "encoder.safetensors").exists():
            return None
        probes = [r for _, r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "probe"]
        found = {"random": probes[0]["knn_20"], "knn": probes[-1]["knn_20"]} if probes else {}
        linear = self.folder / "linear.json"
        return found | (json.loads(linear.read_text()) if linear.exists() else {})


def main() -> int:
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, flags = arguments[:at], arguments[at + 1 :]
    return cli.in_one_line("ablate.py", lambda: run(parse_flags(Options, "ablate.py", own), flags))


def run(options: Options, flags: list[str]) -> int:
    """All cells, one after the other; returns the exit status."""
    cells = grid(options, flags)
    began, num_run, failed = time.perf_counter(), 0, []
    for number, cell in enumerate(cells):
        figures = cell.figures()
        if figures is None:
            left = ""
            if num_run:
                seconds = (time.perf_counter() - began) / num_run * (len(cells) - number)
                left = f", about {duration(seconds)} left"
            say(f"[{number + 1}/{len(cells)}] {cell.title}{left}")
            status = pretrain(cell, flags)
            if status == EXIT_STOPPED:
                say("stopped; the same command goes on")
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
        say(f"not finished: {'; '.join(failed)}. The same command tries again", file=sys.stderr)
    return 1 if failed else 0


def grid(options: Options, flags: list[str]) -> list[Cell]:
    """Every run, all of one seed first. Raises ValueError for what cannot be run or continued."""
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in _CHOSEN_HERE:
            raise ValueError(f"{flag} after -- is chosen by ablate.py for every run; leave it out")
    names = []
    for name in options.names:
        if name not in GRIDS and name not in ABLATIONS:
            known = ", ".join([*GRIDS, *ABLATIONS])
            raise ValueError(f"{name} is neither a grid nor an ablation; there is {known}")
        names += GRIDS.get(name, (name,))
    if not names or not options.seeds:
        raise ValueError("needs a grid or an ablation and a seed, as in: ablate.py table5")
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
            f"--linear needs held-out images: none are beside {config.data}; name them with"
            " --val-data, after --"
        )
    for cell in cells:
        check(cell)
    return cells


def check(cell: Cell) -> None:
    """Raise ValueError if what lies in the cell's folder is not this run."""
    if (cell.folder / "config.json").exists():
        saved = load_config(cell.folder, "--out")
        wanted = dataclasses.replace(
            cell.config,
            data=cell.config.data.resolve(),
            val_data=cell.config.val_data and cell.config.val_data.resolve(),
        )
        changed = cli.learns_otherwise(dataclasses.replace(wanted, run_dir=saved.run_dir), saved)
        changed += [
            f"--{name.replace('_', '-')}"
            for name in _MEASURED
            if getattr(wanted, name) != getattr(saved, name)
        ]
        if changed:
            raise ValueError(
                f"{cell.folder} was begun with other {' '.join(changed)};"
                " give the same flags, or another --out"
            )
    elif cell.folder.exists() and any(
        entry.name != ".lock" and ".tmp-" not in entry.name for entry in cell.folder.iterdir()
    ):
        raise ValueError(f"{cell.folder} is no run, and in use; choose another --out")


def pretrain(cell: Cell, flags: list[str]) -> int:
    """Run or resume one cell in a process of its own; returns its exit status.

    A run's folder is begun here, so that a kill at any moment leaves one that can be resumed.
    """
    if not claim(cell):
        say(f"{cell.folder} is in use by another process; left to it")
        return 1
    arguments = ["--resume", str(cell.folder), *flags]
    process = multiprocessing.get_context("spawn").Process(target=_pretrain, args=(arguments,))
    told = False
    with StopFlag() as stop:
        process.start()
        while process.is_alive():
            process.join(0.1)
            if stop.requested and not told:
                process.terminate()
                told = True
    return EXIT_STOPPED if told else process.exitcode or 0


def claim(cell: Cell) -> bool:
    """Wait for a process that ends there; write the configuration. False if it does not end."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with RunDirectory(cell.folder) as folder:
                if not (cell.folder / "config.json").exists():
                    folder.record_settings(cell.config)
                return True
        except ValueError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def _pretrain(arguments: list[str]) -> None:
    """In the new process. It stops, saved, when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    sys.exit(cli.main(["pretrain", *arguments]))


def measure(cell: Cell) -> None:
    """The quick linear protocol; kept beside the run."""
    config = cell.config
    options = EvalLinear(
        run=cell.folder,
        cached=True,
        device=config.device,
        precision=config.precision,
        workers=config.workers,
        cache_gb=config.cache_gb,
    )
    subject = open_subject(options)
    train, val = open_pair(options, subject)
    top1, _ = measure_linear(options, subject, train, val)
    with RunDirectory(cell.folder) as folder:
        folder.write("linear.json", json.dumps({"linear": top1}) + "\n")


def report(options: Options, cells: list[Cell], flags: list[str]) -> list[ablate_report.Row]:
    """Write what there is by now; returns the rows of the table."""
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
