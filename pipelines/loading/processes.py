"""The native backend in other processes, for training on a GPU.

A step on a GPU is about a thousand launches from Python, each of which takes the interpreter lock.
Decoding threads of the same process would delay them: on an H100 with 16 threads, a step took
157 ms from JPEGs and 82 ms without them, although the threads alone needed 60 ms a batch. They
delay each other, too: two threads decode fewer images of 32 px than one.

So each worker is a process with one thread, which always decodes the same images. All share the
memory of a few batches, which is page-locked here: the workers fill it, and each batch is copied
from it to the GPU, on the stream that is current. Every request has one answer, in order; those to
an iteration that was left are awaited before the next one, which fills the same memory.
"""

import contextlib
import ctypes
import itertools
import mmap
import os
import signal
import subprocess
import sys
import traceback
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from math import prod
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import torch

from pipelines.loading.datasets import ImageDataset
from pipelines.loading.loader import CropBackend, Request
from pipelines.loading.native import NativeBackend

_PAGE = mmap.PAGESIZE
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def native_backend(
    dataset: ImageDataset,
    device: torch.device,
    *,
    batch_bytes: int,
    num_threads: int,
    prefetch: int = 3,
    cache_bytes: int = 0,
) -> CropBackend:
    """The native backend for a device: processes for a GPU, threads for a CPU.

    batch_bytes: size of the largest batch. Others: as of `open_loader`.
    """
    if device.type != "cuda":
        return NativeBackend(
            dataset, num_threads=num_threads, prefetch=prefetch, cache_bytes=cache_bytes
        )
    return DecodeProcesses(
        dataset,
        batch_bytes=batch_bytes,
        device=device,
        num_workers=num_threads,
        prefetch=prefetch,
        cache_bytes=cache_bytes,
    )


class DecodeProcesses:
    """Crops on the training device, made by `NativeBackend` in other processes.

    Args:
        dataset: can be pickled, and used by forked processes at once.
        batch_bytes: size of the largest batch.
        device: where batches are copied; a CPU's are copied too, because the memory is reused.
        num_workers: decoding processes.
        prefetch: batches prepared ahead.
        cache_bytes: memory of all processes for decoded images.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_bytes: int,
        device: torch.device,
        num_workers: int = 2,
        prefetch: int = 3,
        cache_bytes: int = 0,
    ) -> None:
        self.device, self.prefetch = device, max(prefetch, 1)
        num_slots = self.prefetch + 2  # one is used, one is copied
        slot_bytes = -(-batch_bytes // _PAGE) * _PAGE
        memory = os.memfd_create("bt-fast batches")
        try:
            os.ftruncate(memory, num_slots * slot_bytes)
            self._slots = _map_slots(memory, slot_bytes)
            self._copied: list[torch.cuda.Event | None] = [None] * num_slots
            if device.type == "cuda":
                address, num_bytes = self._slots.data_ptr(), self._slots.nbytes
                with torch.cuda.device(device):
                    status = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
                torch.cuda.check_error(int(status))
                weakref.finalize(self, _unregister, self._slots, self._copied)
            self._connections, self._process = _start(memory, num_workers)
        finally:
            os.close(memory)
        weakref.finalize(self, _stop, self._connections, self._process)
        self._iteration = 0  # number of the one that is served
        self._unanswered = [0] * num_workers  # requests of each process
        self._exchanging = False  # stays true where a KeyboardInterrupt separated message and count
        self._send(self._connections[0], (dataset, slot_bytes, cache_bytes // num_workers))

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [k, n, size, size, 3] for each request, in order, on the device.

        One iteration is served at a time: an earlier one that goes on raises RuntimeError.
        """
        if self._exchanging:
            raise RuntimeError("this loader was interrupted within a message; open it again")
        self._iteration += 1
        iteration = self._iteration
        for worker, count in enumerate(self._unanswered):
            for _ in range(count):
                self._receive(worker)
        requests, slots = iter(requests), itertools.cycle(range(len(self._slots)))
        pending: deque[tuple[int, tuple[int, ...]]] = deque()  # slots and shapes
        while True:
            if iteration != self._iteration:
                raise RuntimeError("this iterator has ended, because another of its loader began")
            while len(pending) <= self.prefetch and (request := next(requests, None)):
                slot = next(slots)
                if (event := self._copied[slot]) is not None:
                    event.synchronize()
                self._distribute(slot, request)
                pending.append((slot, request.shape))
            if not pending:
                return
            for worker in range(len(self._connections)):
                if (error := self._receive(worker)) is not None:
                    raise error
            yield self._copy(*pending.popleft())

    def _distribute(self, slot: int, request: Request) -> None:
        """Send each process the rows of its images: those of its decoded copies."""
        workers = request.samples % len(self._connections)
        for worker, connection in enumerate(self._connections):
            rows = np.flatnonzero(workers == worker)
            samples, boxes = request.samples[rows], request.boxes[rows]
            self._exchanging = True
            self._send(connection, (slot, request.shape, rows, samples, boxes))
            self._unanswered[worker] += 1
            self._exchanging = False

    def _copy(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        crops = self._slots[slot, : prod(shape)].view(shape)
        if self.device.type != "cuda":
            return crops.clone()
        crops = crops.to(self.device, non_blocking=True)
        self._copied[slot] = torch.cuda.current_stream(self.device).record_event()
        return crops

    def _send(self, connection: Connection, message) -> None:
        try:
            connection.send(message)
        except OSError:
            self._raise_ended()

    def _receive(self, worker: int) -> Exception | None:
        try:
            self._connections[worker].poll(None)  # an interrupt while waiting loses nothing
            self._exchanging = True
            error = self._connections[worker].recv()
        except (OSError, EOFError):
            self._raise_ended()
        self._unanswered[worker] -= 1
        self._exchanging = False
        return error

    def _raise_ended(self) -> NoReturn:
        for connection in self._connections:  # the processes that are left end, too
            connection.close()
        status = self._process.wait()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise ChildProcessError(
            f"a decoding process ended unexpectedly ({reason}); after signal 9, memory may be"
            " short: lower --workers or --cache-gb"
        )


def _map_slots(memory: int, slot_bytes: int) -> torch.Tensor:
    """uint8 [slots, bytes] of a file descriptor's memory, shared between processes."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(memory, 0), np.uint8)).view(-1, slot_bytes)


def _unregister(slots: torch.Tensor, copied: list[torch.cuda.Event | None]) -> None:
    """Release page-locked memory before it is unmapped; CUDA would keep its addresses."""
    for event in copied:
        if event is not None:
            event.synchronize()
    torch.cuda.cudart().cudaHostUnregister(slots.data_ptr())


def _start(memory: int, num_workers: int) -> tuple[list[Connection], subprocess.Popen]:
    """Start the processes, each with one end of a connection; return the other ends and the parent
    of the processes, which ends with them.

    Signals that stop a run are blocked in them: they end when the connections are closed.
    """
    pairs = [Pipe() for _ in range(num_workers)]
    descriptors = [theirs.fileno() for _, theirs in pairs]
    code = f"from pipelines.loading.processes import serve; serve({memory}, {descriptors})"
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    stops = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],  # -P: no imports from the working directory
            stdin=subprocess.DEVNULL, pass_fds=[memory, *descriptors],
            env=os.environ | one_thread | {"PYTHONPATH": path},
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for _, theirs in pairs:
        theirs.close()
    return [ours for ours, _ in pairs], process


def _stop(connections: list[Connection], process: subprocess.Popen) -> None:
    for connection in connections:
        connection.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# In the other processes -------------------------------------------------------------------------


def serve(memory: int, descriptors: list[int]) -> None:
    """Fork a process for each connection, so that modules and data set are loaded once, and wait
    for them. If one fails, end all, and then as it did.
    """
    try:
        dataset, slot_bytes, cache_bytes = Connection(os.dup(descriptors[0])).recv()
    except EOFError:
        return
    parent, workers = os.getpid(), set()
    for descriptor in descriptors:
        worker = os.fork()
        if worker == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                for other in set(descriptors) - {descriptor}:
                    os.close(other)
                torch.set_num_threads(1)
                slots = _map_slots(memory, slot_bytes).numpy()
                native = NativeBackend(dataset, cache_bytes=cache_bytes)
                _decode(Connection(descriptor), slots, native)
            os._exit(0)
        workers.add(worker)
    for descriptor in descriptors:
        os.close(descriptor)
    while workers:
        worker, status = os.wait()
        workers.remove(worker)
        if status:
            for other in workers:
                os.kill(other, signal.SIGKILL)
            if os.WIFSIGNALED(status):
                os.kill(parent, os.WTERMSIG(status))
            os._exit(1)


def _decode(connection: Connection, slots: np.ndarray, native: NativeBackend) -> None:
    """Answer requests until the connection is closed."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            slot, shape, rows, samples, boxes = connection.recv()
            crops = slots[slot, : prod(shape)].reshape(shape)
            error: Exception | None = None
            try:
                for row, sample, boxes_of_row in zip(rows, samples, boxes, strict=True):
                    native.crop(int(sample), boxes_of_row, crops[:, row])
            except (ValueError, MemoryError) as known:
                error = known
            except Exception:
                error = RuntimeError(traceback.format_exc())
            connection.send(error)
