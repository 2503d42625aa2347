"""Ranks and collectives.

A rank is one process with one GPU, or a CPU process of its own (`meeting` says how they find each
other). Everything that crosses ranks goes through the functions here and is counted when asked for
(`Traffic`). They are torch.distributed's public calls, which a compiler can trace. A group of None
stands for this process alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None

# Renamed in torch 2.14, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Which rank this process is. Made by `meeting.join`; `ALONE` without other ranks."""

    rank: int
    size: int
    local_rank: int  # on this machine
    local_size: int  # ranks of this machine
    single_rank_group: bool = False  # whether a single rank has a process group, too

    @property
    def is_first(self) -> bool:
        """The rank that writes files and prints."""
        return self.rank == 0

    @property
    def group(self) -> Group:
        """All ranks; used for gradients and for exchanges between steps."""
        exists = self.size > 1 or self.single_rank_group
        return dist.group.WORLD if exists else None  # type: ignore[return-value]

    def share(self, samples: np.ndarray) -> np.ndarray:
        """This rank's of them, in a row; the first ranks have one more where they do not divide."""
        return np.array_split(samples, self.size)[self.rank]

    def new_group(self, device: torch.device, *, size: int = 0, timeout: float = 600) -> Group:
        """Create process groups of `size` consecutive ranks and return this rank's. Every rank must
        call it.

        On a GPU the group has a stream of high priority: the small collectives that a step waits
        for do not queue behind the gradients on `group`.

        Args:
            device: of this rank's tensors.
            size: ranks in a row that form a group; 0 = all of them.
            timeout: as of `meeting.join`.
        """
        if self.group is None or size == 1:
            return None
        require_equal_groups(self.size, size)
        size = size or self.size
        options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
        if device.type == "cuda":
            nccl_options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            nccl_options._timeout = options["timeout"]  # torch warns if it differs
            options |= {"backend": "nccl", "pg_options": nccl_options}
        groups = [
            dist.new_group(list(range(first, first + size)), **options)
            for first in range(0, self.size, size)
        ]
        return cast(Group, groups[self.rank // size])


def require_equal_groups(num_ranks: int, size: int) -> None:
    """Raise ValueError unless ranks form groups of `size`; 0 = one group."""
    if size and num_ranks % size:
        fitting = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
        raise ValueError(
            f"--bn-group {size} does not divide {num_ranks} ranks; choose one of {fitting}, or 0"
            " for all"
        )


def require_shares(batch_size: int, num_ranks: int, bn_group: int) -> None:
    """Raise ValueError unless so many ranks can share a batch, and batch norm."""
    if batch_size < 2 * num_ranks:
        raise ValueError(f"--batch-size {batch_size} is less than 2 for each of {num_ranks} ranks")
    require_equal_groups(num_ranks, bn_group)


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


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


def gather_shares(part: torch.Tensor, num_rows: int, group: Group) -> torch.Tensor:
    """Rows of every rank, as `World.share` has divided them -> [num_rows, ...] on every rank."""
    if group is None:
        return part
    num_ranks = group.size()
    most = -(-num_rows // num_ranks)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    parts = all_gather(padded, group)  # [W, most, ...]
    full = num_rows - num_ranks * (most - 1)  # ranks without padding
    return torch.cat([parts[:full].flatten(0, 1), parts[full:, :-1].flatten(0, 1)])


def all_sum(value: torch.Tensor, group: Group, *, overwrite: bool = False) -> torch.Tensor:
    """The sum over ranks, on every rank; in the value's own memory if that may be overwritten."""
    if group is None:
        return value
    _note("all_reduce", 2 * (group.size() - 1) / group.size() * value.nbytes)
    total = value if overwrite else value.clone(memory_format=torch.contiguous_format)
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


def compare_weights(model: torch.nn.Module, group: Group) -> Callable[[], None]:
    """Queue a comparison of all ranks' weights: a sum over each tensor's bits tells.

    Returns what raises RuntimeError, naming the ranks, unless every rank had the first one's
    weights, bit for bit; to be called when the device has done what is queued.
    """
    if group is None:
        return lambda: None
    sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    gathered = all_gather(torch.stack(sums), group)  # [W, num_parameters]
    on_host = gathered.to("cpu", non_blocking=True)  # page-locked, of a GPU's

    def check() -> None:
        others = (on_host != on_host[0]).any(1).nonzero().flatten().tolist()
        if others:
            raise RuntimeError(f"the weights of ranks {others} are no longer those of rank 0")

    return check


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
