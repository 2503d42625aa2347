"""One rank of a command: joining the others, running, and ending together with them."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from bt_fast.distributed import rendezvous, slurm
from bt_fast.distributed.collectives import World
from bt_fast.distributed.signals import EXIT_REFUSED
from bt_fast.runtime import OUT_OF_MEMORY, is_out_of_memory


def adopt_rank() -> bool:
    """Whether torchrun, srun or bt-fast's supervisor started this process as one of the ranks; a
    task of srun first gets torchrun's environment variables."""
    slurm.adopt_environment()
    return "RANK" in os.environ


def run_rank(
    program: str, run: Callable[[World], int], *, device: str, gpus: int | None, timeout: float
) -> int:
    """Join the other ranks and run; returns the exit status. An error ends the process."""
    world = join(device, gpus, timeout)
    try:
        status = run(world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        _abort(program, world, error)
    return _end(world, status)


def join(device: str, gpus: int | None, timeout: float) -> World:
    """Join the other ranks, and limit a CPU rank's threads to its part of the cores.

    Raises ValueError if the number of ranks is not `gpus`.
    """
    world = rendezvous.world_from_environment()
    if gpus not in (None, world.size):
        raise ValueError(
            f"--gpus {gpus}, but {world.size} ranks were started; leave --gpus out or start as many"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
    return rendezvous.join(
        torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu"), timeout
    )


def _end(world: World, status: int) -> int:
    """Leave the other ranks and end this process with a status; a single rank returns it.

    os._exit skips the interpreter's shutdown, in which a thread of torch's has aborted, seldom and
    under load: the supervisor would restart a run that had finished.
    """
    rendezvous.leave()
    if world.size == 1:
        return status
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _abort(program: str, world: World, error: Exception) -> NoReturn:
    """Report the error and end this process immediately: shutting down could wait for a collective.

    Only the first rank that fails reports. A user error exits with EXIT_REFUSED: no restart.
    """
    refused = isinstance(error, ValueError)
    reason = str(error).strip().partition("\n")[0]
    who = "" if refused else f"rank {world.rank} failed: "
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        refused, reason = True, OUT_OF_MEMORY
    elif isinstance(error, RuntimeError) and (missing := rendezvous.unresponsive_ranks(world)):
        reason += f"; ranks {missing} do not respond"
    if rendezvous.claim_error_report():  # errors of other ranks may follow from this one
        print(f"{program}: {who}{reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_REFUSED if refused else 1)
