"""Ranks and collectives.

A rank is one process with one GPU, or one CPU process. The functions call torch.distributed's
public functions, which the compiler can trace. A group of None means this process alone.
"""

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
    """Which rank this process is; created by `ranks.join`, or `ALONE`."""

    rank: int
    size: int
    local_rank: int  # on this machine
    local_size: int  # ranks of this machine
    single_rank_group: bool = False  # whether a single rank has a process group, too

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @property
    def group(self) -> Group:
        """The process group of all ranks; used for gradients and between steps."""
        exists = self.size > 1 or self.single_rank_group
        return dist.group.WORLD if exists else None  # type: ignore[return-value]

    def local_slice(self, samples: np.ndarray) -> np.ndarray:
        """This rank's consecutive part of the samples; the first ranks may have one more."""
        return np.array_split(samples, self.size)[self.rank]

    def new_group(self, device: torch.device, *, size: int = 0, timeout: float = 600) -> Group:
        """Create groups of `size` consecutive ranks (0: all) -> this rank's. All ranks call it.

        On a GPU the group has a high-priority stream: the small collectives that a step waits for
        do not queue behind the gradients on `group`.
        timeout: of every collective, seconds.
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
    """Raise ValueError unless the ranks form groups of `size`; 0 = one group."""
    if size and num_ranks % size:
        fitting = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
        raise ValueError(
            f"--bn-group {size} does not divide {num_ranks} ranks; choose one of {fitting}, or 0"
            " for all"
        )


def require_divisible_batch(
    batch_size: int, num_ranks: int, bn_group: int, accumulate: int = 1
) -> None:
    """Raise ValueError unless ranks, each in `accumulate` parts, can divide a batch and form
    batch-norm groups."""
    if batch_size < 2 * num_ranks:
        raise ValueError(f"--batch-size {batch_size} is less than 2 for each of {num_ranks} ranks")
    local_batch = batch_size // num_ranks
    if local_batch % accumulate or local_batch < 2 * accumulate:
        raise ValueError(
            f"--accumulate {accumulate} does not divide the {local_batch} images of a rank into"
            " equal parts of at least 2"
        )
    require_equal_groups(num_ranks, bn_group)


ALONE = World(rank=0, size=1, local_rank=0, local_size=1)


def group_size(group: Group) -> int:
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    return 0 if group is None else group.rank()


def all_gather(part: torch.Tensor, group: Group) -> torch.Tensor:
    """[...] of every rank -> [W, ...], in order of ranks."""
    if group is None:
        return part.unsqueeze(0)
    world_size = group.size()
    part = part.contiguous()
    whole = part.new_empty((world_size * part.shape[0], *part.shape[1:]))
    _all_gather(whole, part, group=group)
    return whole.unflatten(0, (world_size, part.shape[0]))


def gather_slices(part: torch.Tensor, num_rows: int, group: Group) -> torch.Tensor:
    """Rows of every rank, as `World.local_slice` divides them -> [num_rows, ...] on every rank."""
    if group is None:
        return part
    num_ranks = group.size()
    most = -(-num_rows // num_ranks)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    parts = all_gather(padded, group)  # [W, most, ...]
    full = num_rows - num_ranks * (most - 1)  # ranks without padding
    return torch.cat([parts[:full].flatten(0, 1), parts[full:, :-1].flatten(0, 1)])


def all_reduce(value: torch.Tensor, group: Group, *, overwrite: bool = False) -> torch.Tensor:
    """The sum over ranks, on every rank; with `overwrite` in the memory of the value."""
    if group is None:
        return value
    total = value if overwrite else value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_to_all(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """[W, ...], part r for rank r -> [W, ...], part s from rank s."""
    if group is None:
        return parts
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def reduce_scatter(parts: torch.Tensor, group: Group) -> torch.Tensor:
    """[W, ...], part r for rank r -> [...], the sum over ranks of their parts for this rank.

    An all-to-all and a local sum, in order of ranks: the same bytes as a reduce-scatter.
    """
    return all_to_all(parts, group).sum(0)


def broadcast_object(value: Any, group: Group) -> Any:
    """The first rank's value, a small picklable object, on every rank."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group, device=torch.device("cpu"))
    return values[0]


def broadcast_tensors(tensors: Iterable[torch.Tensor], group: Group) -> None:
    """Overwrite tensors with the first rank's."""
    if group is not None:
        for tensor in tensors:
            dist.broadcast(tensor, src=0, group=group)


def compare_weights(model: torch.nn.Module, group: Group) -> Callable[[], None]:
    """Queue a comparison of all ranks' weights, by a checksum of each tensor's bits.

    Call the result when the queued work has completed: it raises RuntimeError if weights differ.
    """
    if group is None:
        return lambda: None
    sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    gathered = all_gather(torch.stack(sums), group)  # [W, num_parameters]
    on_host = gathered.to("cpu", non_blocking=True)  # page-locked if it comes from a GPU

    def check() -> None:
        different = (on_host != on_host[0]).any(1).nonzero().flatten().tolist()
        if different:
            raise RuntimeError(f"the weights of ranks {different} are no longer those of rank 0")

    return check


def any_rank(condition: bool, group: Group) -> bool:
    """Whether the condition holds on any rank; the same on every rank."""
    return bool(all_reduce(torch.tensor([int(condition)]), group))


def barrier(group: Group) -> None:
    """Return once every rank has called this."""
    if group is not None:
        all_reduce(torch.zeros(1), group)


class StopRequest:
    """Whether any rank requests a stop: sent at every step, received one step later.

    The all-reduce runs during the step, on the CPU, so that nothing waits for it; and the answer is
    the same on every rank at the same step.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def any_rank(self, requested: bool) -> bool:
        """Send this rank's request; returns whether any rank had sent one at the previous call."""
        if self.group is None:
            return requested
        answer = False
        if self._work is not None:
            self._work.wait()
            answer = bool(self._flag)
        self._flag.fill_(int(requested or answer))
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer
