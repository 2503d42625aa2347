"""From one command to all ranks.

`--gpus N` is the number of ranks in the whole run. Who starts them:

    torchrun or srun did       this process is a rank: it joins, and refuses another N
    a Slurm job is around us   srun does, over its nodes
    they fit on this machine   they are processes of this one
    otherwise                  what to type on every machine is printed, and the exit status is 2

With `--slurm` the run is submitted, and all this happens in its job.
"""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from bt_fast.config import Config
from bt_fast.distributed import collectives, rendezvous, slurm, supervisor
from bt_fast.distributed.collectives import World
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.plan import step_costs
from bt_fast.plan.dry_run import plan
from bt_fast.run.console import summary_table
from bt_fast.run.directory import RunDirectory, choose_path, load_config, make_folder
from bt_fast.runtime import OUT_OF_MEMORY, is_out_of_memory
from bt_fast.train import pretrain
from pipelines.loading.choose import open_data
from pipelines.loading.native import require_full_batches

_STATUS = "BT_FAST_STATUS"  # a file for the exit status that torchrun does not pass on


def launch(config: Config, arguments: Sequence[str], stop: StopFlag) -> int:
    """Run `bt-fast pretrain`; `arguments` are its flags, for the ranks. Returns the exit status."""
    slurm.adopt()
    if config.slurm is not None:
        return submit(config, config.slurm)
    config = resumed(config)
    if "RANK" in os.environ:
        return run_rank(config, stop)
    num_here = torch.cuda.device_count() if config.device != "cpu" else 0
    wanted = config.gpus or max(num_here, 1)
    if config.dry_run and (wanted > 1 or not config.data.exists()):
        rows = {"recipe": config.title} | plan(config, wanted)
        Console(soft_wrap=True).print(summary_table("bt-fast pretrain, the plan", rows))
        return 0
    on_gpus = config.device != "cpu"
    launcher = slurm.srun(config.gpus, on_gpus=on_gpus) if config.gpus else None
    if not launcher and wanted == 1:
        return pretrain(config, stop)
    if not launcher and config.device != "cpu" and wanted > num_here:
        collectives.require_shares(config.batch_size, wanted, config.bn_group)
        print(elsewhere(arguments, wanted, num_here), file=sys.stderr)
        return 2
    check(config, wanted)
    folder = config.resume or make_folder(config)
    if config.resume is None:  # a name that outlives a restart
        arguments = [*arguments, "--run-dir", str(folder)]
    if launcher:
        status = supervisor.under(launcher, ["pretrain", *arguments], stop)
    else:
        status = supervisor.here(["pretrain", *arguments], wanted, stop)
    if status == supervisor.EXIT_REFUSED:
        with contextlib.suppress(OSError):  # unless something is in it
            folder.rmdir()
    return status


def submit(config: Config, partition: str) -> int:
    """Hand the run to Slurm, or show with `--dry-run` what would be handed over."""
    if config.gpus is None:
        raise ValueError(f"--slurm {partition} needs --gpus, the number of ranks")
    path = choose_path(config).absolute()
    script = slurm.script(config, config.gpus, partition, path)
    if config.data.exists() or not config.dry_run:
        check(config, config.gpus)
    if config.dry_run:
        print(script, end="")
        return 0
    slurm.submit(config, script, path)
    return 0


def resumed(config: Config) -> Config:
    """With the same flags as before, a restart continues the run that the first start began."""
    path = config.run_dir
    if path is None or config.resume is not None or not rendezvous.restarts():
        return config
    if (path / "config.json").exists():
        loader = load_config(path, "--run-dir").loader  # auto would measure again
        return dataclasses.replace(config, resume=path, loader=loader)
    return config


def check(config: Config, wanted: int) -> None:
    """What every rank would complain about, said once."""
    reader = open_data(config.data, "--data")
    require_full_batches(config.batch_size, wanted, len(reader), config.data)
    collectives.require_shares(config.batch_size, wanted, config.bn_group)
    if config.resume is not None:
        RunDirectory(config.resume).close()


def run_rank(config: Config, stop: StopFlag) -> int:
    """Be one of the ranks that torchrun, srun or bt-fast itself started."""
    world = join(config.device, config.gpus, config.patience)
    try:
        status = pretrain(config, stop, world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        give_up("bt-fast pretrain", world, error)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # It would take a stop for a failure, start again, and pass no status on.
        if world.is_first and _STATUS in os.environ:
            Path(os.environ[_STATUS]).write_text(f"{status}\n")
        status = 0 if status == EXIT_STOPPED else status
    return end_rank(world, status)


def end_rank(world: World, status: int) -> int:
    """Part from the other ranks and end this process with a status; alone, just return it.

    Not by way of the interpreter, whose clearing up a thread of torch's has aborted, seldom and
    under load: what was a finished run would be started again.
    """
    rendezvous.leave()
    if world.size == 1:
        return status
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def give_up(program: str, world: World, error: Exception) -> NoReturn:
    """Say why this rank stops, and stop at once: what hangs would hang the way out, too.

    Of all ranks the first says it. What will be the same the next time is not tried again.
    """
    refused = isinstance(error, ValueError)
    reason = str(error).strip().partition("\n")[0]
    who = "" if refused else f"rank {world.rank} stops: "
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        refused, reason = True, OUT_OF_MEMORY
    elif isinstance(error, RuntimeError) and (silent := rendezvous.silent_ranks(world)):
        reason += f"; ranks {silent} do not answer"
    if rendezvous.is_first_to_say():  # the others may only miss the one that said it
        print(f"{program}: {who}{reason}", file=sys.stderr, flush=True)
    os._exit(supervisor.EXIT_REFUSED if refused else 1)


def join(device: str, gpus: int | None, patience: float) -> World:
    """Meet the other ranks, with this rank's share of a CPU's threads. Raises ValueError if there
    are not `gpus` of them."""
    world = rendezvous.described()
    if gpus not in (None, world.size):
        raise ValueError(
            f"--gpus {gpus}, but {world.size} ranks were started; leave --gpus out or start as many"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
    return rendezvous.join(where, patience)


def elsewhere(arguments: Sequence[str], wanted: int, num_here: int) -> str:
    """What to type where, for more GPUs than this machine has."""
    most = num_here or step_costs.RANKS_PER_MACHINE
    here = next(n for n in range(min(most, wanted), 0, -1) if wanted % n == 0)
    machines = wanted // here
    folder = "" if "--resume" in arguments else " --run-dir SHARED_FOLDER"
    command = (
        f"torchrun --nnodes {machines} --nproc-per-node {here} --rdzv-backend c10d"
        " --rdzv-endpoint FIRST_MACHINE:29500 --rdzv-id bt-fast"
        f" --max-restarts {supervisor.MAX_RESTARTS} -m bt_fast.cli pretrain {shlex.join(arguments)}"
        f"{folder}"
    )
    return (
        f"bt-fast pretrain: --gpus {wanted}, but this machine has {num_here}; add --slurm PARTITION"
        " on a Slurm cluster, --device cpu to try it with processes, or type this on each of"
        f" {machines} machines with {here} each:\n  {command}"
    )
