"""Soak test: pretraining runs that are killed at random moments resume with equal results.

    python tools/soak.py --minutes 60 --kills 30

One run is undisturbed. The other runs are killed (SIGKILL, SIGTERM or SIGUSR1, at random moments,
also during start-up) and restarted until they finish; then every tensor of the last checkpoint, the
encoder and all metrics are compared with those of the undisturbed run. Further runs follow until
both the minutes and the number of kills are reached. The result is written to OUT/soak.json; the
runs stay in OUT.
"""

import _checkout  # noqa: F401  # isort: skip

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bt_fast.cli import run_command
from bt_fast.distributed.signals import EXIT_STOPPED
from bt_fast.run.console import duration
from pipelines.common.flags import parse_flags
from pipelines.convert.command import Convert, convert
from tools import make_demo_images

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
FLAGS = [
    "--recipe=demo", "--device=cpu", "--size=32", "--batch-size=32", "--projector", "64", "64",
    "--warmup-epochs=1", "--workers=2", "--probe-every=5", "--log-every=1",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """Kill runs at random moments, resume them and compare them with an undisturbed run."""

    minutes: float = 60
    """Minimum duration, minutes; further runs start until it is reached."""
    kills: int = 30
    """Minimum number of kills; further runs start until it is reached."""
    kills_per_run: int = 8
    """Expected number of kills per run."""
    images: int = 256
    """Number of training images."""
    epochs: int = 40
    """Number of epochs of each run."""
    save_every: int = 2
    """Steps between checkpoints."""
    out: Path = Path("soak")
    """Folder for the runs and soak.json; must not exist."""


def attempt(run: Path, flags: list[str], kill_after: float | None, number: int) -> tuple[int, bool]:
    """Start or resume a run; send a signal after `kill_after` seconds if it has not ended.

    Returns its exit status and whether the signal was sent.
    """
    is_started = (run / "config.json").exists()
    flags = ["--resume", str(run)] if is_started else [*flags, "--run-dir", str(run)]
    command = [sys.executable, "-m", "bt_fast.cli", "pretrain", *flags]
    with open(run.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        return process.wait(kill_after), False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    try:
        return process.wait(300), True
    except subprocess.TimeoutExpired:
        process.kill()
        raise ValueError(f"{run} did not end after signal {number}") from None


def run_with_kills(run: Path, flags: list[str], mean_seconds: float, kills: Counter[str]) -> bool:
    """Complete a run that is killed on average every `mean_seconds`. False if it fails."""
    while True:
        after, number = random.uniform(0, 2 * mean_seconds), random.choice(SIGNALS)
        status, is_sent = attempt(run, flags, after, number)
        if status not in ((0, EXIT_STOPPED, -number) if is_sent else (0,)):
            print(f"{run.name}: exit status {status}: {run.with_suffix('.log').read_text()}")
            return False
        if status == 0:
            return True
        kills[number.name] += 1
        print(f"{run.name}: {number.name} after {after:.1f} s", flush=True)


def contents(run: Path) -> dict:
    """Model, optimizer, encoder, and metrics without times of a run."""
    newest = max((run / "checkpoints").glob("step-????????"))
    found = {n: load_file(newest / f"{n}.safetensors") for n in ("model", "optimizer")}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_s", None)
        record.pop("seconds", None)
    records.sort(key=lambda record: (record["step"], record["kind"]))
    return found | {"encoder": load_file(run / "encoder.safetensors"), "metrics": records}


def differences(run: Path, other: Path) -> list[str]:
    """Names of the contents of two runs that are not equal, bit for bit."""

    def equal(a, b) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    expected = contents(other)
    return [name for name, found in contents(run).items() if not equal(found, expected[name])]


def soak(config: Soak) -> int:
    """Run the soak test; returns 1 if a run did not resume or differs."""
    if config.out.exists():
        raise ValueError(f"--out {config.out} exists; choose another folder")
    out = config.out.resolve()
    out.mkdir(parents=True)
    started = time.time()
    images = make_demo_images.Config(
        out=out / "images", train=config.images, val=config.images // 4, workers=1
    )
    make_demo_images.main(images)
    convert(Convert(source=images.out, out=out / "out.beton", workers=1))
    flags = [*FLAGS, f"--epochs={config.epochs}", f"--save-every={config.save_every}"]
    flags += ["--data", str(out / "out.beton")]

    alone, began = out / "undisturbed", time.time()
    status, _ = attempt(alone, flags, None, signal.SIGKILL)
    if status:
        raise ValueError(f"the undisturbed run failed: see {alone}.log")
    seconds = time.time() - began
    startup = (alone / "views.png").stat().st_mtime - began  # written before the first step
    mean = startup + (seconds - startup) / config.kills_per_run
    print(f"undisturbed: {duration(seconds)}; a kill every {mean:.0f} s on average", flush=True)

    kills: Counter[str] = Counter()
    failed, differing, num_runs = [], {}, 0
    while kills.total() < config.kills or time.time() - started < 60 * config.minutes:
        num_runs += 1
        run = out / f"run-{num_runs}"
        if not run_with_kills(run, flags, mean, kills):
            failed.append(run.name)
        elif found := differences(run, alone):
            differing[run.name] = found
    result = {
        "kills": kills,
        "runs": num_runs,
        "runs that did not resume": failed,
        "runs with different results": differing,
        "minutes": round((time.time() - started) / 60, 1),
    }
    (out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:28} {dict(value) if isinstance(value, Counter) else value}")
    return int(bool(failed or differing))


if __name__ == "__main__":
    sys.exit(run_command("soak.py", lambda: soak(parse_flags(Soak, "soak.py", None))))
