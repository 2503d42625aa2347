"""From the loader's batches to views on the training device, one batch ahead of the encoder.

On a GPU the copy and the augmentation of the next batch run on a stream of their own while the
encoder works on this one, and the host waits for neither: it only makes the encoder's stream wait
for an event. What remains of their cost is the bandwidth that they take from the encoder. The host
may be two steps ahead of the GPU; more would not make it faster, only hold more batches.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from bt_fast.runtime import Runtime
from pipelines import augment
from pipelines.augment import Branch
from pipelines.loading.loader import Batch

NUM_STEPS_AHEAD = 2  # steps that the host may be ahead of the GPU
# Batches of views: NUM_STEPS_AHEAD queued on the GPU, the next, the one being made.
NUM_BATCHES_IN_MEMORY = NUM_STEPS_AHEAD + 2


def prefetch(
    batches: Iterable[Batch], branches: tuple[Branch, Branch], runtime: Runtime
) -> Iterator[torch.Tensor]:
    """The views of every batch, as the encoder takes them: [2 n, 3, H, W], view A first.

    Normalised, channels-last, in the runtime's dtype, on its device. Views may be used until the
    next ones are requested, by work on the stream that was current when they were returned.
    """
    if runtime.device.type != "cuda":
        for batch in batches:
            yield augment_batch(batch, branches, runtime)
        return

    side = torch.cuda.Stream(runtime.device)
    consumed: deque[torch.cuda.Event] = deque()  # ends of the steps on the views returned last
    ahead: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    iterator = iter(batches)
    while True:
        with torch.cuda.stream(side):  # also for the loader's own work on the GPU
            next_batch = next(iterator, None)
            if next_batch is not None:
                views = augment_batch(next_batch, branches, runtime)
                ahead.append((views, side.record_event()))
        if next_batch is None and not ahead:
            return
        if len(ahead) == 2 or next_batch is None:
            views, ready = ahead.popleft()
            encoder = torch.cuda.current_stream(runtime.device)
            encoder.wait_event(ready)
            views.record_stream(encoder)  # the side stream reuses their memory only after that
            yield views
            # A blocking event sleeps instead of spinning: decoding needs this core.
            consumed.append(encoder.record_event(torch.cuda.Event(blocking=True)))
            if len(consumed) > NUM_STEPS_AHEAD:
                consumed.popleft().synchronize()


def augment_batch(batch: Batch, branches: tuple[Branch, Branch], runtime: Runtime) -> torch.Tensor:
    """The views of one batch, made on the current stream: [2 n, 3, H, W], view A first."""
    crops = batch.views.to(runtime.device, non_blocking=True)  # uint8 [2, n, H, W, 3]
    parameters = augment.draw_views(branches, batch.request.keys)
    return runtime.augmentation()(crops.flatten(0, 1), parameters)
