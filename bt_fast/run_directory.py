"""The folder of one run: made once, continued only when asked, owned by one process.

runs/cifar10-20260101-120000/
  config.json          the resolved configuration
  environment.json     versions and hardware, one entry per start
  views.png            both views of some images
  metrics.jsonl        one JSON object per log line and probe
  curves.png           loss, learning rate, kNN, images/s
  tensorboard/         the same for TensorBoard
  checkpoints/         see checkpoint.py
  encoder.safetensors  the trained encoder, torchvision's names
"""

import fcntl
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy
import torch
import torchvision

from bt_fast import __version__, config
from bt_fast.config import Config
from bt_fast.perf import Performance
from pipelines.atomic import atomic_file
from pipelines.flags import usable_cores


class RunDirectory:
    """The folder `choose_path` chose, made if need be. Holds a lock while it is open.

    Raises ValueError if another process is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(f"{self.path} is in use by another running process") from None
        except OSError:
            pass  # a file system without locks: the user minds what runs where

    def write(self, name: str, text: str) -> None:
        """Replace one of the run's small files as a whole."""
        with atomic_file(self.path / name, overwrite=True) as file:
            file.write(text.encode())

    def write_config(self, settings: Config) -> None:
        """Write config.json, with which the run can be resumed."""
        saved = replace(
            settings,
            resume=None,
            data=settings.data.resolve(),  # so that the run can be continued from any folder
            val_data=settings.val_data and settings.val_data.resolve(),
        )
        self.write("config.json", config.to_json(saved))

    def record_start(self, settings: Config, performance: Performance) -> None:
        """Write config.json, and append this start's versions and hardware to environment.json."""
        self.write_config(settings)
        path = self.path / "environment.json"
        starts = json.loads(path.read_text()) if path.exists() else []
        starts.append(environment(performance))
        self.write("environment.json", json.dumps(starts, indent=2) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run writes those lines again."""
        path = self.path / "metrics.jsonl"
        kept = [line for line, record in read_metrics(path) if record["step"] <= step > 0]
        self.write("metrics.jsonl", "".join(kept))

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[tuple[str, dict]]:
    """The whole lines of a metrics.jsonl, as text and parsed. A torn last line is left out."""
    found = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            try:
                found.append((line, json.loads(line)))
            except json.JSONDecodeError:
                break  # a kill tore the line that was being written; nothing follows it
    return found


def load_config(path: Path, flag: str) -> Config:
    """The configuration a run was started with. Raises ValueError if there is no run."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{flag} {path}: no run is there (it has no config.json)")
    return config.from_json(file.read_text(), file)


def environment(performance: Performance) -> dict:
    """What a figure of this run depends on beside its configuration."""
    device = performance.device
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "bt_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": usable_cores(),
        "precision": performance.precision,
        "compile": performance.compile,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def choose_path(settings: Config) -> Path:
    """The run's folder. Raises ValueError if a new run's is there already and not empty."""
    if settings.resume is not None:
        return settings.resume
    named = f"{settings.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = settings.run_dir or Path("runs") / named
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--run-dir {path}: no permission to write into {nearest}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"--run-dir {path} is in use; continue it with --resume {path} or choose another folder"
        )
    return path
