"""Evaluations on several ranks: the same command on each of them, on its slice of every batch.

The first rank prints and writes; the others work in silence. Started by bt-fast itself on one
machine, or by torchrun or srun on several that share the folder of the results.
"""

import os
import sys
from collections.abc import Callable, Sequence

import torch

from bt_fast.distributed import launcher, slurm, supervisor
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.evaluate.options import Options

# Seconds. The first rank may be choosing classifiers while the others wait for what it finds; that
# one has died is seen by whoever started them.
_PATIENCE = 4 * 3600.0


def on_ranks(
    name: str, options: Options, arguments: Sequence[str], run: Callable[[Options, World], int]
) -> int:
    """Run `bt-fast eval NAME` with these arguments on all ranks; returns the exit status."""
    slurm.adopt()
    if "RANK" in os.environ:
        return _as_rank(name, options, run)
    num_here = torch.cuda.device_count() if options.device != "cpu" else 0
    wanted = options.gpus or max(num_here, 1)
    if options.device != "cpu" and wanted > max(num_here, 1):
        raise ValueError(
            f"--gpus {wanted}, but this machine has {num_here}; choose fewer, or start the ranks of"
            " several machines with torchrun or srun"
        )
    if wanted == 1:
        return run(options, ALONE)
    with StopFlag() as stop:
        status = supervisor.here(["eval", name, *arguments], wanted, stop)
    if status == EXIT_STOPPED:
        print("stopped; the same command goes on", file=sys.stderr)
    return status


def _as_rank(name: str, options: Options, run: Callable[[Options, World], int]) -> int:
    world = launcher.join(options.device, options.gpus, _PATIENCE)
    if not world.is_first:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        status = run(options, world)
    except (RuntimeError, ValueError, OSError) as error:
        if world.size == 1:
            raise
        launcher.give_up(f"bt-fast eval {name}", world, error)
    return launcher.end_rank(world, status)
