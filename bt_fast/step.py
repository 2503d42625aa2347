"""One step: its gradients, from the whole batch or from parts of it, and its rehearsal on noise.

The loss is a function of the global batch: sums of the gradients of parts belong to another loss.
With K parts (`--accumulate K`) the gradient is exact all the same, with the memory of one part:

    1. embeddings z of every part, without keeping activations
    2. loss of all embeddings, and its gradient d L / d z
    3. every part forward again, and backward from its rows of d L / d z

Only batch norm differs: its statistics are those of a part, as with `--bn-group`; the running
statistics move once, towards the mean over the parts. The cost is one more forward pass.
"""

import contextlib
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from bt_fast.build import TrainingSetup
from bt_fast.loss import weighted_sum
from bt_fast.prefetch import NUM_BATCHES_IN_MEMORY
from bt_fast.runtime import synchronise


def compute_gradients(
    setup: TrainingSetup, views: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward pass for views [2 n, 3, H, W], view A first; the gradients are in `p.grad`. Paths
    are dropped as drawn last.

    Returns (on-diagonal term, off-diagonal term, loss) of the global batch, scalars on the device.
    """
    if setup.config.accumulate == 1:
        setup.drop_paths.use()
        with setup.autocast:
            z_a, z_b = setup.embed(views).chunk(2)  # [n, D] each
        return _loss_backward(setup, z_a, z_b)

    num_parts, embeddings = setup.config.accumulate, []
    for number in range(num_parts):
        part = _part(views, number, num_parts)  # [2 n / K, 3, H, W]
        setup.drop_paths.use(number, num_parts)
        with torch.no_grad(), setup.autocast:
            embeddings.append(setup.embed(part).clone())  # see `_own_gradients`
        setup.statistics.record()
    z_a, z_b = (
        torch.cat([z.chunk(2)[view] for z in embeddings]).requires_grad_() for view in (0, 1)
    )
    on_diagonal, off_diagonal, loss = _loss_backward(setup, z_a, z_b)
    terms = on_diagonal.clone(), off_diagonal.clone(), loss
    assert z_a.grad is not None and z_b.grad is not None
    gradient = torch.cat([z_a.grad, z_b.grad])
    for number in range(num_parts):
        setup.drop_paths.use(number, num_parts)
        with _reduced_by_ddp(setup, number == num_parts - 1):
            with setup.autocast:
                z = setup.embed(_part(views, number, num_parts))
            z.backward(_part(gradient, number, num_parts))
        if number == 0:
            _own_gradients(setup)
    return terms


def _own_gradients(setup: TrainingSetup) -> None:
    """Copy the gradients out of the memory of a CUDA graph, whose next call overwrites all that its
    calls returned. Later parts are added to the copies."""
    if setup.runtime.replays_graphs:
        for p in setup.model.parameters():
            if p.grad is not None:
                p.grad = p.grad.clone()


def _loss_backward(
    setup: TrainingSetup, z_a: torch.Tensor, z_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    on_diagonal, off_diagonal = setup.objective(z_a, z_b)
    loss = weighted_sum(on_diagonal, off_diagonal, setup.config.lambd)
    # DDP averages gradients over ranks; each rank's is its summand of the true one.
    (loss * (setup.config.grad_scale * setup.world.size)).backward()
    return on_diagonal.detach(), off_diagonal.detach(), loss.detach()


def _part(rows: torch.Tensor, number: int, num_parts: int) -> torch.Tensor:
    """The part `number` of both views: [2 n, ...], view A first -> [2 n / K, ...], likewise."""
    return torch.cat([view.chunk(num_parts)[number] for view in rows.chunk(2)])


def _reduced_by_ddp(setup: TrainingSetup, is_last: bool) -> contextlib.AbstractContextManager:
    """DDP reduces the sum of the parts' gradients once, in the last backward pass."""
    if isinstance(setup.parallel, DistributedDataParallel) and not is_last:
        return setup.parallel.no_sync()
    return contextlib.nullcontext()


def measure_step_seconds(setup: TrainingSetup) -> dict[int, float]:
    """Run forward and backward passes on noise -> {view size: expected seconds per step}.

    On a GPU this compiles, allocates, and shows before the run starts whether a step fits in
    memory, for every view size of the run. A CPU rehearses only the last size with a part of the
    batch, as much work as ten 224 px images, and scales the time.
    """
    config, device = setup.config, setup.runtime.device
    seconds: dict[int, float] = {}
    for size in sorted({config.view_size(epoch) for epoch in range(config.epochs)}, reverse=True):
        if device.type == "cpu" and seconds:
            seconds[size] = seconds[config.size] * (size / config.size) ** 2
            continue
        local_batch = n = config.batch_size // setup.world.size
        if device.type == "cpu":
            n = min(n, max(2, 10 * 224**2 // size**2))
            n = max(n // config.accumulate, 2) * config.accumulate
        for _ in range(2 if device.type == "cpu" else 3):  # compiles, then records CUDA graphs
            synchronise(device)
            started = time.perf_counter()
            _forward_and_backward(setup, n, size)
            synchronise(device)
        seconds[size] = (time.perf_counter() - started) * local_batch / n
    return seconds


def _forward_and_backward(setup: TrainingSetup, n: int, size: int) -> None:
    """A step on noise, with memory allocated for the batches that are prepared beside it."""
    noise = torch.randn(2 * n, 3, size, size, device=setup.runtime.device)
    noise = noise.to(setup.runtime.view_dtype, memory_format=torch.channels_last)
    ahead = (
        [torch.empty_like(noise) for _ in range(NUM_BATCHES_IN_MEMORY - 1)] if noise.is_cuda else []
    )
    setup.drop_paths.draw(0, n)
    _, _, loss = compute_gradients(setup, noise)
    setup.statistics.update(torch.zeros_like(loss, dtype=torch.bool))  # changes nothing
    setup.optimizer.step(guard=torch.full_like(loss, torch.nan))  # changes nothing
    setup.optimizer.zero_grad(set_to_none=True)
    del ahead
