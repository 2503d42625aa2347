"""What needs values from the GPU, done when they have long arrived, so that nothing waits for them.

The host is a few steps ahead of a GPU. Reading a value it has just asked for would empty the GPU's
queue. So the copy to page-locked memory is queued like any other work, and the reading happens as
many steps later as the host can be ahead: at the same step on every rank, whatever their speed. On
a CPU it happens at once.
"""

from collections import deque
from collections.abc import Callable

import torch

from bt_fast.feed import LEAD

# The prefetcher has by then waited for the step in which the copy was queued.
DELAY = LEAD + 1  # steps


class Deferred:
    """Actions in the order in which they were added."""

    def __init__(self, device: torch.device) -> None:
        self._delay = DELAY if device.type == "cuda" else 0
        self._waiting: deque[tuple[int, torch.cuda.Event | None, Callable[[], None]]] = deque()

    def add(self, step: int, action: Callable[[], None]) -> None:
        """Run `action` when what is in the current stream's queue after `step` has been done."""
        event = None
        if torch.cuda.is_available() and self._delay:
            event = torch.cuda.current_stream().record_event()
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
