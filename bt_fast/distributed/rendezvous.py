"""Rendezvous of ranks: how they find each other, leave, and detect which of them is missing.

The environment variables are torchrun's (RANK, WORLD_SIZE, MASTER_ADDR, ...), set by torchrun,
`slurm.adopt_environment` or bt-fast's `supervisor`.
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from bt_fast.distributed.collectives import ALONE, World

# Set to 1, a single rank has a process group too: collectives and their streams run on one GPU.
SINGLE_RANK_GROUP = "BT_FAST_GROUP_OF_ONE"
RESTARTS = "BT_FAST_RESTARTS"  # set by `supervisor`

_stores: list[dist.Store] = []


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
    """Create the process group of all ranks that the environment defines.

    timeout: of every collective, seconds.
    """
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
    """The key-value store in which ranks publish their addresses: the launcher's, or rank 0's.

    A launcher's store outlives a restart, so every start has a prefix of its own: the keys of
    ranks that died name addresses at which nobody listens.
    """
    at_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=world.is_first and not at_launcher,
        timeout=timeout,
    )
    _stores.append(dist.PrefixStore(f"bt-fast/start {num_restarts()}", store))
    return _stores[-1]
