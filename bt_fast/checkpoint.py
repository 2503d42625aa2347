"""Checkpoints that are whole or not there.

    checkpoints/
      step-00000626/
        model.safetensors        parameters and batch statistics
        optimizer.safetensors    momentum, by parameter name
        state.json               step, facts, and each file's size and SHA-256; written last

A checkpoint is written into a temporary folder, flushed to the disk and renamed. One whose files
do not match its state.json is not valid and is passed over on resume, by name. Only safetensors
and JSON are read back: a checkpoint cannot run code.

Nothing random needs saving: order and views are functions of the step (`pipelines.order`).
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipelines.atomic import sync

_FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint on the disk."""

    folder: Path
    step: int
    facts: dict[str, Any]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the tensors into a model and optimizer of the same shape, in place."""
        saved = load_file(self.folder / "model.safetensors")
        _copy(saved, dict(model.state_dict()), self.folder)
        momentum = load_file(self.folder / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            if name in momentum:
                buffer = torch.empty_like(parameter).copy_(momentum.pop(name))
                optimizer.state[parameter]["momentum"] = buffer
        if momentum:
            raise ValueError(f"{self.folder} belongs to another model: it has {min(momentum)}")


def save(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write checkpoints/step-N under `folder`, then remove all but the `keep` newest.

    facts: what else must survive, as JSON. Raises OSError if the disk does not take it; the
    checkpoints that were there are then untouched.
    """
    momentum = {
        name: optimizer.state[parameter]["momentum"]
        for name, parameter in model.named_parameters()
        if "momentum" in optimizer.state.get(parameter, {})
    }
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f"{final.name}.tmp"
    for leftover in checkpoints.glob("step-*.tmp"):  # of a run that was killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for name, tensors in zip(_FILES, (model.state_dict(), momentum), strict=True):
            path = temporary / name
            write_tensors(tensors, path)
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            sync(path)
        state = temporary / "state.json"
        state.write_text(json.dumps({"step": step, "facts": facts, "files": files}, indent=2))
        sync(state)
        sync(temporary)
        if final.exists():  # a step saved twice, after a resume: the newer one is as good
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(checkpoints)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _folders(folder)[keep:]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file: on the CPU, row-major, readable for whom new files are.

    It appears whole or not at all. Raises OSError if the disk does not take it.
    """
    plain = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    try:
        save_file(plain, path)  # makes it readable for the owner alone
    except SafetensorError as error:
        what = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        raise OSError(f"{path.name}: {what}") from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def newest(folder: Path, *, set_aside: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint under `folder`, and why each newer one was passed over.

    set_aside: rename those to step-N.damaged, so that they no longer count among the newest.
    """
    problems: list[str] = []
    for candidate in _folders(folder):
        try:
            state = json.loads((candidate / "state.json").read_text())
            for name in _FILES:
                facts = state["files"][name]
                path = candidate / name
                if path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
                    raise ValueError(f"{name} is not as it was saved")
            return Checkpoint(candidate, int(state["step"]), dict(state["facts"])), problems
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{candidate.name}: {error}")
            if set_aside:
                damaged = candidate.with_suffix(".damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                candidate.rename(damaged)
    return None, problems


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [
        path
        for path in (folder / "checkpoints").glob("step-*")
        if path.name.removeprefix("step-").isdecimal()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _copy(saved: dict, current: dict, source: Path) -> None:
    """Copy saved tensors over the current ones; both must have the same names and shapes."""
    for name in sorted(saved.keys() ^ current.keys()):
        raise ValueError(f"{source} belongs to another model: only one of the two has {name}")
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{source} belongs to another model: {name} is {list(saved[name].shape)} there"
                f" and {list(tensor.shape)} here"
            )
        tensor.copy_(saved[name])


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
