"""Ranks of a command: joining each other, running, and ending together.

The environment variables are torchrun's (RANK, WORLD_SIZE, MASTER_ADDR, ...), set by torchrun,
`slurm.adopt_environment` or bt-fast's `launcher`.
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from bt_fast.distributed import slurm
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.distributed.signals import EXIT_REFUSED
from bt_fast.runtime import OUT_OF_MEMORY, is_out_of_memory

# Set to 1, a single rank has a process group too: collectives and their streams run on one GPU.
SINGLE_RANK_GROUP = "BT_FAST_GROUP_OF_ONE"
RESTARTS = "BT_FAST_RESTARTS"  # set by `launcher`

_stores: list[dist.Store] = []


def adopt_rank() -> bool:
    """Whether torchrun, srun or bt-fast's launcher started this process as one of the ranks; a
    task of srun first gets torchrun's environment variables."""
    slurm.adopt_environment()
    return "RANK" in os.environ


def run_rank(
    program: str, run: Callable[[World], int], *, device: str, gpus: int | None, timeout: float
) -> int:
    """Join the other ranks and run; returns the exit status. An error ends the process.

    A CPU rank's threads are limited to its part of the cores. Raises ValueError if the number of
    ranks is not `gpus`.
    """
    world = world_from_environment()
    if gpus not in (None, world.size):
        raise ValueError(
            f"--gpus {gpus}, but {world.size} ranks were started; leave --gpus out or start as many"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
    here = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    world = join(here, timeout)
    try:
        status = run(world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        _abort(program, world, error)
    return _end(world, status)


def _end(world: World, status: int) -> int:
    """Leave the other ranks and end this process with a status; a single rank returns it.

    os._exit skips the interpreter's shutdown, in which a thread of torch's has aborted, seldom and
    under load: the launcher would restart a run that had finished.
    """
    leave()
    if world.size == 1:
        return status
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _abort(program: str, world: World, error: Exception) -> NoReturn:
    """Report the error if no other rank has, and end now: a shutdown could wait for others."""
    refused = isinstance(error, ValueError)
    reason = str(error).strip().partition("\n")[0]
    who = "" if refused else f"rank {world.rank} failed: "
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        refused, reason = True, OUT_OF_MEMORY
    elif isinstance(error, RuntimeError) and (missing := unresponsive_ranks(world)):
        reason += f"; ranks {missing} do not respond"
    if claim_error_report():  # errors of other ranks may follow from this one
        print(f"{program}: {who}{reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_REFUSED if refused else 1)


def world_from_environment() -> World:
    """This process's rank as the environment defines it; ALONE if it defines none."""
    if "RANK" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        single_rank_group=os.environ.get(SINGLE_RANK_GROUP) == "1",
    )


def num_restarts() -> int:
    """How often this run was started before: by torchrun, Slurm's requeue, or bt-fast."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTARTS)
    return sum(int(os.environ.get(name, "0")) for name in counts)


def join(device: torch.device, timeout: float) -> World:
    """Join the process group of the environment; timeout: of every collective, seconds."""
    world = world_from_environment()
    if (world.size > 1 or world.single_rank_group) and not dist.is_initialized():
        # Collectives of two communicators run on a GPU in the order in which the host starts them,
        # which is the same on every rank. Unordered, each could wait for the other's resources.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        # gloo carries tensors on the CPU: stop requests, and everything of CPU ranks.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=_rendezvous_store(world, timedelta(seconds=timeout)),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
        )
    return world


def leave() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def unresponsive_ranks(world: World, wait: float = 5.0) -> list[int]:
    """After a failed collective, the ranks that do not call this within `wait` seconds."""
    if not _stores:
        return []
    try:
        _stores[-1].set(f"here/{world.rank}", "")
        time.sleep(wait)
        return [r for r in range(world.size) if not _stores[-1].check([f"here/{r}"])]
    except RuntimeError:
        return [0]  # whose process held the store


def claim_error_report() -> bool:
    """Whether this rank is the first to call this: of many with the same error one reports it."""
    try:
        return not _stores or _stores[-1].add("reported", 1) == 1
    except RuntimeError:  # the store has ended with its process
        return True


def _rendezvous_store(world: World, timeout: timedelta) -> dist.Store:
    """The store in which ranks publish their addresses: the launcher's, or rank 0's."""
    at_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=world.is_first and not at_launcher,
        timeout=timeout,
    )
    # A launcher's store outlives a restart, and the addresses of ranks that died are in it.
    _stores.append(dist.PrefixStore(f"bt-fast/start {num_restarts()}", store))
    return _stores[-1]
