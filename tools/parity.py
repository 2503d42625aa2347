"""Compare what bt-fast learns with what the released code's way learns, on the same images.

    python tools/parity.py --seeds 0 1 2 -- --recipe cifar10-cpu --data cifar10.beton --epochs 10
    python tools/parity.py --seeds 0 1 2 -- --recipe cifar10 --data cifar10.beton --epochs 100

Flags of `bt-fast pretrain` follow `--`; the second line is for a GPU. The released code's way is
`reference.py`: views by Pillow in worker processes, the encoder called once per view, float16 with
a loss scaler on a GPU, the D x D matrix, LARS as a loop. Both ways have the same images, encoder,
projector, batch size, epochs and hyperparameters, and initialise with the same seeds, but their
random views differ; both are probed alike. OUT/WAY-seedN is the folder of a run; finished runs are
not repeated. With --precision fp32 after `--`, bt-fast computes as the reference does on a CPU.
"""

import _checkout  # noqa: F401  # isort: skip

import contextlib
import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy import stats

from bt_fast import cli
from bt_fast.build import build
from bt_fast.choices import is_of_library
from bt_fast.config import Config, written
from bt_fast.run.console import RunLog
from bt_fast.run.directory import RunDirectory
from bt_fast.run.plots import curves
from bt_fast.run.probe import READOUTS, measure
from bt_fast.train import export_encoder, probe_is_due
from pipelines.common.atomic import write_text
from pipelines.common.flags import parse_flags
from tools import reference, seeded_runs

WAYS = ("bt-fast", "reference")
# What the released code's way does, whatever the flags say.
FIXED = {
    "optimizer": "lars", "grad_scale": 1.0, "objective": "barlow-twins", "accumulate": 1,
    "bn_group": 0, "projector_norm": True, "predictor": False, "stop_gradient": False,
    "drop_path": 0.0, "init": None, "resolution": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train by both ways over seeds. Flags of `bt-fast pretrain` follow --."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each way runs once with each."""
    out: Path = Path("parity")
    """Folder for all runs, the table and the picture."""


def main() -> int:
    own_flags, flags = seeded_runs.split_flags(sys.argv[1:])
    return cli.run_command(
        "parity.py", lambda: run(parse_flags(Options, "parity.py", own_flags), flags)
    )


def run(options: Options, flags: list[str]) -> int:
    """Run what is missing, print the table and draw the curves; returns the exit status."""
    seeded_runs.require_options(flags, options.seeds, options.out)
    seeds = list(dict.fromkeys(options.seeds))
    folders = {way: [options.out / f"{way}-seed{seed}" for seed in seeds] for way in WAYS}
    configs = {
        folder: cli.parse_pretrain([*flags, f"--seed={seed}", f"--run-dir={folder}"])
        for way in WAYS
        for seed, folder in zip(seeds, folders[way], strict=True)
    }
    any_config = next(iter(configs.values()))  # only the seeds differ
    require_fixed(any_config)
    seeded_runs.require_readouts(any_config)
    for folder, config in configs.items():
        seeded_runs.require_same_flags(folder, config)
    for bt_fast_run, reference_run in zip(*folders.values(), strict=True):
        for folder in (bt_fast_run, reference_run):
            if seeded_runs.is_finished(folder):
                continue
            print(folder, flush=True)
            if folder == reference_run:
                if (folder / "config.json").exists():
                    print("interrupted before: runs of the reference start again at step 0")
                train_reference(configs[folder])
            elif status := seeded_runs.pretrain(folder, [*flags, f"--seed={configs[folder].seed}"]):
                print("stopped; repeat the command to continue")
                return status
    last = {way: [seeded_runs.probes(folder)[-1] for folder in folders[way]] for way in WAYS}
    text = table(last)
    write_text(options.out / "table.md", text, overwrite=True)
    metrics = {way: [folder / "metrics.jsonl" for folder in folders[way]] for way in WAYS}
    curves(metrics, options.out / "curves.png")
    print(text, end="")
    return 0


def require_fixed(config: Config) -> None:
    """Raise ValueError for a flag that the released code's way would not follow."""
    for name, value in FIXED.items():
        if (other := getattr(config, name)) != value:
            theirs, ours = (written(f"--{name.replace('_', '-')}", v) for v in (value, other))
            raise ValueError(
                f"the released code's way has {theirs}, not {ours}: change the flags after --, or"
                " add a recipe that has it, such as --recipe cifar10-cpu"
            )
    if is_of_library(config.encoder):
        raise ValueError(f"the released code's way has a ResNet, not --encoder {config.encoder}")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Means of both ways, and their difference with its interval, in Markdown; percent.

    The interval is Student's, at 95 %, of the pairs: runs of a seed start from the same weights.
    """
    lines = ["| | " + " | ".join(WAYS) + " | difference, 95 % interval |", "|---|---|---|---|"]
    for name, title in READOUTS.items():
        if name not in results[WAYS[0]][0]:  # too few images for this k
            continue
        ours, theirs = ([100 * run[name] for run in results[way]] for way in WAYS)
        cells = [
            f"{statistics.mean(values):.2f} ({', '.join(f'{value:.1f}' for value in values)})"
            for values in (ours, theirs)
        ]
        differences = [our - their for our, their in zip(ours, theirs, strict=True)]
        mean, interval = statistics.mean(differences), "no interval"
        if len(set(differences)) > 1:
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            half = stats.t.ppf(0.975, len(differences) - 1) * error
            interval = f"{mean - half:+.2f} to {mean + half:+.2f}"
        lines.append(f"| {title} | {' | '.join(cells)} | {mean:+.2f} ({interval}) |")
    return "\n".join(lines) + "\n"


def train_reference(config: Config) -> None:
    """Train by the released code's way; writes config, metrics and encoder of a run directory."""
    assert config.run_dir is not None
    setup = build(dataclasses.replace(config, workers=1, compile="off", norm="compiled"))
    device, steps_per_epoch = setup.runtime.device, setup.loader.steps_per_epoch
    torch.manual_seed(config.seed)
    step = reference.Step(
        config.encoder,
        config.projector,
        device,
        stem=config.stem,
        zero_init=config.zero_init,
        lambd=config.lambd,
        weight_decay=config.weight_decay,
    )
    views = reference.Views(config.size, (config.view_a, config.view_b), config.min_scale)
    images = reference.Images(setup.dataset, views)
    batches = reference.loader(images, config.batch_size, config.num_threads(), epochs=True)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunDirectory(config.run_dir))
        run.record_start(config, setup.runtime)
        run.truncate_metrics(0)
        console = Console(soft_wrap=True)
        log = stack.enter_context(RunLog(console, run.path, 0, setup.last_step))

        def probe(number: int) -> None:
            started = time.perf_counter()
            setup.model.encoder.load_state_dict(step.model[0].state_dict())
            setup.model.projector.load_state_dict(step.model[1].state_dict())
            readouts = measure(setup)
            seconds = time.perf_counter() - started
            epoch = number / steps_per_epoch
            log.probe({"step": number, "epoch": epoch, **readouts, "seconds": seconds})

        probe(0)
        number, started, logged = 0, time.perf_counter(), 0
        while number < setup.last_step:
            for view_a, view_b in batches:
                rates = {name: rate(number) for name, rate in setup.schedules.items()}
                for group in step.optimizer.param_groups:
                    group["lr"] = rates[group["name"]]
                on, off = step(view_a.to(device), view_b.to(device))
                number += 1
                if number % config.log_every == 0 or number == setup.last_step:
                    seconds, started = time.perf_counter() - started, time.perf_counter()
                    record = {
                        "step": number,
                        "epoch": number / steps_per_epoch,
                        "loss": (on + config.lambd * off).item(),
                        "on_diagonal": on.item(),
                        "off_diagonal": off.item(),
                        "lr_weights": rates["weights"],
                        "images_per_s": (number - logged) * config.batch_size / seconds,
                    }
                    log.training(record)
                    logged = number
                if probe_is_due(setup, number):
                    before_probe = time.perf_counter()
                    probe(number)
                    started += time.perf_counter() - before_probe
                if number == setup.last_step:
                    break
        export_encoder(setup.model, config, run.path)


if __name__ == "__main__":
    sys.exit(main())
