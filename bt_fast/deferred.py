"""Deferred reads of GPU values: the copy is queued now and read a few steps later.

The host is a few steps ahead of a GPU. Reading a value it has just asked for would empty the GPU's
queue. So the copy to page-locked memory is queued like any other work, and is read as many steps
later as the host can be ahead: at the same step on every rank, whatever their speed. On a CPU it is
read at once.
"""

from collections import deque
from collections.abc import Callable

import torch

from bt_fast.prefetch import LEAD

# The prefetcher has by then waited for the step in which the copy was queued.
GPU_DELAY = LEAD + 1  # steps


class Deferred:
    """Actions that need values of a device, run in the order in which they were added."""

    def __init__(self, device: torch.device, delay: int | None = None) -> None:
        """delay: in steps. Default: `GPU_DELAY` on a GPU, 0 on a CPU."""
        self._on_gpu = device.type == "cuda"
        self._delay = delay if delay is not None else GPU_DELAY * self._on_gpu
        self._waiting: deque[tuple[int, torch.cuda.Event | None, Callable[[], None]]] = deque()

    def add(self, step: int, action: Callable[[], None]) -> None:
        """Run `action` after the work now queued on the current stream has completed."""
        event = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self._waiting.append((step + self._delay, event, action))
        self.run(step)

    def run(self, step: int) -> None:
        """Run what is due at `step`."""
        while self._waiting and self._waiting[0][0] <= step:
            _, event, action = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            action()

    def flush(self) -> None:
        """Run everything, waiting for the GPU."""
        while self._waiting:
            self.run(self._waiting[0][0])
