"""Launcher: where the ranks of a command run, and starting them.

`--gpus N` is the number of ranks in the whole run. They are started by

    torchrun or srun       this process is a rank: it joins the others, and refuses another N
    bt-fast under Slurm    srun starts them on the nodes of the job around this process
    bt-fast                they are processes of this machine, if it has N GPUs
    the user               otherwise: the launcher prints the command for each machine
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bt_fast.distributed import slurm, supervisor
from bt_fast.distributed.signals import StopFlag


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """How many ranks a command has, and where they run."""

    num_ranks: int
    num_local_gpus: int
    srun: list[str] | None  # the arguments of an srun command that starts the ranks
    on_gpus: bool

    @property
    def fits(self) -> bool:
        """Whether srun starts the ranks or this machine has enough GPUs for them."""
        enough = not self.on_gpus or self.num_ranks <= max(self.num_local_gpus, 1)
        return self.srun is not None or enough


def place_ranks(gpus: int | None, device: str, *, use_srun: bool) -> Placement:
    """Place `gpus` ranks; default: one per GPU of this machine, or one process."""
    on_gpus = device != "cpu"
    num_local_gpus = torch.cuda.device_count() if on_gpus else 0
    return Placement(
        num_ranks=gpus or max(num_local_gpus, 1),
        num_local_gpus=num_local_gpus,
        srun=slurm.srun(gpus, on_gpus=on_gpus) if use_srun and gpus else None,
        on_gpus=on_gpus,
    )


def start_ranks(placement: Placement, command: Sequence[str], stop: StopFlag) -> int:
    """Run `bt-fast COMMAND...` as ranks under the supervisor; returns the exit status."""
    if placement.srun is not None:
        return supervisor.run_under(placement.srun, command, stop)
    return supervisor.run_processes(command, placement.num_ranks, stop)


def several_machines(arguments: Sequence[str], placement: Placement, gpus_per_machine: int) -> str:
    """How to pretrain on more GPUs than this machine has: the command for each machine.

    gpus_per_machine: of the other machines, if this one has none.
    """
    most = min(placement.num_local_gpus or gpus_per_machine, placement.num_ranks)
    per_machine = next(n for n in range(most, 0, -1) if placement.num_ranks % n == 0)
    num_machines = placement.num_ranks // per_machine
    run_dir = "" if "--resume" in arguments else " --run-dir SHARED_FOLDER"
    return (
        f"bt-fast pretrain: --gpus {placement.num_ranks}, but this machine has"
        f" {placement.num_local_gpus} GPUs; add --slurm PARTITION on a Slurm cluster, --device cpu"
        f" to try it with processes, or run this on each of {num_machines} machines with"
        f" {per_machine} GPUs each:\n"
        f"  torchrun --nnodes {num_machines} --nproc-per-node {per_machine}"
        " --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 --rdzv-id bt-fast"
        f" --max-restarts {supervisor.MAX_RESTARTS} -m bt_fast.cli pretrain {shlex.join(arguments)}"
        f"{run_dir}"
    )
