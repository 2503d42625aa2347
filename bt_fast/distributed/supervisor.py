"""Starting ranks, and starting all again from the newest checkpoint when one of them dies.

Ranks are processes of this machine or the tasks of one srun. Asked to stop, this process asks them;
they save and end with EXIT_STOPPED. What a rank refuses (EXIT_REFUSED) it would refuse again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from torch.distributed import TCPStore

from bt_fast.distributed import rendezvous
from bt_fast.distributed.signals import EXIT_STOPPED, EXIT_UNSAVED, StopFlag

MAX_RESTARTS = 3
EXIT_REFUSED = 2  # what a user can do wrong, and has been told
_LAST_WORDS = 10.0  # seconds in which ranks may say what they saw of the one that died


def here(command: Sequence[str], world_size: int, stop: StopFlag) -> int:
    """Run `bt-fast COMMAND...` as so many ranks of this machine; returns the exit status."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # As torchrun would say it.
    alike = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }

    def start() -> list[subprocess.Popen]:
        return [
            subprocess.Popen(
                _rank_command(command),
                env=os.environ | {name: str(value) for name, value in told.items()},
            )
            for told in ({**alike, "RANK": r, "LOCAL_RANK": r} for r in range(world_size))
        ]

    return _see_through(start, stop)


def under(launcher: Sequence[str], command: Sequence[str], stop: StopFlag) -> int:
    """Run it as what the words of `launcher` (an srun) start; returns the exit status."""

    def start() -> list[subprocess.Popen]:
        words = [*launcher, *_rank_command(command)]
        return [subprocess.Popen(words, stdin=subprocess.DEVNULL)]

    return _see_through(start, stop)


def _rank_command(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bt_fast.cli", *command]


def _see_through(start: Callable[[], list[subprocess.Popen]], stop: StopFlag) -> int:
    stop.training = True  # Ctrl-C, too, is for the ranks to answer
    failure = None
    for restart in range(MAX_RESTARTS + 1):
        if stop.requested:
            return EXIT_STOPPED
        if failure:
            note = f"bt-fast: {failure}; all start again from what was last saved"
            print(note, file=sys.stderr, flush=True)
        os.environ[rendezvous.RESTARTS] = str(restart)
        processes = start()
        try:
            failure = _wait(processes, stop)
        finally:
            _end(processes)
        for status in (EXIT_REFUSED, EXIT_UNSAVED, EXIT_STOPPED):
            if any(process.returncode == status for process in processes):
                return status
        if failure is None:
            return 0
    raise ValueError(f"{failure}, and so did {MAX_RESTARTS} restarts")


def _wait(processes: list[subprocess.Popen], stop: StopFlag) -> str | None:
    """Until all have ended, or until soon after one has failed; returns what it ended with, or
    None. A wish to stop is passed on."""
    asked, failure, deadline = False, None, float("inf")
    while True:
        ended = [process.poll() is not None for process in processes]
        for rank, process in enumerate(processes):
            if failure is None and process.returncode:
                who = f"rank {rank}" if len(processes) > 1 else "srun"
                failure = f"{who} ended with {_in_words(process.returncode)}"
                deadline = time.monotonic() + _LAST_WORDS
        if all(ended) or time.monotonic() > deadline:
            return failure
        if stop.requested and not asked:
            asked = True
            for process in processes:
                process.send_signal(signal.SIGUSR2)
        time.sleep(0.1)


def _end(processes: list[subprocess.Popen]) -> None:
    """What is still there; with SIGTERM first, on which srun ends what it has started."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _LAST_WORDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _in_words(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"
