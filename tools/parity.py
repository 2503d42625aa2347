"""Compare what bt-fast learns with what the released code's way learns, on the same images.

    python tools/parity.py --seeds 0 1 2 -- --recipe cifar10-cpu --data cifar10.beton --epochs 10
    python tools/parity.py --seeds 0 1 2 -- --recipe cifar10 --data cifar10.beton --epochs 100

Flags of `bt-fast pretrain` follow `--`; the second line is for a GPU. The released code's way is
`reference.py`: views by Pillow in worker processes, the encoder called once per view, float16 with
a loss scaler on a GPU, the D x D matrix, LARS as a loop. Both ways have the same images, encoder,
projector, batch size, epochs and hyperparameters, and initialise with the same seeds, but their
random views differ; both are probed alike. OUT/WAY-seedN is the folder of a run; finished runs are
not repeated.
"""

import _checkout  # noqa: F401  # isort: skip

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import stats

from bt_fast import cli
from bt_fast.build import build
from bt_fast.config import Config
from bt_fast.distributed.signals import StopFlag
from bt_fast.pretrain_command import run_pretrain
from bt_fast.run.directory import RunDirectory, read_metrics
from bt_fast.run.metrics import RecordFile, metrics_line
from bt_fast.run.plots import curves
from bt_fast.run.probe import READOUTS, measure
from bt_fast.train import probe_is_due
from pipelines.common.flags import parse_flags
from tools import reference

WAYS = ("bt-fast", "reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Train by both ways over seeds. Flags of `bt-fast pretrain` follow --."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each way runs once with each."""
    out: Path = Path("parity")
    """Folder for all runs, the table and the picture."""


def main() -> int:
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own_flags, flags = arguments[:at], arguments[at + 1 :]
    return cli.run_command(
        "parity.py", lambda: run(parse_flags(Options, "parity.py", own_flags), flags)
    )


def run(options: Options, flags: list[str]) -> int:
    """Run what is missing, print the table and draw the curves; returns the exit status."""
    for seed in options.seeds:
        for way in WAYS:
            folder = options.out / f"{way}-seed{seed}"
            arguments = [*flags, "--seed", str(seed), "--run-dir", str(folder)]
            if (folder / "metrics.jsonl").exists() and final(folder):
                continue
            print(f"{folder}", flush=True)
            config = cli.parse_pretrain(arguments)
            if way == "reference":
                train_reference(config)
            elif status := run_pretrain(config, arguments, StopFlag()):
                return status
    folders = {way: [options.out / f"{way}-seed{seed}" for seed in options.seeds] for way in WAYS}
    text = table({way: [final(folder) for folder in folders[way]] for way in WAYS})
    (options.out / "table.md").write_text(text)
    metrics = {f.name: f / "metrics.jsonl" for way in WAYS for f in folders[way]}
    curves(metrics, options.out / "curves.png")
    print(text, end="")
    return 0


def final(folder: Path) -> dict[str, float]:
    """The readouts of a finished run's last probe; empty before that."""
    records = [record for _, record in read_metrics(folder / "metrics.jsonl")]
    train = [record for record in records if record["kind"] == "train"]
    probes = [record for record in records if record["kind"] == "probe"]
    done = train and probes and probes[-1]["step"] == train[-1]["step"]
    return {name: probes[-1][name] for name in READOUTS} if done else {}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means of both ways, and their difference with its interval, in Markdown; percent.

    The interval is Welch's, at 95 %: the ways are independent samples of few runs.
    """
    lines = ["| | " + " | ".join(WAYS) + " | difference, 95 % interval |", "|---|---|---|---|"]
    for name, title in READOUTS.items():
        ours, theirs = ([100 * run[name] for run in results[way]] for way in WAYS)
        cells = [
            f"{statistics.mean(values):.2f} ({', '.join(f'{value:.1f}' for value in values)})"
            for values in (ours, theirs)
        ]
        difference = statistics.mean(ours) - statistics.mean(theirs)
        interval = "one seed"
        if len(ours) > 1:
            test = stats.ttest_ind(ours, theirs, equal_var=False)
            low, high = test.confidence_interval(0.95)
            interval = f"{low:+.2f} to {high:+.2f}"
        lines.append(f"| {title} | {' | '.join(cells)} | {difference:+.2f} ({interval}) |")
    return "\n".join(lines) + "\n"


def train_reference(config: Config) -> None:
    """Train by the released code's way; writes the config and metrics of a run directory."""
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
    with RunDirectory(config.run_dir) as run:
        run.record_start(config, setup.runtime)
        (run.path / "metrics.jsonl").unlink(missing_ok=True)
        metrics = RecordFile(run.path / "metrics.jsonl")

        def probe(number: int) -> None:
            setup.model.encoder.load_state_dict(step.model[0].state_dict())
            setup.model.projector.load_state_dict(step.model[1].state_dict())
            readouts = measure(setup)
            record = {"step": number, "epoch": number / steps_per_epoch, **readouts}
            metrics.append(metrics_line("probe", record))
            print(f"epoch {record['epoch']:g}: {readouts}", flush=True)

        number, started, logged = 0, time.perf_counter(), 0
        probe(0)
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
                    metrics.append(metrics_line("train", record))
                    logged = number
                if probe_is_due(setup, number):
                    probe(number)
                if number == setup.last_step:
                    break
        metrics.close()


if __name__ == "__main__":
    sys.exit(main())
