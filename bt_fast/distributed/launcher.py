"""Launcher: where the ranks of a command run, starting them, and restarting them when one dies.

`--gpus N` is the number of ranks in the whole run. They are started by

    torchrun or srun       this process is a rank: it joins the others, and refuses another N
    bt-fast under Slurm    srun starts them on the nodes of the job around this process
    bt-fast                they are processes of this machine, if it has N GPUs
    the user               otherwise: the launcher prints the command for each machine

A stop request is forwarded to the ranks, which save and exit with EXIT_STOPPED. All are restarted
from the last saved state when one dies, except after EXIT_REFUSED, a user error.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed import TCPStore

from bt_fast.distributed import slurm
from bt_fast.distributed.rendezvous import RESTARTS
from bt_fast.distributed.signals import EXIT_REFUSED, EXIT_STOPPED, EXIT_UNSAVED, StopFlag
from pipelines.common.flags import last_value

MAX_RESTARTS = 3
_GRACE_PERIOD = 10.0  # seconds for ranks to report and exit after one has died


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
    """Run `bt-fast COMMAND...` as ranks, and restart them; returns the exit status."""
    if placement.srun is not None:
        words = [*placement.srun, *_rank_command(command)]
        return _supervise(lambda: [subprocess.Popen(words, stdin=subprocess.DEVNULL)], stop)
    return run_processes(command, placement.num_ranks, stop)


def several_machines(arguments: Sequence[str], placement: Placement, gpus_per_machine: int) -> str:
    """The message with the command for each machine, to pretrain on more GPUs than this one has.

    gpus_per_machine: of the other machines, if this one has none.
    """
    here = placement.num_local_gpus or "no"
    message = (
        f"bt-fast pretrain: --gpus {placement.num_ranks}, but this machine has {here} GPUs;"
        " add --slurm PARTITION on a Slurm cluster, --device cpu to try it with processes, or run"
    )
    most = min(placement.num_local_gpus or gpus_per_machine, placement.num_ranks)
    per_machine = next(n for n in range(most, 0, -1) if placement.num_ranks % n == 0)
    num_machines = placement.num_ranks // per_machine
    if num_machines == 1:
        return f"{message} the same command on a machine with {per_machine} GPUs"
    if all(last_value(flag, arguments) is None for flag in ("--resume", "--run-dir")):
        arguments = [*arguments, "--run-dir", "SHARED_FOLDER"]
    return (
        f"{message} this on each of {num_machines} machines with {per_machine} GPUs each:\n"
        f"  torchrun --nnodes {num_machines} --nproc-per-node {per_machine}"
        " --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 --rdzv-id bt-fast"
        f" --max-restarts {MAX_RESTARTS} -m bt_fast.cli pretrain"
        f" {shlex.join(arguments)}"
    )


def run_processes(command: Sequence[str], world_size: int, stop: StopFlag) -> int:
    """Run `bt-fast COMMAND...` as `world_size` ranks of this machine; returns the exit status."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {  # torchrun's variables
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }

    def start_rank(rank: int) -> subprocess.Popen:
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        return subprocess.Popen(_rank_command(command), env=environment)

    return _supervise(lambda: [start_rank(rank) for rank in range(world_size)], stop)


def _rank_command(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bt_fast.cli", *command]


def _supervise(start: Callable[[], list[subprocess.Popen]], stop: StopFlag) -> int:
    """Start processes until they succeed, stop on request, or fail too often: ValueError."""
    stop.training = True  # Ctrl-C is a stop request, too
    failure = None
    for restart in range(MAX_RESTARTS + 1):
        if stop.requested:
            return EXIT_STOPPED
        if failure:
            message = f"bt-fast: {failure}; restarting all ranks from the last saved state"
            print(message, file=sys.stderr, flush=True)
        os.environ[RESTARTS] = str(restart)
        processes = start()
        try:
            failure = _wait(processes, stop)
        finally:
            _terminate(processes)
        for status in (EXIT_REFUSED, EXIT_UNSAVED, EXIT_STOPPED):
            if any(process.returncode == status for process in processes):
                return status
        if failure is None:
            return 0
    raise ValueError(f"{failure}, also after {MAX_RESTARTS} restarts")


def _wait(processes: list[subprocess.Popen], stop: StopFlag) -> str | None:
    """How the first process failed, or None, when all have ended or the grace period has passed."""
    forwarded, failure, deadline = False, None, float("inf")
    while True:
        ended = [process.poll() is not None for process in processes]
        for rank, process in enumerate(processes):
            if failure is None and process.returncode:
                name = f"rank {rank}" if len(processes) > 1 else "srun"
                failure = f"{name} ended with {_describe_exit(process.returncode)}"
                deadline = time.monotonic() + _GRACE_PERIOD
        if all(ended) or time.monotonic() > deadline:
            return failure
        if stop.requested and not forwarded:
            forwarded = True
            for process in processes:
                process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)


def _terminate(processes: list[subprocess.Popen]) -> None:
    """End all processes: with SIGTERM, on which srun ends its tasks, then with SIGKILL."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_PERIOD
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _describe_exit(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
