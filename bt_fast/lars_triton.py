"""One LARS update of all parameters in three kernel launches; `lars` has the definition.

The parameters of ResNet-50 and its projector are 166 tensors, of which a few are huge; one launch
per tensor and operation is a thousand launches, most of them over in a microsecond. Here the
tensors are cut into chunks, a table of addresses says where each lies, and every program takes one
chunk, whichever tensor it belongs to:

    _sums      |p|^2 and |u|^2 of every chunk                                   (reads p, g)
    _ratios    the chunks of one tensor, added in their order -> its trust ratio
    _apply     m = momentum * m + ratio * u;  p = p - lr * m           (reads p, g, m, writes p, m)

28 bytes per parameter are read or written, no atomics are used, and the sums have one order: the
same gradients give the same weights. Whether all gradients and the guard are finite falls out of
the sums, so a step is skipped on the device and nothing is read back.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 16_384  # elements per program
BLOCK = 2_048  # elements at a time
NUM_WARPS = 8
RATIO_BLOCK = 1_024  # chunks at a time when a tensor's sums are added


class _Chunks(NamedTuple):
    """How tensors of given sizes are cut, on the device."""

    tensor: torch.Tensor  # int32 [num_chunks]: the tensor a chunk belongs to
    first: torch.Tensor  # int32 [num_tensors + 1]: the number of each tensor's first chunk
    numel: torch.Tensor  # int64 [num_tensors]


@functools.lru_cache(maxsize=8)
def _cut(sizes: tuple[int, ...], device: torch.device) -> _Chunks:
    numel = torch.tensor(sizes, dtype=torch.int64)
    counts = (numel + CHUNK - 1) // CHUNK
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return _Chunks(tensor.int().to(device), first.int().to(device), numel.to(device))


def update(
    params: list[torch.Tensor],
    momenta: list[torch.Tensor],
    groups: list[dict],
    guard: torch.Tensor | None,
) -> torch.Tensor | None:
    """Update the parameters from their gradients, in place.

    Args:
        params: float32, dense in memory, all on one device; each has a gradient.
        momenta: their buffers.
        groups: the hyper-parameters of each.
        guard: scalar, or None to check nothing.
    Returns:
        with a guard, bool scalar: whether it and all gradients were finite, so that the update
        was applied.
    """
    device = params[0].device
    gradients = [_like(p, p.grad) for p in params]
    momenta = [_like(p, m, copy=False) for p, m in zip(params, momenta, strict=True)]
    chunks = _cut(tuple(p.numel() for p in params), device)
    pointers = [[t.data_ptr() for t in tensors] for tensors in (params, gradients, momenta)]
    hyper = [
        (g["lr"], g["momentum"], g["weight_decay"], g["trust_coefficient"], float(p.ndim > 1))
        for p, g in zip(params, groups, strict=True)
    ]
    addresses = _to_device(torch.tensor(pointers, dtype=torch.int64), device)  # [3, num_tensors]
    table = _to_device(torch.tensor(hyper, dtype=torch.float32), device)  # [num_tensors, 5]
    num_tensors, num_chunks = len(params), len(chunks.tensor)
    sums = torch.empty((2, num_chunks), device=device)
    ratios = torch.empty((2, num_tensors), device=device)  # trust ratio; 0 if not finite, else 1
    applied = torch.empty((), dtype=torch.bool, device=device)
    options = {
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        # Accesses of 16 bytes, if the tensors begin and end where those may.
        "ALIGNED": all(address % 16 == 0 for row in pointers for address in row)
        and all(p.numel() % 4 == 0 for p in params),
        "num_warps": NUM_WARPS,
    }
    where = (addresses, table, chunks.tensor, chunks.first, chunks.numel)
    _sums[(num_chunks,)](*where, sums, num_tensors, num_chunks, **options)
    _ratios[(num_tensors,)](
        table, chunks.first, sums, ratios, num_tensors, num_chunks,
        guard if guard is not None else sums, CHECKED=guard is not None, BLOCK=RATIO_BLOCK,
    )  # fmt: skip
    _apply[(num_chunks,)](
        *where, ratios, applied, num_tensors,
        CHECKED=guard is not None, TENSORS=triton.next_power_of_2(num_tensors), **options,
    )  # fmt: skip
    return None if guard is None else applied


def _like(p: torch.Tensor, other: torch.Tensor | None, copy: bool = True) -> torch.Tensor:
    """`other` if its elements lie in memory in p's order, else, where allowed, a copy that does."""
    assert other is not None and other.dtype == p.dtype == torch.float32
    strides = [
        [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (p, other)
    ]
    if strides[0] == strides[1]:
        return other
    assert copy, "a momentum buffer lies in memory as its parameter does"
    return torch.empty_like(p).copy_(other)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


_LR, _MOMENTUM, _DECAY, _TRUST, _ADAPT = (tl.constexpr(i) for i in range(5))
_COLUMNS = tl.constexpr(5)


@triton.jit
def _pointer(addresses, row, tensor, num_tensors, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + row * num_tensors + tensor).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _numel(numel, tensor, ALIGNED: tl.constexpr):
    count = tl.load(numel + tensor)
    if ALIGNED:
        count = tl.multiple_of(count, 4)
    return count


@triton.jit
def _decay(hyper):
    """Weight decay, of the parameters that take it; loaded once, not for every block."""
    return tl.load(hyper + _DECAY) * tl.load(hyper + _ADAPT)


@triton.jit
def _sums(
    addresses, table, tensors, first, numel, sums, num_tensors, num_chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    hyper = table + tensor * _COLUMNS
    start = (chunk - tl.load(first + tensor)).to(tl.int64) * CHUNK
    end = _numel(numel, tensor, ALIGNED)
    decay = _decay(hyper)
    p_at = _pointer(addresses, 0, tensor, num_tensors, ALIGNED)
    g_at = _pointer(addresses, 1, tensor, num_tensors, ALIGNED)
    of_p = tl.zeros([BLOCK], tl.float32)
    of_u = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        element = start + offset + tl.arange(0, BLOCK)
        inside = element < end
        p = tl.load(p_at + element, inside, other=0.0)
        u = tl.load(g_at + element, inside, other=0.0) + decay * p
        of_p += p * p
        of_u += u * u
    tl.store(sums + chunk, tl.sum(of_p))
    tl.store(sums + num_chunks + chunk, tl.sum(of_u))


@triton.jit
def _ratios(
    table, first, sums, ratios, num_tensors, num_chunks, guard,
    CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    hyper = table + tensor * _COLUMNS
    of_p = tl.zeros([BLOCK], tl.float32)
    of_u = tl.zeros([BLOCK], tl.float32)
    end = tl.load(first + tensor + 1)
    for start in range(tl.load(first + tensor), end, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        of_p += tl.load(sums + chunk, chunk < end, other=0.0)
        of_u += tl.load(sums + num_chunks + chunk, chunk < end, other=0.0)
    p_norm = tl.sqrt(tl.sum(of_p))
    u_norm = tl.sqrt(tl.sum(of_u))
    ratio = 1.0
    if (tl.load(hyper + _ADAPT) != 0) & (p_norm > 0) & (u_norm > 0):
        ratio = tl.load(hyper + _TRUST) * p_norm / u_norm
    tl.store(ratios + tensor, ratio)
    finite = 1.0
    if CHECKED:
        total = u_norm + tl.abs(tl.load(guard).to(tl.float32))
        finite = tl.where(total < float("inf"), 1.0, 0.0)  # nan is not less than anything
    tl.store(ratios + num_tensors + tensor, finite)


@triton.jit
def _apply(
    addresses, table, tensors, first, numel, ratios, applied, num_tensors,
    CHECKED: tl.constexpr, TENSORS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    if CHECKED:
        every = tl.arange(0, TENSORS)
        finite = tl.load(ratios + num_tensors + every, every < num_tensors, other=1.0)
        finite = tl.min(finite)
        if chunk == 0:
            tl.store(applied, finite > 0)
        if finite == 0:
            return
    tensor = tl.load(tensors + chunk)
    hyper = table + tensor * _COLUMNS
    start = (chunk - tl.load(first + tensor)).to(tl.int64) * CHUNK
    end = _numel(numel, tensor, ALIGNED)
    decay = _decay(hyper)
    ratio = tl.load(ratios + tensor)
    momentum = tl.load(hyper + _MOMENTUM)
    lr = tl.load(hyper + _LR)
    p_at = _pointer(addresses, 0, tensor, num_tensors, ALIGNED)
    g_at = _pointer(addresses, 1, tensor, num_tensors, ALIGNED)
    m_at = _pointer(addresses, 2, tensor, num_tensors, ALIGNED)
    for offset in range(0, CHUNK, BLOCK):
        element = start + offset + tl.arange(0, BLOCK)
        inside = element < end
        p = tl.load(p_at + element, inside, other=0.0)
        u = tl.load(g_at + element, inside, other=0.0) + decay * p
        m = momentum * tl.load(m_at + element, inside, other=0.0) + ratio * u
        tl.store(m_at + element, m, inside)
        tl.store(p_at + element, p - lr * m, inside)
