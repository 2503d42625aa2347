"""Evaluations and `bt-fast embed` on one or more ranks; the first one prints and writes."""

import os
import sys
from collections.abc import Callable, Sequence

from bt_fast.distributed import launcher
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.distributed.ranks import adopt_rank, run_rank
from bt_fast.distributed.signals import EXIT_STOPPED, StopFlag
from bt_fast.evaluate.options import Options

# Seconds. The first rank may select classifiers for hours while the others wait for the result; a
# rank that dies is noticed by the launcher.
_TIMEOUT = 4 * 3600.0
_JOIN_TIMEOUT = 600.0  # seconds, for all ranks to start


def run_evaluation(
    command: str,
    options: Options,
    arguments: Sequence[str],
    evaluate: Callable[[Options, World], int],
) -> int:
    """Run a command such as "eval knn" with these arguments on all ranks -> the exit status."""

    def run(world: World) -> int:
        if not world.is_first:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return evaluate(options, world)

    if adopt_rank():
        return run_rank(
            f"bt-fast {command}",
            run,
            device=options.device,
            gpus=options.gpus,
            timeout=_TIMEOUT,
            join_timeout=_JOIN_TIMEOUT,
        )
    placement = launcher.place_ranks(options.gpus, options.device, use_srun=False)
    if not placement.fits:
        raise ValueError(
            f"--gpus {placement.num_ranks}, but this machine has"
            f" {placement.num_local_gpus or 'no'} GPUs; choose fewer, add --device cpu, or start"
            " the ranks of several machines with torchrun or srun"
        )
    if placement.num_ranks == 1:
        return evaluate(options, ALONE)
    with StopFlag() as stop:
        status = launcher.start_ranks(placement, [*command.split(), *arguments], stop)
    if status == EXIT_STOPPED:
        print("stopped; the same command continues", file=sys.stderr)
    return status
