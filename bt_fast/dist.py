"""Ranks and collectives.

A rank is one process with one GPU, or a CPU process of its own. Everything that crosses ranks goes
through the functions here and is counted when asked for (`Traffic`). They are torch.distributed's
public calls, which a compiler can trace. A group of None stands for this process alone.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None

# Renamed in torch 2.14, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Which rank this process is. Made by `join`; `ALONE` without other ranks."""

    rank: int
    size: int
    local_rank: int  # on this machine
    local_size: int  # ranks of this machine

    @property
    def is_first(self) -> bool:
        """The rank that writes files and prints."""
        return self.rank == 0

    @property
    def group(self) -> Group:
        return dist.group.WORLD if self.size > 1 else None  # type: ignore[return-value]

    def subgroup(self, size: int) -> Group:
        """This rank's group of so many ranks in a row; 0 = all of them."""
        if self.size == 1 or size == 1:
            return None
        if size in (0, self.size):
            return self.group
        require_equal_groups(self.size, size)
        groups = [
            dist.new_group(list(range(first, first + size))) for first in range(0, self.size, size)
        ]
        return cast(Group, groups[self.rank // size])


def require_equal_groups(num_ranks: int, size: int) -> None:
    """Raise ValueError unless ranks form groups of `size`; 0 = one group."""
    if size and num_ranks % size:
        raise ValueError(f"--bn-group {size} does not divide {num_ranks} ranks")


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def described() -> World:
    """The rank that the environment makes of this process, ALONE if it does not speak of ranks."""
    if "RANK" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


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
    if world.size > 1 and not dist.is_initialized():
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


def size_of(group: Group) -> int:
    return 1 if group is None else group.size()


def rank_in(group: Group) -> int:
    return 0 if group is None else group.rank()


class Traffic:
    """Counts collectives and the bytes one rank sends, while it is entered.

    Bytes are those of ring algorithms on W ranks: an all-gather of parts of b bytes sends (W-1) b,
    an all-reduce of b bytes 2 (W-1)/W b, an all-to-all or reduce-scatter of b bytes (W-1)/W b.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> "Traffic":
        _listeners.append(self)
        return self

    def __exit__(self, *_) -> None:
        _listeners.remove(self)


_listeners: list[Traffic] = []


def _note(name: str, num_bytes: float) -> None:
    for traffic in _listeners:
        traffic.calls[name] += 1
        traffic.bytes[name] += round(num_bytes)


def all_gather(part: torch.Tensor, group: Group) -> torch.Tensor:
    """[...] of every rank -> [W, ...], in the ranks' order."""
    if group is None:
        return part.unsqueeze(0)
    world_size = group.size()
    part = part.contiguous()
    _note("all_gather", (world_size - 1) * part.nbytes)
    whole = part.new_empty((world_size * part.shape[0], *part.shape[1:]))
    _all_gather(whole, part, group=group)
    return whole.unflatten(0, (world_size, part.shape[0]))


def all_sum(value: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum over ranks, on every rank."""
    if group is None:
        return value
    _note("all_reduce", 2 * (group.size() - 1) / group.size() * value.nbytes)
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def exchange(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """[W, ...], part r for rank r -> [W, ...], part s from rank s."""
    if group is None:
        return parts
    _note("all_to_all", (group.size() - 1) / group.size() * parts.nbytes)
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def sum_parts(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """[W, ...], part r for rank r -> [...], the sum over ranks of what they have for this one.

    Sent as an exchange and added here, in the ranks' order: as many bytes as a reduce-scatter.
    """
    return exchange(parts, group).sum(0)


def from_first(value: Any, group: Group) -> Any:
    """The first rank's value of any small picklable kind, on every rank."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


def of_all(value: Any, group: Group) -> list[Any]:
    """Every rank's value of any small picklable kind, in the ranks' order, on every rank."""
    values = [value] * size_of(group)
    if group is not None:
        dist.all_gather_object(values, value, group=group)
    return values


def copy_from_first(tensors: Iterable[torch.Tensor], group: Group) -> None:
    """Overwrite tensors, alike on every rank, with the first rank's."""
    if group is not None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=group)


def require_same_weights(model: torch.nn.Module, group: Group) -> None:
    """Raise RuntimeError, naming the ranks, unless every rank has the first one's weights, bit for
    bit: a sum over each tensor's bits tells."""
    if group is None:
        return
    sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    everyones = all_gather(torch.stack(sums), group)  # [W, num_parameters]
    others = (everyones != everyones[0]).any(1).nonzero().flatten().tolist()
    if others:
        raise RuntimeError(f"the weights of ranks {others} are no longer those of rank 0")


def any_wish(wish: bool, group: Group) -> bool:
    """Whether any rank wishes it; the same on every rank."""
    return bool(all_sum(torch.tensor([int(wish)]), group))


def wait_for_all(group: Group) -> None:
    """Return when every rank has called this."""
    if group is not None:
        all_sum(torch.zeros(1), group)


class Vote:
    """Whether any rank wishes something: asked at every step, answered one step later.

    The answer travels while the step runs, through the CPU, so that nothing waits for it; and it is
    the same on every rank at the same step.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def ask(self, wish: bool) -> bool:
        """Put in this rank's wish; returns whether any rank had put one in at the last call."""
        if self.group is None:
            return wish
        answer = False
        if self._work is not None:
            self._work.wait()
            answer = bool(self._flag)
        self._flag.fill_(int(wish or answer))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer
