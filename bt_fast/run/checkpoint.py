"""Checkpoints, which are complete or absent.

    checkpoints/
      step-00000626/
        model.safetensors        parameters and batch statistics
        optimizer.safetensors    state of the optimizer, by parameter name
        state.json               step, facts, size and SHA-256 of each file, and its own SHA-256;
                                 written last

A checkpoint is written into a temporary folder, flushed to the disk and renamed. One whose files do
not match its state.json is invalid; resuming reports and skips it. Only safetensors and JSON are
read: no checkpoint can run code.

No random state is saved: order and views are functions of the step (`pipelines.order`).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bt_fast.finite import require_finite
from pipelines.common.atomic import sync

_FILES = ("model.safetensors", "optimizer.safetensors")
Tensors = dict[str, torch.Tensor]
_FORGED_JSON_ERRORS = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A valid checkpoint on the disk."""

    folder: Path
    step: int
    facts: dict[str, Any]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the tensors into model and optimizer. Raises ValueError if they do not fit or are
        not finite."""
        saved = tuple(_load(self.folder / name) for name in _FILES)
        way_out = "remove this folder to resume from an earlier checkpoint"
        for tensors, current in zip(saved, state(model, optimizer), strict=True):
            require_finite(tensors, str(self.folder), way_out)
            _require_same(tensors, current, self.folder)
        for tensors, current in zip(saved, state(model, optimizer), strict=True):
            for name, tensor in current.items():
                tensor.copy_(tensors[name])


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """(parameters and batch statistics, the optimizer's state), on their device.

    Names of the latter: PARAMETER for LARS's momentum, else PARAMETER@KEY, such as @exp_avg.
    """
    of_optimizer = {
        name if key == "momentum" else f"{name}@{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return model.state_dict(), of_optimizer


class Snapshot:
    """Host buffers for the tensors of a checkpoint, reused; page-locked for those of a GPU."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensors, Tensors] = {}, {}

    def take(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensors, Tensors]:
        """The `state`, row-major on the CPU.

        Valid until the next call; from a GPU, once the queued work has completed.
        """
        for tensors, copies in zip(state(model, optimizer), self.tensors, strict=True):
            for name, tensor in tensors.items():
                if name not in copies:
                    copies[name] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                copies[name].copy_(tensor.detach(), non_blocking=True)
        return self.tensors


def write(
    folder: Path, step: int, tensors: tuple[Tensors, Tensors], facts: dict[str, Any], *, keep: int
) -> Path:
    """Write checkpoints/step-N under `folder`, then remove all but the `keep` newest.

    facts: further state, as JSON. Raises OSError if writing fails; earlier checkpoints then stay.
    """
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f"{final.name}.tmp"
    for leftover in checkpoints.glob("step-*.tmp"):  # of a run that was killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = {}
        for name, part in zip(_FILES, tensors, strict=True):
            path = temporary / name
            write_tensors(part, path)
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            sync(path)
        content = {"step": step, "facts": facts, "files": files}
        text = json.dumps({**content, "sha256": _sha256_of_state(content)}, indent=2)
        (temporary / "state.json").write_text(text)
        sync(temporary / "state.json")
        sync(temporary)
        if final.exists():  # saved again after a resume: equal
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


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies on the CPU, row-major."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def write_tensors(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of new files: equal bytes for equal content.

    Raises OSError.
    """
    try:
        save_file(tensors, path, metadata)  # creates it readable for the owner alone
        if metadata is not None:
            _sort_metadata(path)
    except SafetensorError as error:
        what = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        raise OSError(f"{path.name}: {what}") from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file; their order is random otherwise."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, path
        file.seek(8)
        file.write(text)


def exists(folder: Path, *, before: float = math.inf) -> bool:
    """Whether there is a checkpoint of a step less than `before` under `folder`, valid or not."""
    return any(_step(path) < before for path in _folders(folder))


def newest(folder: Path, *, set_aside: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint under `folder`, and why each newer one is invalid.

    set_aside: rename invalid ones to step-N.damaged, so that they are not counted as newest.
    """
    problems: list[str] = []
    for candidate in _folders(folder):
        try:
            state = json.loads((candidate / "state.json").read_text())
            # Early checkpoints have no hash of state.json itself.
            if state.keys() != {"step", "facts", "files"} and (
                state.pop("sha256") != _sha256_of_state(state)
            ):
                raise ValueError("state.json differs from what was saved")
            for name in _FILES:
                facts = state["files"][name]
                path = candidate / name
                if path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
                    raise ValueError(f"{name} differs from what was saved")
            return Checkpoint(candidate, int(state["step"]), dict(state["facts"])), problems
        except (OSError, ValueError, *_FORGED_JSON_ERRORS) as error:
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
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _require_same(saved: Mapping, current: Mapping, source: Path) -> None:
    """Raise ValueError unless both have the same names, shapes and dtypes."""
    for name in sorted(saved.keys() ^ current.keys()):
        raise ValueError(f"{source} belongs to another model: only one of the two has {name}")
    for name, here in current.items():
        there = saved[name]
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise ValueError(
                f"{source} belongs to another model: {name} is {_format(there)} there and"
                f" {_format(here)} here"
            )


def _format(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _sha256_of_state(state: dict[str, Any]) -> str:
    """Checksum of state.json without this field, independent of spacing and order."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
