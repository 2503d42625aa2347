"""Supervisor of ranks: starts them, and restarts all from the last saved state when one dies.

Ranks are processes of this machine or the tasks of one srun. A stop request to the supervisor is
forwarded to the ranks, which save and exit with EXIT_STOPPED. EXIT_REFUSED, a user error, is final.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from torch.distributed import TCPStore

from bt_fast.distributed.rendezvous import RESTARTS
from bt_fast.distributed.signals import EXIT_REFUSED, EXIT_STOPPED, EXIT_UNSAVED, StopFlag

MAX_RESTARTS = 3
_GRACE_PERIOD = 10.0  # seconds for ranks to report and exit after one has died


def run_processes(command: Sequence[str], world_size: int, stop: StopFlag) -> int:
    """Run `bt-fast COMMAND...` as `world_size` ranks of this machine; returns the exit status."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {  # torchrun's variables
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }

    def start_rank(rank: int) -> subprocess.Popen:
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        return subprocess.Popen(_rank_command(command), env=environment)

    return _supervise(lambda: [start_rank(rank) for rank in range(world_size)], stop)


def run_under(launcher: Sequence[str], command: Sequence[str], stop: StopFlag) -> int:
    """Run `bt-fast COMMAND...` under a launcher (the words of an srun command); returns the exit
    status."""
    words = [*launcher, *_rank_command(command)]
    return _supervise(lambda: [subprocess.Popen(words, stdin=subprocess.DEVNULL)], stop)


def _rank_command(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bt_fast.cli", *command]


def _supervise(start: Callable[[], list[subprocess.Popen]], stop: StopFlag) -> int:
    """Start processes until they succeed, stop on request, or have failed MAX_RESTARTS + 1 times.

    Raises ValueError in the last case.
    """
    stop.training = True  # Ctrl-C is a stop request, too
    failure = None
    for restart in range(MAX_RESTARTS + 1):
        if stop.requested:
            return EXIT_STOPPED
        if failure:
            message = f"bt-fast: {failure}; restarting all ranks from the last saved state"
            print(message, file=sys.stderr, flush=True)
        os.environ[RESTARTS] = str(restart)
        processes = start()
        try:
            failure = _wait(processes, stop)
        finally:
            _terminate(processes)
        for status in (EXIT_REFUSED, EXIT_UNSAVED, EXIT_STOPPED):
            if any(process.returncode == status for process in processes):
                return status
        if failure is None:
            return 0
    raise ValueError(f"{failure}, also after {MAX_RESTARTS} restarts")


def _wait(processes: list[subprocess.Popen], stop: StopFlag) -> str | None:
    """Wait until all processes have ended, or for the grace period after one has failed; returns
    how the first one failed, or None. A stop request is forwarded."""
    forwarded, failure, deadline = False, None, float("inf")
    while True:
        ended = [process.poll() is not None for process in processes]
        for rank, process in enumerate(processes):
            if failure is None and process.returncode:
                name = f"rank {rank}" if len(processes) > 1 else "srun"
                failure = f"{name} ended with {_describe_exit(process.returncode)}"
                deadline = time.monotonic() + _GRACE_PERIOD
        if all(ended) or time.monotonic() > deadline:
            return failure
        if stop.requested and not forwarded:
            forwarded = True
            for process in processes:
                process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)


def _terminate(processes: list[subprocess.Popen]) -> None:
    """End all processes: with SIGTERM, on which srun ends its tasks, then with SIGKILL."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_PERIOD
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _describe_exit(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
