"""Many image files made into plain JPEGs by worker processes, in order, few at a time.

Every worker has a pipe of its own, and a thread here that sends it tasks and waits for results.
(The one result queue of ProcessPoolExecutor is shared: a worker that dies while it writes there
leaves half a message and a held lock, and everyone waits for ever.) A worker that dies ends its
pipe, and so does its parent: neither outlives the other for long.
"""

import contextlib
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from pipelines.images import Check, Prepared, UnreadableImage, prepare, read_image
from pipelines.sources import Split

CHUNK = 8  # files per task: enough to hide the hand-over, few enough to bound the memory
TASKS_PER_WORKER = 3  # in flight, so that no worker waits for the writer


class WorkerDied(RuntimeError):
    """A worker process ended without being asked to, most likely killed for its memory."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker made of one file: an image and its CRC-32, or the reason why not."""

    num_bytes: int
    image: Prepared | None = None
    checksum: int = 0
    reason: str = ""


def prepare_all(
    split: Split, *, workers: int, max_side: int, check: Check
) -> Generator[Outcome, None, None]:
    """One per path, in order. At most 32 images per worker are in memory. Raises WorkerDied."""
    starts = range(0, len(split.paths), CHUNK)
    tasks = ((split.root, split.paths[start : start + CHUNK], max_side, check) for start in starts)
    if workers == 1:
        for task in tasks:
            yield from _prepare_files(*task)
        return
    with contextlib.closing(_Workers(workers)) as pool:
        pending: deque[Future[list[Outcome]]] = deque()
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > TASKS_PER_WORKER * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


class _Workers:
    """`count` processes that run `_prepare_files`, each behind a thread of this process."""

    def __init__(self, count: int) -> None:
        # A server forks the workers: they start fast, and inherit neither threads nor open files.
        self._context = get_context("forkserver")
        self._processes: list = []
        self._here = threading.local()
        self._threads = ThreadPoolExecutor(count)

    def submit(self, task: tuple) -> Future[list[Outcome]]:
        return self._threads.submit(self._run, task)

    def _run(self, task: tuple) -> list[Outcome]:
        try:
            if not hasattr(self._here, "connection"):
                self._here.connection = self._start()
            self._here.connection.send(task)
            return self._here.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(str(error)) from None

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        return ours

    def close(self) -> None:
        """Stop everything at once; results that nobody waited for are lost."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.terminate()  # ends its pipe, and with it the wait of its thread
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.terminate()  # also one that was only just starting
            process.join()


def _serve(connection: Connection) -> None:
    """A worker process: answer tasks until the pipe ends, which the parent's death does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["OMP_NUM_THREADS"] = "1"  # there is a worker per core already
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_prepare_files(*connection.recv()))


def _prepare_files(root: Path, paths: list[str], max_side: int, check: Check) -> list[Outcome]:
    outcomes = []
    for path in paths:
        num_bytes = 0
        try:
            data = read_image(root / path)
            num_bytes = len(data)
            image = prepare(data, max_side, check)
            outcome = Outcome(num_bytes, image, zlib.crc32(image.jpeg))
        except UnreadableImage as error:
            outcome = Outcome(num_bytes, reason=str(error))
        outcomes.append(outcome)
    return outcomes
