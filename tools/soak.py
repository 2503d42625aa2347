"""Soak test: pretraining runs that are killed at random moments resume with equal results.

    python tools/soak.py --minutes 60 --kills 30

One run is undisturbed; its memory and open files are recorded. The other runs are killed (SIGKILL,
SIGTERM or SIGUSR1, at random moments, also during start-up) and restarted until they finish; then
every tensor of the last checkpoint, the encoder and all metrics are compared with those of the
undisturbed run. Further runs follow until both the minutes and the number of kills are reached.
The result is written to OUT/soak.json; the runs stay in OUT.
"""

import _checkout  # noqa: F401  # isort: skip

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bt_fast.cli import run_command
from bt_fast.run.console import duration
from pipelines.common.flags import parse_flags
from tools.soak_runs import Attempt, attempt, contents, early_and_late, equal, num_lines

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
    seed: int = 0
    """Seed of the moments and signals."""
    data: Path | None = None
    """Training images, a .beton. Default: generated images."""
    out: Path = Path("soak")
    """Folder for the runs and soak.json; must not exist."""


def draw_data(config: Soak) -> Path:
    """Write a .beton of generated images into the folder of results."""
    out = config.out.resolve()  # subprocesses run in the checkout
    images, beton = out / "images", out / "out.beton"
    draw = [sys.executable, ROOT / "tools" / "make_demo_images.py", images, "--workers", "1"]
    held_out = config.images // 4
    for command in (
        [*draw, "--train", config.images, "--val", held_out],
        [sys.executable, "-m", "pipelines.convert.command", images, beton],
    ):
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"cannot draw images: {(done.stderr or done.stdout).strip()}")
    return config.out / "out.beton"


class SoakTest:
    """Runs, and their counts so far."""

    def __init__(self, config: Soak, data: Path) -> None:
        self.config = config
        self.random = random.Random(config.seed)
        self.out = config.out.resolve()
        self.flags = [*FLAGS, f"--epochs={config.epochs}", f"--save-every={config.save_every}"]
        self.flags += ["--data", str(data.resolve())]
        self.kills = dict.fromkeys((number.name for number in SIGNALS), 0)
        self.resumes, self.runs = 0, 0
        self.not_resuming: list[str] = []
        self.differing: list[str] = []

    def command(self, run: Path) -> list[str]:
        """The command that starts or resumes a run."""
        is_started = (run / "config.json").exists()
        flags = ["--resume", str(run)] if is_started else [*self.flags, "--run-dir", str(run)]
        return [sys.executable, "-m", "bt_fast.cli", "pretrain", *flags]

    def run_undisturbed(self) -> Attempt:
        """Run the reference of all other runs."""
        run, log = self.out / "undisturbed", self.out / "undisturbed.log"
        done = attempt(self.command(run), run, log, float("inf"), signal.SIGKILL)
        if done.status or done.seconds_to_first_step is None:
            raise ValueError(f"the undisturbed run failed: {done.output.strip()}")
        return done

    def run_with_kills(self, mean_seconds: float) -> None:
        """Complete one run that is killed on average every `mean_seconds`."""
        self.runs += 1
        run = self.out / f"run-{self.runs}"
        num_starts = 0
        while True:
            command = self.command(run)
            after, number = self.random.uniform(0, 2 * mean_seconds), self.random.choice(SIGNALS)
            done = attempt(command, run, run.with_suffix(f".{num_starts}.log"), after, number)
            num_starts += 1
            self.resumes += "--resume" in command
            if not done.succeeded:
                title = f"{run.name}, start {num_starts}"
                failure = f"{title}: exit status {done.status} after {done.sent}"
                self.not_resuming.append(failure)
                report(f"{failure}:\n{done.output.strip()}")
                return
            if done.sent is not None and done.status != 0:
                self.kills[done.sent.name] += 1
                report(
                    f"{run.name}: kill {sum(self.kills.values())}, {done.sent.name} after"
                    f" {done.seconds:.1f} s, {num_lines(run)} steps logged"
                )
            if done.status == 0:
                break
        self.compare(run)
        report(f"{run.name}: finished at start {num_starts}; {len(self.differing)} differ so far")

    def compare(self, run: Path) -> None:
        """Record the differences between a finished run and the undisturbed run."""
        names = ("model", "optimizer", "encoder", "metrics")
        pairs = zip(names, contents(run), contents(self.out / "undisturbed"), strict=True)
        differing = [name for name, found, expected in pairs if not equal(found, expected)]
        if differing:
            self.differing.append(f"{run.name}: {', '.join(differing)}")


def report(text: str) -> None:
    print(text, flush=True)


def soak(config: Soak) -> int:
    """Run the soak test; returns 1 if a run did not resume or differs."""
    if config.out.exists():
        raise ValueError(f"--out {config.out} exists; choose another folder")
    started = time.monotonic()
    config.out.mkdir(parents=True)
    test = SoakTest(config, config.data or draw_data(config))
    alone = test.run_undisturbed()
    first_step = alone.seconds_to_first_step or 0.0
    training = alone.seconds - first_step
    mean = first_step + training / config.kills_per_run
    report(f"undisturbed: {duration(alone.seconds)}, {duration(first_step)} to the first step")
    report(f"a kill every {mean:.0f} s on average")
    while (
        sum(test.kills.values()) < config.kills or time.monotonic() - started < 60 * config.minutes
    ):
        test.run_with_kills(mean)
    rss, files = early_and_late(alone.rss_mb), early_and_late(alone.files)
    found = {
        "kills": sum(test.kills.values()),
        "by signal": test.kills,
        "resumes": test.resumes,
        "runs": test.runs,
        "runs that did not resume": test.not_resuming,
        "runs with differing results": test.differing,
        "undisturbed, minutes": round(alone.seconds / 60, 1),
        "undisturbed, RSS in MB, early and late": rss,
        "undisturbed, open files, early and late": files,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    settings = {name: str(value) for name, value in asdict(config).items()}
    result = {**found, "settings": settings, "torch": torch.__version__}
    (config.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in found.items():
        report(f"{name:42} {len(value) if isinstance(value, list) else value}")
    return 1 if test.not_resuming or test.differing else 0


def main() -> int:
    return soak(parse_flags(Soak, "soak.py", None))


if __name__ == "__main__":
    sys.exit(run_command("soak.py", main))
