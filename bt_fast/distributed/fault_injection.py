"""Faults on purpose, to see that a run survives them. Nothing happens unless BT_FAST_FAULT is set.

    BT_FAST_FAULT=RANK:STEP:KIND       as in 1:5:kill; only in the first start of a run's ranks

exit        the process ends with status 1        exception   an error that nobody expects
kill        SIGKILL                               hang        it goes on doing nothing
nan         one step's views are not numbers      memory      there is not enough
"""

import os
import signal
import time
from typing import Literal, get_args

import torch

from bt_fast.distributed.collectives import World
from bt_fast.distributed.rendezvous import restarts

VARIABLE = "BT_FAST_FAULT"
Kind = Literal["exit", "exception", "kill", "hang", "nan", "memory"]


def inject(views: torch.Tensor, step: int, world: World) -> torch.Tensor:
    """Let the fault happen if this is its rank and step; returns the views to train on."""
    asked = os.environ.get(VARIABLE)
    if asked is None or restarts():
        return views
    rank, at, kind = _parse(asked)
    if (rank, at) != (world.rank, step):
        return views
    print(f"{VARIABLE}={asked}: now", flush=True)
    if kind == "exit":
        os._exit(1)
    if kind == "exception":
        raise RuntimeError(f"injected by {VARIABLE}={asked}")
    if kind == "memory":
        raise torch.OutOfMemoryError(f"injected by {VARIABLE}={asked}")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "hang":
        time.sleep(1)
    return views * torch.nan


def _parse(asked: str) -> tuple[int, int, str]:
    rank, _, rest = asked.partition(":")
    step, _, kind = rest.partition(":")
    if not (rank.isdecimal() and step.isdecimal() and kind in get_args(Kind)):
        raise ValueError(f"{VARIABLE}={asked} is not RANK:STEP:{'|'.join(get_args(Kind))}")
    return int(rank), int(step), kind
