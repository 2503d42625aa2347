"""One life of a run, from its start to a signal or its end; and what runs leave, compared."""

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
PATIENCE = 300.0  # seconds for a process to end after a signal


@dataclass(kw_only=True, slots=True)
class Life:
    """One process of a run, from its start to its end."""

    seconds: float = 0.0
    seconds_to_first_step: float | None = None
    status: int = 0
    sent: signal.Signals | None = None
    rss_mb: list[float] = field(default_factory=list)  # once a second, from its first step on
    files: list[int] = field(default_factory=list)  # open ones, likewise
    output: str = ""

    @property
    def went_well(self) -> bool:
        """It finished, or ended by our signal: having saved, or before it could listen."""
        if self.sent is None:
            return self.status == 0
        return self.status in (0, EXIT_STOPPED, -self.sent)


def live(command: list[str], run: Path, log: Path, kill_after: float, how: signal.Signals) -> Life:
    """Run `bt-fast pretrain`; send it a signal after so many seconds, if it is still there."""
    life = Life()
    started = time.monotonic()
    before = num_lines(run)
    with open(log, "w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
        sampled = 0.0
        while process.poll() is None:
            now = time.monotonic() - started
            if life.sent is None and now >= kill_after:
                process.send_signal(how)
                life.sent = how
            if now > kill_after + PATIENCE:
                process.kill()
                life.sent = None  # not as it was asked to: this life did not go well
            if life.seconds_to_first_step is None and num_lines(run) > before:
                life.seconds_to_first_step = now
            if life.seconds_to_first_step is not None and now - sampled >= 1:
                sample(process.pid, life)
                sampled = now
            time.sleep(min(0.1, max(kill_after - now, 0.001)))
        life.status, life.seconds = process.wait(), time.monotonic() - started
        output.seek(0)
        life.output = output.read()
    return life


def num_lines(run: Path) -> int:
    """Training lines in a run's metrics; a resumed run first cuts those it will repeat."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b'"train"') if file.exists() else 0


def sample(process: int, life: Life) -> None:
    """Note its resident memory and open files; the process may have ended just now."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        open_files = len(list(Path(f"/proc/{process}/fd").iterdir()))
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return
    life.rss_mb.append(int(resident.split()[1]) / 1000)
    life.files.append(open_files)


def contents(run: Path) -> list[dict]:
    """What a run has learned and logged: model, optimizer, encoder, metrics without times."""
    newest = max((run / "checkpoints").glob("step-????????"))
    tensors = [load_file(newest / f"{name}.safetensors") for name in ("model", "optimizer")]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = {}
    for record in map(json.loads, lines):
        values = {k: v for k, v in record.items() if k not in ("images_per_s", "seconds")}
        records[f"{record['kind']} {record['step']}"] = values
    assert len(records) == len(lines), "a record stands twice"
    return [*tensors, load_file(run / "encoder.safetensors"), records]


def equal(one: dict, other: dict) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def ends(values: list) -> tuple[float, float]:
    """Medians of the second and of the last tenth: the first is still warming up."""
    tenth = max(len(values) // 10, 1)
    return statistics.median(values[tenth : 2 * tenth] or values), statistics.median(
        values[-tenth:]
    )
