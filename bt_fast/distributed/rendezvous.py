"""How ranks find each other, part, and notice who is missing.

They meet where torchrun's environment says (RANK, WORLD_SIZE, MASTER_ADDR, ...), whoever has set
it: torchrun, `slurm.adopt`, or bt-fast itself (`start`).
"""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from bt_fast.distributed.collectives import ALONE, World


def described() -> World:
    """The rank that the environment makes of this process, ALONE if it does not speak of ranks."""
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


# Set to 1, a single rank has a process group too: collectives and their streams run on one GPU.
SINGLE_RANK_GROUP = "BT_FAST_GROUP_OF_ONE"
RESTARTS = "BT_FAST_RESTARTS"  # set where bt-fast itself starts ranks (start.py)


def restarts() -> int:
    """How often this run's ranks were started before: by torchrun, Slurm's requeue, or bt-fast."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTARTS)
    return sum(int(os.environ.get(name, "0")) for name in counts)


def join(device: torch.device, timeout: float) -> World:
    """Meet the other ranks, as torchrun's environment describes them.

    timeout: seconds after which a rank that does not answer ends the run.
    """
    world = described()
    if (world.size > 1 or world.single_rank_group) and not dist.is_initialized():
        # Collectives of two communicators run on a GPU in the order in which the host starts them,
        # which is the same on every rank. Unordered, each could wait for the other's resources.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        # gloo carries what lives on the CPU: stop requests, and everything of CPU ranks.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        bound = device if device.type == "cuda" else None
        dist.init_process_group(
            backend,
            store=_meeting_place(world, timedelta(seconds=timeout)),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout),
            device_id=bound,
        )
    return world


def silent_ranks(world: World, wait: float = 5.0) -> list[int]:
    """After a collective has failed: which ranks do not say, within `wait` seconds, that they are
    there. All others must ask too."""
    if not _stores:
        return []
    try:
        _stores[-1].set(f"here/{world.rank}", "")
        time.sleep(wait)
        return [r for r in range(world.size) if not _stores[-1].check([f"here/{r}"])]
    except RuntimeError:
        return [0]  # with whose machine the store is gone


def is_first_to_say() -> bool:
    """Whether no other rank has asked this: of many with the same complaint one is to say it."""
    try:
        return not _stores or _stores[-1].add("said", 1) == 1
    except RuntimeError:  # the store is gone with its process
        return True


_stores: list[dist.Store] = []


def _meeting_place(world: World, timeout: timedelta) -> dist.Store:
    """Where ranks tell each other their addresses: the launcher's store, or one of the first rank.

    A launcher's outlives a restart, so every start has keys of its own: those of the ranks that
    died would be answered by nobody.
    """
    at_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=world.is_first and not at_launchers,
        timeout=timeout,
    )
    _stores.append(dist.PrefixStore(f"bt-fast/start {restarts()}", store))
    return _stores[-1]


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
