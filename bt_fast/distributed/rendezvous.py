"""Rendezvous: which rank this process is, and how ranks find each other.

torchrun's environment variables, of which some launchers set a part:

    RANK, WORLD_SIZE                the rank, and the number of ranks
    MASTER_ADDR, MASTER_PORT        host and port of the store, on the machine of rank 0
    LOCAL_RANK, LOCAL_WORLD_SIZE    the same on this machine; else counted from the ranks' hosts

Every rank publishes its host in the store and waits until all have. It reports what it waits for
after a few seconds, and ends with the same words at the time limit.
"""

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

_NOTICE_AFTER = 5.0  # seconds of waiting
_CONNECT_LIMIT = 5.0  # seconds for a store to answer
# How often a run was started before: by torchrun, by Slurm's requeue, by bt-fast's launcher.
RESTARTS = "BT_FAST_RESTARTS"
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTARTS)


def integer(name: str, default: int | None = None) -> int:
    """The value of an environment variable. Raises ValueError if it is not a number, or is not set
    and has no default."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}, but must be a number")
    return int(text)


def num_restarts() -> int:
    """How often this run was started before."""
    return sum(integer(name, 0) for name in _RESTART_COUNTS)


def is_rank() -> bool:
    """Whether the environment says which rank this process is. Raises ValueError if it does in
    part."""
    if "RANK" in os.environ:
        return True
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):  # the second one by Open MPI's mpirun
        if (size := integer(name, 1)) > 1:
            raise ValueError(
                f"{name} is {size}, but RANK is not set: start the ranks with torchrun or srun, set"
                f" it for every rank, or unset {name} to run alone"
            )
    return False


def rank_and_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE. Raises ValueError unless both are set and valid."""
    _require_variables("WORLD_SIZE")
    rank, size = integer("RANK"), integer("WORLD_SIZE")
    if rank >= size:
        raise ValueError(f"RANK is {rank}, but must be below WORLD_SIZE, which is {size}")
    return rank, size


def local_rank_and_size(rank: int, hosts: list[str]) -> tuple[int, int]:
    """LOCAL_RANK and LOCAL_WORLD_SIZE; by default counted from the hosts of all ranks."""
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    local_rank = integer("LOCAL_RANK", here.index(rank))
    local_size = integer("LOCAL_WORLD_SIZE", max(len(here), local_rank + 1))
    if local_rank >= local_size:
        raise ValueError(
            f"LOCAL_RANK is {local_rank}, but must be below LOCAL_WORLD_SIZE, which is {local_size}"
        )
    return local_rank, local_size


def meet(rank: int, size: int, timeout: float, limit: str) -> tuple[dist.Store, list[str]]:
    """Wait for all ranks -> (the store of this start, the host of every rank).

    timeout: seconds. limit: its description, as in "600 s (--timeout)".
    Raises ValueError if the variables are incomplete, or ranks are missing at the time limit.
    """
    _require_variables("MASTER_ADDR", "MASTER_PORT")
    host, port = os.environ["MASTER_ADDR"], integer("MASTER_PORT")
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT is {port}, but must lie between 1 and 65535")
    deadline = time.monotonic() + timeout
    # torchrun and bt-fast's launcher hold the store; without them rank 0 does.
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store: dist.Store | None = None

    def unreachable() -> str | None:
        nonlocal store
        try:
            if is_server:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), _CONNECT_LIMIT).close()
        except (socket.gaierror, UnicodeError) as error:
            reason = getattr(error, "strerror", "it is no name of a host")
            return f"the host {host} (MASTER_ADDR), which is unknown here: {reason}"
        except OSError as error:
            return f"rank 0 at {host}:{port}: {error.strerror or error}"
        store = _open_store(host, port, size, is_server)
        return None if store else f"rank 0 at {host}:{port}, where another program answers"

    _wait_until_none(unreachable, deadline, limit)
    assert store is not None
    store.set_timeout(timedelta(seconds=timeout))
    # A launcher's store outlives a restart, and contains the hosts of ranks that have died.
    store = dist.PrefixStore(f"bt-fast/start {num_restarts()}", store)
    store.set(f"host/{rank}", socket.gethostname())
    keys = [f"host/{other}" for other in range(size)]

    def missing() -> str | None:
        if store.check(keys):
            return None
        ranks = ", ".join(str(r) for r, key in enumerate(keys) if not store.check([key]))
        return f"the missing ranks {ranks} of {size}, expected at {host}:{port}{_origin()}"

    try:
        _wait_until_none(missing, deadline, limit)
        return store, [store.get(key).decode() for key in keys]
    except RuntimeError:
        raise ValueError(f"rank 0 at {host}:{port} has ended while ranks were missing") from None


def _require_variables(*names: str) -> None:
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(
            f"RANK is set, but not {' and '.join(missing)}: start the ranks with torchrun or srun,"
            f" set the missing variables, or unset RANK to run alone"
        )


def _origin() -> str:
    """The way out if WORLD_SIZE comes from Slurm, as in an interactive shell."""
    if os.environ.get("SLURM_STEP_NUM_TASKS") != os.environ["WORLD_SIZE"]:
        return ""
    return "; to run alone in a shell of this Slurm step, set SLURM_STEP_NUM_TASKS=1"


def _wait_until_none(obstacle: Callable[[], str | None], deadline: float, limit: str) -> None:
    """Call a function until it returns None. What it returns is reported after a few seconds, and
    is the ValueError's message at the deadline."""
    notice = time.monotonic() + _NOTICE_AFTER
    while (what := obstacle()) is not None:
        now = time.monotonic()
        if now >= notice:
            print(f"bt-fast: waiting up to {limit} for {what}", file=sys.stderr, flush=True)
            notice = math.inf
        if now >= deadline:
            raise ValueError(f"waited {limit} for {what}")
        time.sleep(0.1)


def _open_store(host: str, port: int, size: int, is_server: bool) -> dist.Store | None:
    """The store, or None if what listens there is none. Raises ValueError if it cannot listen.

    In a thread: the constructor waits forever for a program that does not answer.
    """
    results: list[dist.Store | RuntimeError] = []

    def connect() -> None:
        limit = timedelta(seconds=_CONNECT_LIMIT)
        try:
            results.append(dist.TCPStore(host, port, size, is_server, limit, False))
        except RuntimeError as error:
            results.append(error)

    thread = threading.Thread(target=connect, name="store", daemon=True)
    with _stderr_closed():  # to which the library writes its stack
        thread.start()
        thread.join(_CONNECT_LIMIT + 4)  # it may retry once beyond its limit
    result = results[0] if results else None
    if isinstance(result, dist.Store):
        return result
    if "EADDRINUSE" in str(result):
        raise ValueError(f"MASTER_PORT {port} is in use on this machine; choose another")
    if is_server:
        raise ValueError(
            f"rank 0 does not reach {host}:{port}; MASTER_ADDR must be its own machine"
        )
    return None


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
