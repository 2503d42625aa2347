"""Ranks of a command: joining each other, running, and ending together.

The environment variables are torchrun's, set by torchrun, `slurm.adopt_environment` or bt-fast's
`launcher`; see `rendezvous`.
"""

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from bt_fast.distributed import rendezvous, slurm
from bt_fast.distributed.collectives import World
from bt_fast.distributed.signals import EXIT_REFUSED
from bt_fast.runtime import OUT_OF_MEMORY, gpu_index, is_out_of_memory

# Set to 1, a single rank has a process group too: collectives and their streams run on one GPU.
SINGLE_RANK_GROUP = "BT_FAST_GROUP_OF_ONE"

_stores: list[dist.Store] = []


def adopt_rank() -> bool:
    """Whether torchrun, srun or bt-fast's launcher started this process as one of the ranks; a
    task of srun first gets torchrun's environment variables. Raises ValueError if they say it in
    part."""
    slurm.adopt_environment()
    return rendezvous.is_rank()


def run_rank(
    program: str,
    run: Callable[[World], int],
    *,
    device: str,
    gpus: int | None,
    timeout: float,
    join_timeout: float | None = None,
) -> int:
    """Join the other ranks and run; returns the exit status. An error ends the process.

    A CPU rank's threads are limited to its part of the cores.
    timeout: of collectives, seconds, as set by --timeout. join_timeout: of the ranks' rendezvous;
    default: the same.
    Raises ValueError if the number of ranks is not `gpus`, or they do not find each other.
    """
    _, size = rendezvous.rank_and_size()
    if gpus not in (None, size):
        raise ValueError(
            f"--gpus {gpus}, but {size} ranks were started; leave --gpus out or start as many"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    limit = f"{timeout:g} s (--timeout)" if join_timeout is None else f"{join_timeout:g} s"
    world = meet(join_timeout or timeout, limit)
    try:
        join(world, timeout, on_gpu=on_gpu)
        if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
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


def meet(timeout: float, limit: str) -> World:
    """Wait for all ranks of the environment -> which of them this process is.

    timeout: seconds; limit: its description for messages. Raises ValueError if ranks are missing.
    """
    rank, size = rendezvous.rank_and_size()
    has_group = size > 1 or os.environ.get(SINGLE_RANK_GROUP) == "1"
    hosts = [""] * size
    if has_group and not _stores:
        store, hosts = rendezvous.meet(rank, size, timeout, limit)
        _stores.append(store)
    local_rank, local_size = rendezvous.local_rank_and_size(rank, hosts)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        single_rank_group=size == 1 and has_group,
    )


def join(world: World, timeout: float, *, on_gpu: bool) -> None:
    """Create the process group; timeout: of every collective, seconds. Raises ValueError if two
    ranks have the same GPU."""
    if not _stores or dist.is_initialized():
        return
    device = torch.device("cuda", gpu_index(world.local_rank)) if on_gpu else None
    if device is not None:
        store, rank = _stores[-1], world.rank
        store.set(f"gpu/{rank}", str(torch.cuda.get_device_properties(device).uuid))
        others = (store.get(f"gpu/{lower}") for lower in range(rank))
        if store.get(f"gpu/{rank}") in others:
            raise ValueError(
                f"two ranks have the same GPU, {device} of {socket.gethostname()}; start one rank"
                " per GPU, or give each its own in CUDA_VISIBLE_DEVICES"
            )
    # Collectives of two communicators run on a GPU in the order in which the host starts them,
    # which is the same on every rank. Unordered, each could wait for the other's resources.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    # gloo carries tensors on the CPU: stop requests, and everything of CPU ranks.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=_stores[-1],
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )


def leave() -> None:
    """Destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def unresponsive_ranks(world: World) -> list[int]:
    """After a failed collective, the ranks that do not call this within five seconds."""
    if not _stores:
        return []
    try:
        _stores[-1].set(f"here/{world.rank}", "")
        time.sleep(5)
        return [r for r in range(world.size) if not _stores[-1].check([f"here/{r}"])]
    except RuntimeError:
        return [0]  # whose process held the store


def claim_error_report() -> bool:
    """Whether this rank is the first to call this: of many with the same error one reports it."""
    try:
        return not _stores or _stores[-1].add("reported", 1) == 1
    except RuntimeError:  # the store has ended with its process
        return True
