"""Fault injection, to test that a run survives faults. Inactive unless BT_FAST_FAULT is set.

    BT_FAST_FAULT=RANK:STEP:KIND       as in 1:5:kill; only in the first start of a run's ranks

exit        exit with status 1                        exception   raise an unexpected error
kill        SIGKILL                                   hang        wait forever
nan         views of one step that are NaN            memory      raise an out-of-memory error
"""

import os
import re
import signal
import time
from collections.abc import Iterator

import torch

from bt_fast.distributed.collectives import World
from bt_fast.distributed.rendezvous import num_restarts

VARIABLE = "BT_FAST_FAULT"
KINDS = "exit|exception|kill|hang|nan|memory"


def inject(
    views_of_steps: Iterator[torch.Tensor], first_step: int, world: World
) -> Iterator[torch.Tensor]:
    """The views of the steps from `first_step`, with the fault at its step if it is this rank's."""
    fault = os.environ.get(VARIABLE)
    if fault is None or num_restarts():
        return views_of_steps
    parts = re.fullmatch(rf"(\d+):(\d+):({KINDS})", fault)
    if parts is None:
        raise ValueError(f"{VARIABLE}={fault} is not RANK:STEP:{KINDS}")
    rank, fault_step, kind = int(parts[1]), int(parts[2]), parts[3]
    if rank != world.rank:
        return views_of_steps
    numbered = enumerate(views_of_steps, first_step)
    return (_cause(kind, views) if step == fault_step else views for step, views in numbered)


def _cause(kind: str, views: torch.Tensor) -> torch.Tensor:
    """Cause the fault now; returns the views to train on."""
    fault = f"{VARIABLE}={os.environ[VARIABLE]}"
    print(f"{fault}: now", flush=True)
    if kind == "exit":
        os._exit(1)
    if kind == "exception":
        raise RuntimeError(f"injected by {fault}")
    if kind == "memory":
        raise torch.OutOfMemoryError(f"injected by {fault}")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "hang":
        time.sleep(1)
    return views * torch.nan
