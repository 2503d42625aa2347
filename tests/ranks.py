"""Run a function on several gloo ranks, each a process of its own, and collect what it returns."""

import os
import socket
import tempfile
import traceback
from pathlib import Path

import tiny_runs
import torch
import torch.multiprocessing

from bt_fast.distributed import collectives, rendezvous

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


def run_ranks(size: int, function, *arguments) -> list:
    """[function(world, *arguments) of rank 0, of rank 1, ...]; results are saved tensors or plain.

    The function must be importable: a test module's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        world = rendezvous.join(torch.device("cpu"), timeout=300)
        result = function(world, *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
        collectives.barrier(world.group)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        rendezvous.leave()
    os._exit(0)  # a thread of torch's has aborted the interpreter's way out, once, under load
