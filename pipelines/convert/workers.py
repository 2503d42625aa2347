"""Many images made into plain JPEGs by worker processes, in order, few at a time.

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
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection

from pipelines.convert.jpeg import (
    MAX_FILE_BYTES,
    Check,
    Prepared,
    UnreadableImage,
    prepare,
    read_image,
)
from pipelines.convert.manifest import UNKNOWN, WHOLE, Image, Place, SourceError

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
    images: Iterator[Image], *, workers: int, max_side: int, check: Check
) -> Generator[tuple[Image, Outcome], None, None]:
    """Every image with its outcome, in order. At most 32 images per worker are in memory.

    Raises WorkerDied; SourceError when a file that holds many images cannot be read any more.
    """
    tasks = iter(lambda: (list(islice(images, CHUNK)), max_side, check), ([], max_side, check))
    if workers == 1:
        for task in tasks:
            yield from zip(task[0], _prepare_images(*task), strict=True)
        return
    with contextlib.closing(_Workers(workers)) as pool:
        pending: deque[tuple[list[Image], Future[list[Outcome]]]] = deque()
        for task in tasks:
            pending.append((task[0], pool.submit(task)))
            if len(pending) > TASKS_PER_WORKER * workers:
                chunk, future = pending.popleft()
                yield from zip(chunk, future.result(), strict=True)
        while pending:
            chunk, future = pending.popleft()
            yield from zip(chunk, future.result(), strict=True)


class _Workers:
    """`count` processes that run `_prepare_images`, each behind a thread of this process."""

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
            result = self._here.connection.recv()
        except (EOFError, OSError):
            raise WorkerDied(
                "a worker process died, most likely for lack of memory; try fewer --workers"
            ) from None
        if isinstance(result, SourceError):
            raise result
        return result

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
            task = connection.recv()
            try:
                connection.send(_prepare_images(*task))
            except SourceError as error:
                connection.send(error)


def _prepare_images(images: list[Image], max_side: int, check: Check) -> list[Outcome]:
    outcomes = []
    for image in images:
        num_bytes = 0
        try:
            data = image.data if isinstance(image.data, bytes) else _read(image.data)
            num_bytes = len(data)
            prepared = prepare(data, max_side, check)
            outcome = Outcome(num_bytes, prepared, zlib.crc32(prepared.jpeg))
        except UnreadableImage as error:
            outcome = Outcome(num_bytes, reason=str(error))
        outcomes.append(outcome)
    return outcomes


def _read(place: Place) -> bytes:
    if place.size == WHOLE:
        return read_image(place.path)
    if place.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{place.size} bytes, more than {MAX_FILE_BYTES}")
    try:
        with open(place.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), place.size, place.start)
    except OSError as error:
        raise SourceError(f"{place.path} cannot be read: {error.strerror}") from None
    if len(data) < place.size:
        raise SourceError(f"{place.path} has become shorter since its images were listed")
    if place.crc != UNKNOWN and zlib.crc32(data) != place.crc:
        raise UnreadableImage("its bytes are not those that were stored (checksum mismatch)")
    return place.head + data
