"""The folder of one evaluation: named by everything that decides its result, so that running the
same command again continues it, and another one leaves it alone.

    RUN/eval/linear-1f0c9a52/
      facts.json             what is evaluated, on what, how
      state.safetensors      where it stands, until it is done
      classifier.safetensors the trained classifier
      result.json            what it found
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

from bt_fast.distributed.collectives import World, from_first
from bt_fast.run.directory import RunDirectory
from pipelines.common.atomic import atomic_file
from pipelines.common.console import say

Tensors = Mapping[str, torch.Tensor]


class EvalFolder(RunDirectory):
    """A folder that holds a lock while it is open; see the module.

    Args:
        parent: the encoder's eval/ folder.
        name: the evaluation's.
        facts: JSON; everything that decides the result.
    """

    def __init__(self, parent: Path, name: str, facts: dict[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True, default=str)
        super().__init__(parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        self.write("facts.json", json.dumps(facts, indent=2, default=str) + "\n")

    def result(self) -> dict[str, Any] | None:
        """What was found, if it was done before; says so."""
        file = self.path / "result.json"
        if not file.exists():
            return None
        say(f"done before: {self.path}; remove that folder to repeat it")
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
        """Keep the result and the classifier; the state is no longer needed."""
        if tensors is not None:
            self._write("classifier.safetensors", tensors, {})
        self.write("result.json", json.dumps(result, indent=2) + "\n")
        (self.path / "state.safetensors").unlink(missing_ok=True)
        return result

    def _write(self, name: str, tensors: Tensors, progress: dict[str, Any]) -> None:
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with atomic_file(self.path / name, overwrite=True) as file:
            file.write(safetensors.torch.save(plain, {"progress": json.dumps(progress)}))


@contextlib.contextmanager
def shared_folder(
    parent: Path, name: str, facts: dict[str, Any], world: World
) -> Iterator[tuple[EvalFolder | None, dict[str, Any] | None]]:
    """(the evaluation's folder, on the first rank only; what was found before, on every rank)."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(EvalFolder(parent, name, facts)) if world.is_first else None
        yield folder, from_first(folder and folder.result(), world.group)
