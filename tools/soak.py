"""Kill pretraining again and again at random moments: it resumes, and learns what it would have.

    python tools/soak.py --minutes 60 --kills 30

One run is left alone; its memory and open files are watched. The others are killed (SIGKILL,
SIGTERM or SIGUSR1, at any moment of their lives, while they start as well) and started again, until
each has finished; then every tensor of the last checkpoint, the encoder and all metrics are
compared with those of the first. Further runs follow until the minutes are over and there were
enough kills. The result goes to OUT/soak.json; what a run left stays in OUT.
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

from bt_fast.cli import in_one_line
from bt_fast.run.console import duration
from pipelines.common.flags import parse_flags
from tools.soak_runs import Life, contents, ends, equal, live, num_lines

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
FLAGS = [
    "--recipe=demo", "--device=cpu", "--size=32", "--batch-size=32", "--projector", "64", "64",
    "--warmup-epochs=1", "--workers=2", "--probe-every=5", "--log-every=1",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """Kill runs at random moments, continue them, compare them with one that was left alone."""

    minutes: float = 60
    """Begin further runs until so much time is over."""
    kills: int = 30
    """Begin further runs until there were so many kills, too."""
    kills_per_run: int = 8
    """Kills that a run may expect."""
    images: int = 256
    """Training images."""
    epochs: int = 40
    """Of each run."""
    save_every: int = 2
    """Steps between checkpoints."""
    seed: int = 0
    """Of the moments and the signals."""
    data: Path | None = None
    """A .beton to train on. Default: pictures are drawn."""
    out: Path = Path("soak")
    """Folder for the runs and soak.json; must not exist."""


def draw_data(config: Soak) -> Path:
    """A .beton of drawn pictures in the folder of results."""
    out = config.out.resolve()  # the tools run in the checkout
    images, beton = out / "images", out / "out.beton"
    draw = [sys.executable, ROOT / "tools" / "make_demo_images.py", images, "--workers", "1"]
    held_out = config.images // 4
    for command in (
        [*draw, "--train", config.images, "--val", held_out],
        [sys.executable, "-m", "pipelines.convert.command", images, beton],
    ):
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"no data: {(done.stderr or done.stdout).strip()}")
    return config.out / "out.beton"


class Soaking:
    """What has happened so far."""

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
        """Starts the run, or goes on with what there is of it."""
        begun = (run / "config.json").exists()
        flags = ["--resume", str(run)] if begun else [*self.flags, "--run-dir", str(run)]
        return [sys.executable, "-m", "bt_fast.cli", "pretrain", *flags]

    def undisturbed(self) -> Life:
        """The run that all others are compared with."""
        run, log = self.out / "undisturbed", self.out / "undisturbed.log"
        life = live(self.command(run), run, log, float("inf"), signal.SIGKILL)
        if life.status or life.seconds_to_first_step is None:
            raise ValueError(f"the undisturbed run failed: {life.output.strip()}")
        return life

    def disturbed(self, mean_seconds: float) -> None:
        """One run to its end, killed on average every `mean_seconds`."""
        self.runs += 1
        run = self.out / f"run-{self.runs}"
        lives = 0
        while True:
            command = self.command(run)
            resuming = "--resume" in command
            after, how = self.random.uniform(0, 2 * mean_seconds), self.random.choice(SIGNALS)
            life = live(command, run, run.with_suffix(f".{lives}.log"), after, how)
            lives += 1
            self.resumes += resuming
            if not life.went_well:
                what = f"{run.name}, start {lives}: exit status {life.status} after {life.sent}"
                self.not_resuming.append(what)
                say(f"{what}:\n{life.output.strip()}")
                return
            if life.sent is not None and life.status != 0:
                self.kills[life.sent.name] += 1
                say(
                    f"{run.name}: kill {sum(self.kills.values())}, {life.sent.name} after"
                    f" {life.seconds:.1f} s, {num_lines(run)} steps logged"
                )
            if life.status == 0:
                break
        self.compare(run)
        say(f"{run.name}: finished at start {lives}; {len(self.differing)} runs differ so far")

    def compare(self, run: Path) -> None:
        """Note what a finished run has otherwise than the undisturbed one."""
        names = ("model", "optimizer", "encoder", "metrics")
        pairs = zip(names, contents(run), contents(self.out / "undisturbed"), strict=True)
        others = [name for name, ours, theirs in pairs if not equal(ours, theirs)]
        if others:
            self.differing.append(f"{run.name}: {', '.join(others)}")


def say(text: str) -> None:
    print(text, flush=True)


def soak(config: Soak) -> int:
    """Do it all; returns 1 if a run did not resume or differs."""
    if config.out.exists():
        raise ValueError(f"--out {config.out} exists; choose another folder")
    started = time.monotonic()
    config.out.mkdir(parents=True)
    soaking = Soaking(config, config.data or draw_data(config))
    alone = soaking.undisturbed()
    first_step = alone.seconds_to_first_step or 0.0
    training = alone.seconds - first_step
    mean = first_step + training / config.kills_per_run
    say(f"undisturbed: {duration(alone.seconds)}, {duration(first_step)} to the first step")
    say(f"a kill every {mean:.0f} s on average")
    while (
        sum(soaking.kills.values()) < config.kills
        or time.monotonic() - started < 60 * config.minutes
    ):
        soaking.disturbed(mean)
    rss, files = ends(alone.rss_mb), ends(alone.files)
    found = {
        "kills": sum(soaking.kills.values()),
        "by signal": soaking.kills,
        "resumes": soaking.resumes,
        "runs": soaking.runs,
        "runs that did not resume": soaking.not_resuming,
        "runs with differing results": soaking.differing,
        "undisturbed, minutes": round(alone.seconds / 60, 1),
        "undisturbed, RSS in MB, early and late": rss,
        "undisturbed, open files, early and late": files,
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    settings = {name: str(value) for name, value in asdict(config).items()}
    report = {**found, "settings": settings, "torch": torch.__version__}
    (config.out / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, value in found.items():
        say(f"{name:42} {len(value) if isinstance(value, list) else value}")
    return 1 if soaking.not_resuming or soaking.differing else 0


def main() -> int:
    return soak(parse_flags(Soak, "soak.py", None))


if __name__ == "__main__":
    sys.exit(in_one_line("soak.py", main))
