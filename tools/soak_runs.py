"""Processes of a run, killed by a signal or complete, and comparison of the results of runs."""

import json
import signal
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from bt_fast.distributed.signals import EXIT_STOPPED

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds for a process to end after a signal


@dataclass(kw_only=True, slots=True)
class Attempt:
    """One process of a run, from its start to its end."""

    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    status: int = 0
    sent: signal.Signals | None = None
    rss_mb: list[float] = field(default_factory=list)  # once a second from the first step
    files: list[int] = field(default_factory=list)  # open files, likewise
    output: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether it finished, or stopped by the signal, with a checkpoint or during start-up."""
        if self.sent is None:
            return self.status == 0
        return self.status in (0, EXIT_STOPPED, -self.sent)


def attempt(
    command: list[str], run: Path, log: Path, kill_after: float, number: signal.Signals
) -> Attempt:
    """Run `bt-fast pretrain`; send it a signal after `kill_after` seconds if it still runs."""
    done = Attempt()
    started = time.monotonic()
    before = num_lines(run)
    with open(log, "w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        sampled = 0.0
        while process.poll() is None:
            now = time.monotonic() - started
            if done.sent is None and now >= kill_after:
                process.send_signal(number)
                done.sent = number
            if now > kill_after + TIMEOUT:
                process.kill()
                done.sent = None  # counts as a failure
            if done.seconds_to_first_step is None and num_lines(run) > before:
                done.seconds_to_first_step = now
            if done.seconds_to_first_step is not None and now - sampled >= 1:
                sample(process.pid, done)
                sampled = now
            time.sleep(min(0.1, max(kill_after - now, 0.001)))
        done.status, done.seconds = process.wait(), time.monotonic() - started
        output.seek(0)
        done.output = output.read()
    return done


def num_lines(run: Path) -> int:
    """Number of training lines in the metrics; a resumed run first removes those it repeats."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"train"') if file.exists() else 0


def sample(process: int, done: Attempt) -> None:
    """Record resident memory and open files of a process, unless it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        open_files = len(list(Path(f"/proc/{process}/fd").iterdir()))
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return
    done.rss_mb.append(int(resident.split()[1]) / 1000)
    done.files.append(open_files)


def contents(run: Path) -> list[dict]:
    """Model, optimizer, encoder, and metrics without times of a run."""
    newest = max((run / "checkpoints").glob("step-????????"))
    tensors = [load_file(newest / f"{name}.safetensors") for name in ("model", "optimizer")]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = {}
    for record in map(json.loads, lines):
        values = {k: v for k, v in record.items() if k not in ("images_per_s", "seconds")}
        records[f"{record['kind']} {record['step']}"] = values
    assert len(records) == len(lines), "duplicate record"
    return [*tensors, load_file(run / "encoder.safetensors"), records]


def equal(one: dict, other: dict) -> bool:
    """Whether two dictionaries of tensors or values are equal, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def early_and_late(values: list) -> tuple[float, float]:
    """Medians of the second and the last tenth; the first tenth is the warm-up."""
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[tenth : 2 * tenth] or values), statistics.median(
        values[-tenth:]
    )
