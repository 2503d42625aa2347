"""Pretraining from Python: a script, a notebook or a thread."""

import contextlib
import dataclasses
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bt_fast.ablations import ablate
from bt_fast.config import Config, load_config, require_fields, resumed
from bt_fast.distributed.ranks import adopt_rank
from bt_fast.distributed.signals import StopFlag
from bt_fast.export.encoder_files import load_encoder
from bt_fast.recipes import RECIPES
from bt_fast.run.directory import make_folder, read_metrics
from bt_fast.train import pretrain as train_pretrain

_ONE_RUN = threading.Lock()  # the seed is that of torch's generator, which all threads share


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    path: Path  # the run directory

    @property
    def encoder(self) -> nn.Module:
        """The trained encoder, on the CPU, in evaluation mode; see `load_encoder`."""
        return load_encoder(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl: log lines ("kind": "train") and probes ("probe")."""
        return [record for _, record in read_metrics(self.path / "metrics.jsonl")]


def pretrain(config: Config | None = None, *, recipe: str | None = None, **fields: Any) -> Run:
    """Pretrain an encoder in this process, on one device.

    Installs no signal handlers, so it works in a notebook, where progress appears in the cell, and
    in a thread, one run at a time. Several GPUs need the command `bt-fast pretrain --gpus N`. What
    the run sets in torch stays: the seed, the device, TF32, cuDNN's search and deterministic
    algorithms.

    Args:
        config: the configuration; default: the recipe's. `Config(...)` has the values of recipe
            imagenet for every field that is not given, whatever its `recipe` and `ablation` say.
        recipe: name of a recipe, if there is no config and no run is resumed; default: imagenet.
        fields: fields of `Config` to change, such as data="out.beton", epochs=10, resume="runs/x".

    Returns:
        the run: `path`, `encoder`, `metrics`.

    Raises:
        ValueError: an unknown recipe or field, an invalid value, data that cannot be trained on, or
            a run whose loss is not finite.
        RuntimeError: the device has too little memory.
        OSError: the last checkpoint or the encoder could not be written.
    """
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config must be a Config, got {config!r}; a recipe is named by recipe=")
    if config is not None and recipe is not None:
        raise ValueError("config has all values of a run; leave recipe out")
    recipe = recipe or "imagenet"
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    require_fields(Config, fields, "bt_fast.Config")
    saved = (
        load_config(Path(fields["resume"]), "resume") if fields.get("resume") is not None else None
    )
    config = config or saved or RECIPES[recipe]()
    if saved is not None:
        config = dataclasses.replace(config, run_dir=saved.run_dir)
    elif fields.get("ablation") is not None:
        config = ablate(config, fields["ablation"])
    config = resumed(dataclasses.replace(config, **fields), saved)
    if adopt_rank():
        raise ValueError("this process is one of several ranks; start bt-fast pretrain instead")
    if config.dry_run or config.slurm is not None or config.gpus not in (None, 1):
        raise ValueError("dry_run, slurm and several gpus need the command bt-fast pretrain")
    if not _ONE_RUN.acquire(blocking=False):
        raise ValueError("another thread is training; wait for it, or use a process of its own")
    try:
        path = make_folder(config)
        if config.resume is None:
            config = dataclasses.replace(config, run_dir=path)
        try:
            status = train_pretrain(config, StopFlag())
        except BaseException:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
            raise
    finally:
        _ONE_RUN.release()
    if status:
        raise OSError(f"{path}: not everything was saved; free disk space and resume it")
    return Run(path)
