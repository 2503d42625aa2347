"""Converts images into plain JPEGs in worker processes, in order and with bounded memory.

Every worker has its own pipe, and a thread of this process that sends tasks and waits for results.
(ProcessPoolExecutor shares one result queue: a worker that dies while writing to it leaves a
partial message and a locked queue, and all others wait forever.) The death of a worker closes its
pipe, and so does the death of its parent, so neither outlives the other for long. Each image of a
dead worker's task is tried in a process of its own: one that crashes that one, too, is broken.
"""

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal

from pipelines.common.console import print_line
from pipelines.convert.jpeg import (
    MAX_FILE_BYTES,
    NO_FLAGS,
    OUT_OF_FILES,
    Check,
    Prepared,
    prepare,
    read_image,
)
from pipelines.convert.manifest import ENTIRE_FILE, Location, SourceError, SourceImage
from pipelines.convert.pixels import PixelFlags
from pipelines.convert.tiff import UnreadableImage

# auto: full, but none for images whose checksum the source has.
AnyCheck = Check | Literal["auto"]
Task = tuple[list[SourceImage], int, AnyCheck, PixelFlags]  # images, max_side, check, flags
CHUNK_SIZE = 8  # images per task: enough to hide the transfer, few enough to bound the memory
TASKS_PER_WORKER = 3  # in flight, so that no worker waits for the writer
CRASHED = "crashed the decoder"


class WorkerDied(RuntimeError):
    """A worker process cannot be started, or was killed, most likely because memory ran out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for one image file: a JPEG and its CRC-32, or the reason why there is none."""

    num_bytes: int  # of the source file
    image: Prepared | None = None
    checksum: int = 0
    reason: str = ""
    is_dropped: bool = False  # an intact image that --drop leaves out for this reason


def prepare_all(
    images: Iterator[SourceImage],
    *,
    workers: int,
    max_side: int,
    check: AnyCheck,
    flags: PixelFlags = NO_FLAGS,
) -> Generator[tuple[SourceImage, Outcome], None, None]:
    """Yield every image with its outcome, in order; at most 32 images per worker are in memory.

    Raises WorkerDied; SourceError when an archive can no longer be read; OSError when too many
    files are open.
    """
    chunks = iter(lambda: list(islice(images, CHUNK_SIZE)), [])
    tasks = ((chunk, max_side, check, flags) for chunk in chunks)
    if workers == 1:
        for task in tasks:
            yield from zip(task[0], _prepare_images(*task), strict=True)
        return
    with contextlib.closing(_Workers(workers)) as pool:
        pending: deque[tuple[list[SourceImage], Future[list[Outcome]]]] = deque()
        while True:
            for task in islice(tasks, TASKS_PER_WORKER * workers + 1 - len(pending)):
                pending.append((task[0], pool.submit(task)))
            if not pending:
                return
            chunk, future = pending.popleft()
            yield from zip(chunk, future.result(), strict=True)


class _Process:
    """A worker process that runs `_prepare_images`. Raises WorkerDied if it does not start."""

    # A new interpreter has no inherited threads or open files. (A fork server starts quicker, but
    # needs a socket in TMPDIR, whose path may be too long or not writable.)
    context = get_context("spawn")
    lock = threading.Lock()  # held while a process starts or ends

    def __init__(self) -> None:
        try:
            self._connection, other_end = self.context.Pipe()
            self._process = self.context.Process(target=_serve, args=(other_end,), daemon=True)
            with self.lock:
                self._process.start()
            other_end.close()
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise
            raise _not_started(str(error)) from None
        try:
            self._connection.recv()
        except (EOFError, OSError):
            raise _not_started(f"it ended at once, with {self.end()}") from None

    def run(self, task: Task) -> list[Outcome] | None:
        """The outcomes of the task's images; None if the process died."""
        try:
            self._connection.send(task)
            result = self._connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(result, Exception):
            raise result
        return result

    def kill(self) -> None:
        """Stop it immediately."""
        self._process.kill()

    def end(self) -> str:
        """Let it finish, if it has not died; returns how it ended, such as "signal 11"."""
        self._connection.close()
        with self.lock:
            self._process.join()
        code = self._process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"status {code}"


class _Workers:
    """At most `count` processes, each served by a thread of this process during a task."""

    def __init__(self, count: int) -> None:
        self._processes: set[_Process] = set()
        self._idle: list[_Process] = []
        self._threads = ThreadPoolExecutor(count)
        self._is_closed = False

    def submit(self, task: Task) -> Future[list[Outcome]]:
        try:
            return self._threads.submit(self._run, task)
        except RuntimeError as error:  # the system starts no more threads
            raise _not_started(str(error)) from None

    def _run(self, task: Task) -> list[Outcome]:
        try:
            process = self._idle.pop()
        except IndexError:
            process = self._start()
        if (outcomes := process.run(task)) is not None:
            self._idle.append(process)
            return outcomes
        cause = self._end(process)
        if not self._is_closed:
            again = f"{len(task[0])} images are tried again, each in a new process"
            print_line(f"A worker process ended with {cause}; {again}", file=sys.stderr)
        return [self._run_alone(([image], *task[1:])) for image in task[0]]

    def _run_alone(self, task: Task) -> Outcome:
        """The outcome of one image, in a process of its own."""
        process = self._start()
        outcomes, cause = process.run(task), self._end(process)
        if outcomes is not None:
            return outcomes[0]
        if cause == "signal 9":
            raise WorkerDied(
                f"{task[0][0].name}: its worker process was killed (signal 9), most likely for lack"
                f" of memory; try fewer --workers"
            )
        return Outcome(0, reason=f"{CRASHED} ({cause})")

    def _start(self) -> _Process:
        if self._is_closed:
            raise CancelledError  # not seen: pending results are dropped
        process = _Process()
        self._processes.add(process)
        if self._is_closed:  # while it started
            process.kill()
            raise CancelledError
        return process

    def _end(self, process: _Process) -> str:
        self._processes.discard(process)
        return process.end()

    def close(self) -> None:
        """Stop all workers immediately and discard pending results."""
        self._is_closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in [*self._processes]:
            process.kill()  # closes its pipe, which ends the wait of its thread
        self._threads.shutdown(wait=True)
        for process in self._processes:
            process.end()


def _not_started(reason: str) -> WorkerDied:
    return WorkerDied(f"a worker process cannot be started: {reason}; try fewer --workers")


def _serve(connection: Connection) -> None:
    """Main function of a worker process: process tasks until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent handles them
        signal.signal(number, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # there is one worker per core
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints there what Pillow raises
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)  # it runs
        while True:
            task = connection.recv()
            try:
                connection.send(_prepare_images(*task))
            except (SourceError, OSError) as error:
                connection.send(error)


def _prepare_images(
    images: list[SourceImage], max_side: int, check: AnyCheck, flags: PixelFlags
) -> list[Outcome]:
    outcomes = []
    for image in images:
        num_bytes = 0
        try:
            data = image.data if isinstance(image.data, bytes) else _read(image.data)
            num_bytes = len(data)
            has_checksum = isinstance(image.data, Location) and image.data.checksum is not None
            auto: Check = "none" if has_checksum else "full"
            prepared = prepare(data, max_side, auto if check == "auto" else check, flags)
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
            file.seek(location.offset)
            data = file.read(location.size)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        raise SourceError(f"{location.path} cannot be read: {error.strerror}") from None
    if len(data) < location.size:
        raise SourceError(f"{location.path} has become shorter since its images were listed")
    if location.checksum is not None and zlib.crc32(data) != location.checksum:
        raise UnreadableImage("its bytes are not those that were stored (checksum mismatch)")
    return location.prefix + data
