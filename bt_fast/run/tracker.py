"""Weights & Biases beside metrics.jsonl and TensorBoard, for `--tracker wandb`.

Its records are the same. Without a key or a network it records offline, into RUN/wandb, for
`wandb sync`; WANDB_MODE decides otherwise. Nothing that it raises ends a run.
"""

import contextlib
import dataclasses
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bt_fast.config import Config


def require_wandb() -> None:
    """Raise ValueError if wandb is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ValueError("--tracker wandb needs pip install 'bt-fast[wandb]'") from None


class WandbFile:
    """A run of wandb as a record file: its errors are OSErrors, which the log reports once."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self._run: Any = None
        file = folder / "wandb-id"  # of its own, because folders of two machines may share names
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        with _as_os_error():
            self._run = wandb.init(
                project="bt-fast",
                name=folder.name,
                id=file.read_text().strip(),
                resume="allow",
                dir=folder,
                config=dataclasses.asdict(config),
                mode=_mode(),
            )

    def append(self, record: tuple[str, dict]) -> None:
        """Log a record; steps that a resumed run repeats are dropped by wandb."""
        kind, values = record
        scalars = {f"{kind}/{k}": v for k, v in values.items() if k != "step"}
        with _as_os_error():
            self._run.log(scalars, step=values["step"])

    def close(self) -> None:
        """Complete the files of the run."""
        with _as_os_error():
            self._run.finish()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # wandb raises exceptions of many kinds
        raise OSError(f"wandb: {error}") from None


def _mode() -> Any:
    """WANDB_MODE, else "online" with a key and a network, else "offline"."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb

    if not wandb.api.api_key:
        return "offline"
    try:
        socket.create_connection(("api.wandb.ai", 443), timeout=2).close()
    except OSError:
        return "offline"
    return "online"
