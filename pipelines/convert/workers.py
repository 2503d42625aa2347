"""Converts images into plain JPEGs in worker processes, in order and with bounded memory.

Every worker has its own pipe, and a thread of this process that sends tasks and waits for results.
(ProcessPoolExecutor shares one result queue: a worker that dies while writing to it leaves a
partial message and a locked queue, and all others wait forever.) The death of a worker closes its
pipe, and so does the death of its parent, so neither outlives the other for long.
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
from pipelines.convert.manifest import ENTIRE_FILE, Location, SourceError, SourceImage

Task = tuple[list[SourceImage], int, Check]  # images, max_side, check
CHUNK_SIZE = 8  # images per task: enough to hide the transfer, few enough to bound the memory
TASKS_PER_WORKER = 3  # in flight, so that no worker waits for the writer


class WorkerDied(RuntimeError):
    """A worker process ended unexpectedly, most likely killed because memory ran out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one image file: a JPEG and its CRC-32, or the reason why there is none."""

    num_bytes: int  # of the source file
    image: Prepared | None = None
    checksum: int = 0
    reason: str = ""


def prepare_all(
    images: Iterator[SourceImage], *, workers: int, max_side: int, check: Check
) -> Generator[tuple[SourceImage, Outcome], None, None]:
    """Yield every image with its outcome, in order; at most 32 images per worker are in memory.

    Raises WorkerDied; SourceError when an archive can no longer be read.
    """
    chunks = iter(lambda: list(islice(images, CHUNK_SIZE)), [])
    tasks = ((chunk, max_side, check) for chunk in chunks)
    if workers == 1:
        for task in tasks:
            yield from zip(task[0], _prepare_images(*task), strict=True)
        return
    with contextlib.closing(_Workers(workers)) as pool:
        pending: deque[tuple[list[SourceImage], Future[list[Outcome]]]] = deque()
        for task in tasks:
            pending.append((task[0], pool.submit(task)))
            if len(pending) > TASKS_PER_WORKER * workers:
                chunk, future = pending.popleft()
                yield from zip(chunk, future.result(), strict=True)
        while pending:
            chunk, future = pending.popleft()
            yield from zip(chunk, future.result(), strict=True)


class _Workers:
    """`count` processes that run `_prepare_images`, each served by a thread of this process."""

    def __init__(self, count: int) -> None:
        # A fork server starts workers quickly, without inherited threads or open files.
        self._context = get_context("forkserver")
        self._processes: list = []
        self._thread_local = threading.local()
        self._threads = ThreadPoolExecutor(count)

    def submit(self, task: Task) -> Future[list[Outcome]]:
        return self._threads.submit(self._run, task)

    def _run(self, task: Task) -> list[Outcome]:
        try:
            if not hasattr(self._thread_local, "connection"):
                self._thread_local.connection = self._start_process()
            self._thread_local.connection.send(task)
            result = self._thread_local.connection.recv()
        except (EOFError, OSError):
            raise WorkerDied(
                "a worker process died, most likely for lack of memory; try fewer --workers"
            ) from None
        if isinstance(result, SourceError):
            raise result
        return result

    def _start_process(self) -> Connection:
        connection, worker_connection = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(worker_connection,), daemon=True)
        process.start()
        worker_connection.close()
        self._processes.append(process)
        return connection

    def close(self) -> None:
        """Stop all workers immediately and discard pending results."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.terminate()  # closes its pipe, which ends the wait of its thread
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.terminate()  # also a process that started in the meantime
            process.join()


def _serve(connection: Connection) -> None:
    """Main function of a worker process: process tasks until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["OMP_NUM_THREADS"] = "1"  # there is one worker per core
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                connection.send(_prepare_images(*task))
            except SourceError as error:
                connection.send(error)


def _prepare_images(images: list[SourceImage], max_side: int, check: Check) -> list[Outcome]:
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


def _read(location: Location) -> bytes:
    if location.problem:
        raise UnreadableImage(location.problem)
    if location.size == ENTIRE_FILE:
        return read_image(location.path)
    if location.size > MAX_FILE_BYTES:
        raise UnreadableImage(f"{location.size} bytes, more than {MAX_FILE_BYTES}")
    try:
        with open(location.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), location.size, location.offset)
    except OSError as error:
        raise SourceError(f"{location.path} cannot be read: {error.strerror}") from None
    if len(data) < location.size:
        raise SourceError(f"{location.path} has become shorter since its images were listed")
    if location.checksum is not None and zlib.crc32(data) != location.checksum:
        raise UnreadableImage("its bytes are not those that were stored (checksum mismatch)")
    return location.prefix + data
