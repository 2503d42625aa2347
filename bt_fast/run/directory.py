"""The run directory: created once, continued only on request, used by one process at a time.

runs/cifar10-20260101-120000/
  config.json          the resolved configuration
  environment.json     versions and hardware, one entry per start
  views.png            both views of some images
  metrics.jsonl        one JSON object per log line and probe
  curves.png           loss, readouts, rank, learning rate, images/s
  tensorboard/         the same for TensorBoard
  checkpoints/         see checkpoint.py
  encoder.safetensors  the trained encoder, torchvision's names
  slurm.sbatch         the job script of --slurm; slurm.log is its output
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import re
import socket
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy
import torch

from bt_fast.config import Config, to_json, with_absolute_paths
from bt_fast.runtime import Runtime
from pipelines import __version__
from pipelines.common.atomic import write_text
from pipelines.common.cpu import usable_cores

# Names in metrics.jsonl of earlier versions.
_RENAMED_METRICS = {"invariance": "on_diagonal", "redundancy": "off_diagonal"}


class RunDirectory:
    """A folder, created if necessary, that is locked while it is open; .lock names the process.

    The kernel releases the lock when the process ends, however it ends. Without locks in the
    file system, only a process of the same machine is detected.
    Raises ValueError if another process is using the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        owner = os.pread(self._lock, 1000, 0).decode(errors="replace")
        if self._is_locked(owner):
            os.close(self._lock)
            raise ValueError(
                f"{self.path} is in use by {owner or 'another process'}; wait for it, or stop it"
                " with SIGTERM"
            )
        self._write_owner(f"process {os.getpid()} on {socket.gethostname()}")
        for leftover in self.path.glob("*.tmp-*"):  # of a process that was killed while writing
            leftover.unlink(missing_ok=True)

    def _is_locked(self, owner: str) -> bool:
        """Whether another process holds the lock; acquires it otherwise."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks: rely on the owner's name in the file
            return re.fullmatch(r"process \d+ on .+", owner) is not None and _is_running_here(owner)
        return False

    def _write_owner(self, owner: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock works without a name
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, owner.encode(), 0)

    def write(self, name: str, text: str) -> None:
        """Replace one of the run's small files atomically."""
        try:
            write_text(self.path / name, text, overwrite=True)
        except OSError as error:
            raise OSError(f"{self.path / name}: {error.strerror or error}") from None

    def record_config(self, config: Config) -> None:
        """Write config.json, from which the run can be continued in any working directory."""
        # The job submitted by --slurm resumes the run; it does not submit again.
        saved = replace(with_absolute_paths(config), resume=None, slurm=None)
        self.write("config.json", to_json(saved))

    def record_start(self, config: Config, runtime: Runtime) -> None:
        """Write config.json, and append this start's versions and hardware to environment.json."""
        self.record_config(config)
        path = self.path / "environment.json"
        try:
            starts = json.loads(path.read_bytes()) if path.exists() else []
        except ValueError:
            starts = None
        if not isinstance(starts, list):
            raise ValueError(f"{path} is damaged: it is not a list of starts; move it away")
        starts.append(environment(runtime))
        self.write("environment.json", json.dumps(starts, indent=2) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Delete the lines after `step`: a resumed run writes them again."""
        path = self.path / "metrics.jsonl"
        kept = [line for line, record in read_metrics(path) if record["step"] <= step > 0]
        self.write("metrics.jsonl", "".join(kept))

    def close(self) -> None:
        self._write_owner("")
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _is_running_here(owner: str) -> bool:
    """Whether "process 12 on HOST" is another running process of this machine."""
    _, number, _, host = owner.split(maxsplit=3)
    alive = Path("/proc", number).exists()
    return alive and host == socket.gethostname() and number != str(os.getpid())


def read_metrics(path: Path) -> list[tuple[str, dict]]:
    """The complete lines of a metrics.jsonl, as text and parsed; a torn last line is left out."""
    found = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break  # a kill tore the line that was being written: it is the last
            if not (isinstance(record, dict) and "step" in record):
                break  # not written by bt-fast
            names = _RENAMED_METRICS
            found.append((line.decode(), {names.get(k, k): value for k, value in record.items()}))
    return found


def environment(runtime: Runtime) -> dict:
    """Versions and hardware on which the results of a run depend."""
    device = runtime.device
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "bt_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": usable_cores(),
        "precision": runtime.precision,
        "compile": runtime.compile,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def choose_path(config: Config) -> Path:
    """The run's folder. Raises ValueError if the folder of a new run is not empty."""
    if config.resume is not None:
        return config.resume
    path = config.run_dir or _unused(f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():  # a file, or a link that leads nowhere
        raise ValueError(f"--run-dir {path}: {nearest} is not a folder; choose another")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--run-dir {path}: no permission to write into {nearest}")
    if path.exists() and not _is_unused(path):
        raise ValueError(
            f"--run-dir {path} is not empty; continue its run with --resume {path} or choose"
            " another folder"
        )
    return path


def make_folder(config: Config) -> Path:
    """Create the folder that `choose_path` chooses; a generated name belongs to this run alone."""
    while True:
        path = choose_path(config)
        try:
            path.mkdir(parents=True, exist_ok=bool(config.resume or config.run_dir))
            return path
        except FileExistsError:  # by a run that started in the same second
            continue


def _unused(name: str) -> Path:
    """runs/NAME, or runs/NAME-2 and so on, if two runs start in the same second."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def _is_unused(path: Path) -> bool:
    """Whether the folder contains only the files of a start that was killed immediately."""
    return all(
        entry.name == ".lock" or entry.name.startswith("config.json.tmp-")
        for entry in path.iterdir()
    )
