"""From one command to all ranks.

`--gpus N` is the number of ranks in the whole run. Who starts them:

    torchrun or srun did       this process is a rank: it joins, and refuses another N
    a Slurm job is around us   srun does, over its nodes
    they fit on this machine   they are processes of this one
    otherwise                  what to type on every machine is printed, and the exit status is 2

With `--slurm` the run is submitted, and all this happens in its job.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bt_fast import dist, perf, slurm, start
from bt_fast.config import Config
from bt_fast.dist import World
from bt_fast.log import summary_table
from bt_fast.plan import plan
from bt_fast.run_directory import RunDirectory, choose_path, make_folder
from bt_fast.signals import EXIT_STOPPED, StopFlag
from bt_fast.train import pretrain
from pipelines.loader import require_full_batches
from pipelines.loaders import open_data

_STATUS = "BT_FAST_STATUS"  # a file for the exit status that torchrun does not pass on


def launch(settings: Config, arguments: Sequence[str], stop: StopFlag) -> int:
    """Run `bt-fast pretrain`; `arguments` are its flags, for the ranks. Returns the exit status."""
    slurm.adopt()
    if settings.slurm is not None:
        return submit(settings, settings.slurm)
    settings = resumed(settings)
    if "RANK" in os.environ:
        return run_rank(settings, stop)
    num_here = torch.cuda.device_count() if settings.device != "cpu" else 0
    wanted = settings.gpus or max(num_here, 1)
    if settings.dry_run and (wanted > 1 or not settings.data.exists()):
        rows = {"recipe": settings.title} | plan(settings, wanted)
        Console(soft_wrap=True).print(summary_table("bt-fast pretrain, the plan", rows))
        return 0
    on_gpus = settings.device != "cpu"
    launcher = slurm.srun(settings.gpus, on_gpus=on_gpus) if settings.gpus else None
    if not launcher and wanted == 1:
        return pretrain(settings, stop)
    if not launcher and settings.device != "cpu" and wanted > num_here:
        print(elsewhere(arguments, wanted, num_here), file=sys.stderr)
        return 2
    check(settings, wanted)
    if settings.resume is None:  # a name that outlives a restart
        arguments = [*arguments, "--run-dir", str(make_folder(settings))]
    if launcher:
        return start.under(launcher, ["pretrain", *arguments], stop)
    return start.here(["pretrain", *arguments], wanted, stop)


def submit(settings: Config, partition: str) -> int:
    """Hand the run to Slurm, or show with `--dry-run` what would be handed over."""
    if settings.gpus is None:
        raise ValueError(f"--slurm {partition} needs --gpus, the number of ranks")
    path = choose_path(settings).absolute()
    script = slurm.script(settings, settings.gpus, partition, path)
    if settings.dry_run:
        print(script, end="")
        return 0
    check(settings, settings.gpus)
    slurm.submit(settings, script, path)
    return 0


def resumed(settings: Config) -> Config:
    """With the same flags as before, a restart continues the run that the first start began."""
    path = settings.run_dir
    begun = path is not None and (path / "config.json").exists()
    if dist.restarts() and settings.resume is None and begun:
        return dataclasses.replace(settings, resume=path)
    return settings


def check(settings: Config, wanted: int) -> None:
    """What every rank would complain about, said once."""
    reader = open_data(settings.data, "--data")
    require_full_batches(settings.batch_size, wanted, len(reader), settings.data)
    if settings.batch_size < 2 * wanted:
        raise ValueError(
            f"--batch-size {settings.batch_size} is less than 2 for each of {wanted} ranks"
        )
    if settings.resume is not None:
        RunDirectory(settings.resume).close()
    dist.require_equal_groups(wanted, settings.bn_group)


def run_rank(settings: Config, stop: StopFlag) -> int:
    """Be one of the ranks that torchrun, srun or bt-fast itself started."""
    world = join(settings.device, settings.gpus, settings.patience)
    try:
        status = pretrain(settings, stop, world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        # What will be the same the next time is not tried again.
        refused = isinstance(error, ValueError)
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, RuntimeError) and perf.is_out_of_memory(error):
            refused, reason = True, perf.OUT_OF_MEMORY
        elif isinstance(error, RuntimeError) and (silent := dist.silent_ranks(world)):
            reason += f"; ranks {silent} do not answer"
        print(f"bt-fast pretrain: rank {world.rank} stops: {reason}", file=sys.stderr, flush=True)
        os._exit(start.EXIT_REFUSED if refused else 1)  # what hangs would hang the way out too
    finally:
        dist.leave()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return status
    # torchrun would take a stop for a failure, start again, and pass no status on.
    if world.is_first and _STATUS in os.environ:
        Path(os.environ[_STATUS]).write_text(f"{status}\n")
    return 0 if status == EXIT_STOPPED else status


def join(device: str, gpus: int | None, patience: float) -> World:
    """Meet the other ranks, with this rank's share of a CPU's threads. Raises ValueError if there
    are not `gpus` of them."""
    world = dist.described()
    if gpus not in (None, world.size):
        raise ValueError(
            f"--gpus {gpus}, but {world.size} ranks were started; leave --gpus out or start as many"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
    return dist.join(where, patience)


def elsewhere(arguments: Sequence[str], wanted: int, num_here: int) -> str:
    """What to type where, for more GPUs than this machine has."""
    here = max(num_here, 1)
    machines = -(-wanted // here)
    command = (
        f"torchrun --nnodes {machines} --nproc-per-node {here} --rdzv-backend c10d"
        " --rdzv-endpoint FIRST_MACHINE:29500 --rdzv-id bt-fast"
        f" --max-restarts {start.MAX_RESTARTS} -m bt_fast.cli pretrain {' '.join(arguments)}"
        " --run-dir SHARED_FOLDER"
    )
    return (
        f"bt-fast pretrain: --gpus {wanted}, but this machine has {num_here}; add --slurm PARTITION"
        f" on a Slurm cluster, or type this on each of {machines} machines with {here} each:"
        f"\n  {command}"
    )
