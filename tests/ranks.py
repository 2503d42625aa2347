"""Run a function on several gloo ranks, each a process of its own, and collect what it returns."""

import os
import socket
import tempfile
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import tiny_runs
import torch
import torch.multiprocessing

from bt_fast.distributed import collectives, ranks

TINY = [
    *tiny_runs.TINY,
    *("--workers=1", "--probe-every=0", "--log-every=1", "--lr-weights=0.5", "--seed=1"),
]


def embeddings(n: int, d: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    scale = torch.logspace(-1, 1, d, dtype=torch.float64)
    shared = torch.randn(n, d, dtype=torch.float64, generator=generator)
    noise = [torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2)]
    return [((shared + 0.7 * part) * scale + 2).requires_grad_() for part in noise]


def share_of(world, count: int) -> slice:
    """This rank's rows of `count`."""
    return slice(world.rank * count // world.size, (world.rank + 1) * count // world.size)


class Traffic:
    """A context in which collectives, and the bytes that one rank sends, are counted.

    Bytes are those of ring algorithms on W ranks: an all-gather of b bytes per rank sends (W-1) b,
    an all-reduce of b bytes 2 (W-1)/W b, an all-to-all or reduce-scatter of b bytes (W-1)/W b.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __enter__(self) -> "Traffic":
        self._patches = ExitStack()
        dist = torch.distributed
        self._watch(collectives, "_all_gather", "all_gather", lambda w, _, x: (w - 1) * x.nbytes)
        self._watch(dist, "all_reduce", "all_reduce", lambda w, x: 2 * (w - 1) / w * x.nbytes)
        self._watch(dist, "all_to_all_single", "all_to_all", lambda w, _, x: (w - 1) / w * x.nbytes)
        return self

    def _watch(self, module, function_name: str, name: str, num_bytes) -> None:
        function = getattr(module, function_name)

        def counted(*tensors, group):
            self.calls[name] += 1
            self.bytes[name] += round(num_bytes(group.size(), *tensors))
            return function(*tensors, group=group)

        self._patches.enter_context(mock.patch.object(module, function_name, counted))

    def __exit__(self, *_) -> None:
        self._patches.close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(size: int, function, *arguments) -> list:
    """[function(world, *arguments) of rank 0, of rank 1, ...]; results are saved tensors or plain.

    The function must be importable: a test module's own.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (size, port, folder, function, arguments), size)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]


def _rank(rank: int, size: int, port: int, folder: str, function, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        world = ranks.meet(300, "300 s")
        ranks.join(world, 300, on_gpu=False)
        result = function(world, *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
        collectives.barrier(world.group)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        ranks.leave()
    os._exit(0)  # a thread of torch's has aborted the interpreter's way out, once, under load
