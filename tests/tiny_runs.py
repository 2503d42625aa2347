"""Runs of a few seconds for the tests."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from bt_fast.cli import main

# A small encoder on small views, with the same numbers whether or not the processor has bf16.
TINY = [
    "--recipe=cifar10-cpu", "--size=32", "--min-scale=0.25", "--device=cpu",
    "--precision=fp32", "--batch-size=16", "--projector", "32", "32", "--epochs=3",
    "--warmup-epochs=1", "--workers=2", "--probe-every=2", "--log-every=2",
]  # fmt: skip


def pretrain(*flags) -> int:
    """A tiny run in this process -> its exit status."""
    return main(["pretrain", *TINY, *map(str, flags)])


def start(*flags, tiny: bool = True, **options) -> subprocess.Popen:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "bt_fast.cli", "pretrain", *TINY * tiny, *map(str, flags)]
    return start_command(command, **options)


def start_command(command: list, **options) -> subprocess.Popen:
    """Start a command whose output and errors are read together."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), **streams, **options)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Wait for a checkpoint of `step` or later, of a run that saves at every step."""

    def saved() -> bool:
        found = (folder / "checkpoints").glob("step-????????")
        return any(int(path.name.removeprefix("step-")) >= step for path in found)

    wait_until(saved, process)


def wait_until(
    happened: Callable[[], bool],
    process: subprocess.Popen | None = None,
    *,
    timeout: float = 300,
) -> None:
    """Wait for a condition; fails when the process that should cause it has ended, or after
    `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        ended = process is not None and process.poll() is not None
        assert not ended, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def failing(owner, name: str, error: BaseException, *, at: int = 1, after: bool = False):
    """Call number `at` of a function raises an error, or does `after` its work; yields the list of
    the calls' arguments."""
    real, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        number = len(calls)
        if number == at and not after:
            raise error
        value = real(*arguments, **options)
        if number == at:
            raise error
        return value

    with mock.patch.object(owner, name, call):
        yield calls


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def probes_of(folder: Path) -> list[dict]:
    return [record for record in metrics(folder) if record["kind"] == "probe"]


def comparable(records: list[dict]) -> list[dict]:
    """Without times and rates."""
    drop = ("images_per_s", "seconds")
    return [{k: v for k, v in record.items() if k not in drop} for record in records]


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-????????"))
    files = {name: load_file(newest / f"{name}.safetensors") for name in ("model", "optimizer")}
    return {f"{name}/{key}": value for name, file in files.items() for key, value in file.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def evaluate(run: Path, out: Path, command: str, *flags) -> int:
    """An evaluation in this process -> its exit status."""
    common = ["--device=cpu", "--precision=fp32", "--workers=2", "--out", str(out)]
    return main(["eval", command, str(run), *common, *map(str, flags)])


def result(out: Path) -> dict:
    """The result of the only evaluation in a folder."""
    (file,) = out.glob("*/result.json")
    return json.loads(file.read_text())


def classifier(out: Path) -> dict[str, torch.Tensor]:
    """The trained classifier of the only evaluation in a folder."""
    (file,) = out.glob("*/classifier.safetensors")
    return load_file(file)
