"""Deferred reads of GPU values: the copy is queued now and read a few steps later.

The host is a few steps ahead of a GPU. Reading a value just computed would empty the GPU's queue.
So the copy to page-locked memory is queued like any other work, and is read as many steps later as
the host can be ahead: at the same step on every rank, whatever their speed. On a CPU it is read at
once.
"""

from collections import deque
from collections.abc import Callable

import torch

from bt_fast.prefetch import NUM_STEPS_AHEAD

# By then `prefetch` has waited for the step in which the copy was queued.
GPU_DELAY = NUM_STEPS_AHEAD + 1  # steps


class Deferred:
    """Actions that need values of a device, run in the order in which they were added.

    Attributes: `pending`, the actions that have not run.
    """

    def __init__(self, device: torch.device, delay: int | None = None) -> None:
        """delay: in steps. Default: `GPU_DELAY` on a GPU, 0 on a CPU."""
        self._on_gpu = device.type == "cuda"
        default = GPU_DELAY if self._on_gpu else 0
        self._delay = default if delay is None else delay
        self.pending: deque[tuple[int, torch.cuda.Event | None, Callable[[], None]]] = deque()

    def add(self, step: int, action: Callable[[], None]) -> None:
        """Run `action` after the work now queued on the current stream has completed."""
        event = torch.cuda.current_stream().record_event() if self._on_gpu else None
        self.pending.append((step + self._delay, event, action))
        self.run(step)

    def run(self, step: int) -> None:
        """Run the actions that are due at `step`."""
        while self.pending and self.pending[0][0] <= step:
            _, event, action = self.pending.popleft()
            if event is not None:
                event.synchronize()
            action()

    def flush(self) -> None:
        """Run all pending actions, waiting for the GPU."""
        while self.pending:
            self.run(self.pending[0][0])
