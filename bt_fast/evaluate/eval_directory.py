"""The folder of one evaluation, named by everything that its result depends on: the same command
continues it, and no other command writes into it.

    RUN/eval/linear-1f0c9a52/
      facts.json             identity of the evaluation: encoder, images, protocol
      state.safetensors      state of an unfinished evaluation
      classifier.safetensors the trained classifier
      result.json            the result
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from bt_fast.distributed.collectives import World, broadcast_object
from bt_fast.finite import require_finite
from bt_fast.run.directory import RunDirectory
from pipelines.common.atomic import atomic_file
from pipelines.common.console import print_line

Tensors = Mapping[str, torch.Tensor]


class EvalDirectory(RunDirectory):
    """A folder that is locked while it is open; `identity` is what the result depends on."""

    def __init__(self, parent: Path, name: str, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, default=str)
        super().__init__(parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        self.write("facts.json", json.dumps(identity, indent=2, default=str) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The result of a finished evaluation, which is reported; else None."""
        file = self.path / "result.json"
        if not file.exists():
            return None
        print_line(f"already finished: {self.path}; remove that folder to repeat it")
        return json.loads(file.read_text())

    def save(self, tensors: Tensors, progress: dict[str, Any]) -> None:
        """Replace the state; `progress` is JSON."""
        self._write("state.safetensors", tensors, progress)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest state, tensors on the CPU, or None. Raises ValueError if it is damaged."""
        file = self.path / "state.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as opened:
                progress = json.loads(opened.metadata()["progress"])
                names = list(opened.keys())
                return {name: opened.get_tensor(name) for name in names}, progress
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it to start over") from None

    def finish(self, result: dict[str, Any], tensors: Tensors | None = None) -> dict[str, Any]:
        """Write the result and the classifier, remove the state; returns the result. Raises
        NotFinite for a classifier that is not finite."""
        if tensors is not None:
            require_finite(tensors, "the classifier", "lower the learning rates")
            self._write("classifier.safetensors", tensors, {})
        self.write("result.json", json.dumps(result, indent=2) + "\n")
        (self.path / "state.safetensors").unlink(missing_ok=True)
        return result

    def _write(self, name: str, tensors: Tensors, progress: dict[str, Any]) -> None:
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with atomic_file(self.path / name, overwrite=True) as file:
            file.write(safetensors.torch.save(on_cpu, {"progress": json.dumps(progress)}))


@contextlib.contextmanager
def open_eval_directory(
    parent: Path, name: str, identity: dict[str, Any], world: World
) -> Iterator[tuple[EvalDirectory | None, dict[str, Any] | None]]:
    """(the evaluation's folder, on the first rank only; a finished result, on every rank)."""
    with contextlib.ExitStack() as stack:
        folder = (
            stack.enter_context(EvalDirectory(parent, name, identity)) if world.is_first else None
        )
        yield folder, broadcast_object(folder and folder.result(), world.group)
