"""The native backend in a process of its own, for training on a GPU.

A step on a GPU is about a thousand launches from Python, each of which takes the interpreter lock.
Decoding threads of the same process would delay them: on an H100 with 16 threads, a step took
157 ms from JPEGs and 82 ms without them, although the threads alone needed 60 ms a batch.

The processes share the memory of a few batches, which is page-locked here. The other one fills it,
and each batch is copied from it to the GPU, on the stream that is current. They exchange requests
and answers in order; None ends the requests of one iteration, `_END` its answers.
"""

import contextlib
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

import numpy as np
import torch

from pipelines.loading.datasets import ImageDataset
from pipelines.loading.loader import Request
from pipelines.loading.native import NativeBackend

_END = "end"
_PAGE = mmap.PAGESIZE


class DecodeProcess:
    """Crops on the training device, made by `NativeBackend` in another process.

    Args:
        dataset: can be pickled.
        batch_bytes: size of the largest batch.
        device: where batches are copied; a CPU's are copied too, because the memory is reused.
        num_threads, prefetch, cache_bytes: as of `NativeBackend`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_bytes: int,
        device: torch.device,
        num_threads: int = 2,
        prefetch: int = 3,
        cache_bytes: int = 0,
    ) -> None:
        self.device, self.prefetch = device, max(prefetch, 1)
        num_slots = self.prefetch + 2  # one is used, one is copied
        slot_bytes = -(-batch_bytes // _PAGE) * _PAGE
        memory = os.memfd_create("bt-fast batches")
        os.ftruncate(memory, num_slots * slot_bytes)
        self._slots = _map_slots(memory, slot_bytes)
        self._copied: list[torch.cuda.Event | None] = [None] * num_slots
        if device.type == "cuda":
            address, num_bytes = self._slots.data_ptr(), self._slots.nbytes
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)))
            weakref.finalize(self, _unregister, self._slots, self._copied)
        self._connection, self._process = _start(memory)
        os.close(memory)
        weakref.finalize(self, _stop, self._connection, self._process)
        options = {
            "num_threads": num_threads, "prefetch": self.prefetch, "cache_bytes": cache_bytes,
        }  # fmt: skip
        self._send((dataset, slot_bytes, options))

    def crops(self, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """uint8 [k, n, size, size, 3] for each request, in order, on the device."""
        numbered = enumerate(requests)
        pending: deque[tuple[int, tuple[int, ...]]] = deque()  # slots and shapes
        is_open = True
        try:
            while True:
                while is_open and len(pending) <= self.prefetch:
                    number, request = next(numbered, (0, None))
                    if request is None:
                        self._send(None)
                        is_open = False
                        break
                    slot = number % len(self._slots)
                    if (event := self._copied[slot]) is not None:
                        event.synchronize()
                    self._send((slot, request))
                    pending.append((slot, request.shape))
                if not pending:
                    return
                if (error := self._receive()) is not None:
                    raise error
                yield self._copy(*pending.popleft())
        finally:
            with contextlib.suppress(ChildProcessError):
                if is_open:
                    self._send(None)
                while self._receive() != _END:
                    pass

    def _copy(self, slot: int, shape: tuple[int, ...]) -> torch.Tensor:
        crops = self._slots[slot, : prod(shape)].view(shape)
        if self.device.type != "cuda":
            return crops.clone()
        crops = crops.to(self.device, non_blocking=True)
        self._copied[slot] = torch.cuda.current_stream(self.device).record_event()
        return crops

    def _send(self, message) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._raise_ended()

    def _receive(self):
        try:
            return self._connection.recv()
        except (OSError, EOFError):
            self._raise_ended()

    def _raise_ended(self) -> None:
        status = self._process.wait()
        reason = f"signal {-status}" if status < 0 else f"exit status {status}"
        raise ChildProcessError(
            f"the decoding process ended unexpectedly ({reason}); after signal 9, memory may be"
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


def _start(memory: int) -> tuple[Connection, subprocess.Popen]:
    """Start the process with one end of a connection; return the other end and the process.

    Signals that stop a run are blocked in it: it ends when the connection is closed.
    """
    ours, theirs = Pipe()
    descriptors = theirs.fileno(), memory
    code = f"from pipelines.loading.process import serve; serve{descriptors}"
    path = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
    stops = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=descriptors,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _stop(connection: Connection, process: subprocess.Popen) -> None:
    connection.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# In the other process ---------------------------------------------------------------------------


class _SharedMemoryBackend(NativeBackend):
    """Writes the crops of a request into the slot that comes with it."""

    def __init__(self, dataset: ImageDataset, slots: torch.Tensor, **options) -> None:
        super().__init__(dataset, **options)
        self._slots, self._numbers = slots, deque[int]()

    def take(self, message: tuple[int, Request]) -> Request:
        number, request = message
        self._numbers.append(number)
        return request

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._slots[self._numbers.popleft(), : prod(shape)].view(shape)


def serve(connection_descriptor: int, memory: int) -> None:
    """Answer requests until the connection is closed."""
    connection = Connection(connection_descriptor)
    with contextlib.suppress(EOFError, OSError):
        dataset, slot_bytes, options = connection.recv()
        backend = _SharedMemoryBackend(dataset, _map_slots(memory, slot_bytes), **options)
        while True:
            messages = iter(connection.recv, None)
            try:
                for _ in backend.crops(map(backend.take, messages)):
                    connection.send(None)
            except (ValueError, MemoryError) as error:
                connection.send(error)
            except EOFError:
                raise
            except Exception:
                connection.send(RuntimeError(traceback.format_exc()))
            for _ in messages:  # after an error
                pass
            connection.send(_END)
    os._exit(0)  # without waiting for threads that decode
