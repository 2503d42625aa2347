"""From the loader's batches to views on the training device, one batch ahead of the encoder.

On a GPU the copy and the augmentation of the next batch run on a stream of their own while the
encoder works on this one, and the host waits for neither: it only tells the encoder's stream which
event to wait for. What is left of them in a step is what they take from the encoder's bandwidth.
The host may be two steps ahead of the GPU; more would not make it faster, only hold more batches.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from bt_fast.runtime import Runtime
from pipelines import augment
from pipelines.augment import Branch
from pipelines.loading.native import Batch

LEAD = 2  # steps
IN_MEMORY = LEAD + 2  # batches of views: LEAD told to the GPU, the next, the one being made


def feed(
    batches: Iterable[Batch], branches: tuple[Branch, Branch], runtime: Runtime
) -> Iterator[torch.Tensor]:
    """For every batch its views as the encoder takes them: [2 n, 3, H, W], view A first.

    Normalised, channels-last, in the runtime's dtype, on its device. A view may be used until
    the next one is asked for, by work on the stream that was current when it was handed out.
    """
    if runtime.device.type != "cuda":
        yield from (distort(batch, branches, runtime) for batch in batches)
        return

    side = torch.cuda.Stream(runtime.device)
    done: deque[torch.cuda.Event] = deque()  # of steps whose views were handed out
    ahead: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    made = iter(batches)
    while True:
        with torch.cuda.stream(side):  # also for what the loader itself does on the GPU
            batch = next(made, None)
            if batch is not None:
                ahead.append((distort(batch, branches, runtime), side.record_event()))
        if batch is None and not ahead:
            return
        if len(ahead) == 2 or batch is None:
            views, ready = ahead.popleft()
            encoder = torch.cuda.current_stream(runtime.device)
            encoder.wait_event(ready)
            views.record_stream(encoder)  # its memory is the side stream's to reuse after that
            yield views
            # One to sleep for, not to spin on: the decoding threads have work for this core.
            done.append(encoder.record_event(torch.cuda.Event(blocking=True)))
            if len(done) > LEAD:
                done.popleft().synchronize()


def distort(batch: Batch, branches: tuple[Branch, Branch], runtime: Runtime) -> torch.Tensor:
    """One batch's views, on the current stream: [2 n, 3, H, W], view A first."""
    crops = batch.views.to(runtime.device, non_blocking=True)  # uint8 [2, n, H, W, 3]
    draws = [augment.draw(branch, keys) for branch, keys in zip(branches, batch.keys, strict=True)]
    return runtime.augment(crops.flatten(0, 1), augment.join(*draws))
