"""Runs of `bt-fast pretrain` by seed: finished ones are not repeated, others are resumed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bt_fast.config import (
    RESULTS_DEPEND_ON,
    Config,
    differences,
    load_config,
    with_absolute_paths,
)
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.evaluate.knn_classifier import choose_data, missing_classes
from bt_fast.run.directory import read_metrics
from pipelines.loading.datasets import open_data, open_val, require_full_batches

ROOT = Path(__file__).parents[1]
RESERVED_FLAGS = ("--ablation", "--seed", "--run-dir", "--resume", "--dry-run")


def split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The tool's own flags, and those of `bt-fast pretrain` after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def require_options(flags: list[str], seeds: tuple[int, ...], out: Path) -> None:
    """Raise ValueError for a flag after `--` that the tool sets for every run, for no seeds, or if
    the folder for the results is a file."""
    for flag in flags:
        if flag.partition("=")[0].replace("_", "-") in RESERVED_FLAGS:
            raise ValueError(f"{flag} after -- is set by the tool for every run; leave it out")
    if not seeds:
        raise ValueError("--seeds needs at least one seed, as in --seeds 0 1 2")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")


def require_readouts(config: Config) -> None:
    """Raise ValueError if a run could not begin, or would have no accuracies to compare."""
    train, val = open_data(config.data, "--data"), open_val(config.data, config.val_data)
    require_full_batches(config.batch_size, 1, len(train), config.data)
    if config.probe_every == 0:
        raise ValueError("--probe-every 0 leaves nothing to compare; leave it out")
    if choose_data(train, val, config.seed) is None:
        raise ValueError(f"accuracies are compared, and {missing_classes(train, val)}")


def require_same_flags(folder: Path, config: Config) -> None:
    """Raise ValueError if a run in the folder, finished or not, has other flags."""
    if not (folder / "config.json").exists():
        return
    saved = load_config(folder, "--out")
    config = dataclasses.replace(with_absolute_paths(config), run_dir=saved.run_dir)
    if changed := differences(config, saved, also=RESULTS_DEPEND_ON):
        raise ValueError(
            f"{folder} was started with other values of {' '.join(changed)};"
            " pass the same flags or another --out"
        )


def is_finished(folder: Path) -> bool:
    """Whether the run in the folder has exported its encoder."""
    return (folder / "encoder.safetensors").exists()


def probes(folder: Path) -> list[dict[str, Any]]:
    """The records of a finished run's probes; empty before it is finished. Raises ValueError if
    there is none of its end, because that probe failed."""
    if not is_finished(folder):
        return []
    records = [record for _, record in read_metrics(folder / "metrics.jsonl")]
    found = [record for record in records if record["kind"] == "probe"]
    if not found or found[-1]["step"] < max(record["step"] for record in records):
        raise ValueError(f"{folder}: the probe at the end of the run failed; nothing to compare")
    return found


def pretrain(folder: Path, flags: list[str]) -> int:
    """Train the run in the folder, or resume it; returns its exit status."""
    resumes = (folder / "config.json").exists()
    return bt_fast("pretrain", "--resume" if resumes else "--run-dir", folder, *flags)


def bt_fast(*words: object) -> int:
    """Run bt-fast in a new process, which a signal to this one stops; returns its exit status."""
    command = [sys.executable, "-m", "bt_fast", *map(str, words)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with StopFlag() as stop:
        stop.training = True  # Ctrl-C is a stop request, too
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
        try:
            while True:
                try:
                    status = process.wait(0.1)
                    return EXIT_STOPPED if stop.requested else status
                except subprocess.TimeoutExpired:
                    if stop.requested:
                        return EXIT_STOPPED
        finally:  # also at the second Ctrl-C
            process.terminate()
            process.wait()
