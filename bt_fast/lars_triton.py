"""LARS update of all parameters in three kernel launches; `lars` is the definition.

ResNet-50 and its projector have 166 parameter tensors, a few of them large; one launch per tensor
and operation would be a thousand launches, most of them shorter than a microsecond. Here tensors
are divided into chunks, a table holds the tensors' addresses, and a program updates one chunk:

    _sums      |p|^2 and |u|^2 of every chunk                                   (reads p, g)
    _ratios    the sums of a tensor's chunks, in a fixed order -> its trust ratio
    _apply     m = momentum * m + ratio * u;  p = p - lr * m           (reads p, g, m, writes p, m)

28 bytes per parameter are read or written. Without atomics and with sums in a fixed order, the same
gradients give the same weights. The sums show whether all gradients and the guard are finite, so a
step is skipped on the device and nothing is read back.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 16_384  # elements per program
BLOCK = 2_048  # elements processed at a time
NUM_WARPS = 8
RATIO_BLOCK = 1_024  # chunks added at a time


class _Chunks(NamedTuple):
    """The division of tensors into chunks, on the device."""

    tensor: torch.Tensor  # int32 [num_chunks]: index of the tensor that a chunk belongs to
    first: torch.Tensor  # int32 [num_tensors + 1]: index of each tensor's first chunk
    numel: torch.Tensor  # int64 [num_tensors]


@functools.lru_cache(maxsize=8)
def _make_chunks(sizes: tuple[int, ...], device: torch.device) -> _Chunks:
    numel = torch.tensor(sizes, dtype=torch.int64)
    num_chunks = (numel + CHUNK - 1) // CHUNK
    first = torch.cat([torch.zeros(1, dtype=torch.int64), num_chunks.cumsum(0)])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), num_chunks)
    return _Chunks(tensor.int().to(device), first.int().to(device), numel.to(device))


def update(
    params: list[torch.Tensor],
    momenta: list[torch.Tensor],
    groups: list[dict],
    guard: torch.Tensor | None,
) -> torch.Tensor | None:
    """Update the parameters from their gradients, in place.

    Args:
        params: float32, non-overlapping and dense, all on one device; each has a gradient.
        momenta: their momentum buffers, with the same strides.
        groups: the parameter group of each.
        guard: scalar, or None for no check.

    Returns:
        with a guard, bool scalar: whether it and all gradients were finite, and the update applied.
    """
    device = params[0].device
    gradients = [match_strides(p, p.grad) for p in params]
    if any(p.stride() != m.stride() for p, m in zip(params, momenta, strict=True)):
        raise ValueError("fused LARS needs parameters without gaps in memory")
    chunks = _make_chunks(tuple(p.numel() for p in params), device)
    pointers = [[t.data_ptr() for t in tensors] for tensors in (params, gradients, momenta)]
    rows = [
        (g["lr"], g["momentum"], g["weight_decay"], g["trust_coefficient"], float(p.ndim > 1))
        for p, g in zip(params, groups, strict=True)
    ]
    addresses = _to_device(torch.tensor(pointers, dtype=torch.int64), device)  # [3, num_tensors]
    table = _to_device(torch.tensor(rows, dtype=torch.float32), device)  # [num_tensors, 5]
    num_tensors, num_chunks = len(params), len(chunks.tensor)
    sums = torch.empty((2, num_chunks), device=device)
    ratios = torch.empty((2, num_tensors), device=device)  # trust ratio; 1 if finite, else 0
    applied = torch.empty((), dtype=torch.bool, device=device)
    options = {
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        # Whether accesses of 16 bytes are possible.
        "ALIGNED": all(address % 16 == 0 for row in pointers for address in row)
        and all(p.numel() % 4 == 0 for p in params),
        "num_warps": NUM_WARPS,
    }
    tables = (addresses, table, chunks.tensor, chunks.first, chunks.numel)
    _sums[(num_chunks,)](*tables, sums, num_tensors, num_chunks, **options)
    _ratios[(num_tensors,)](
        table, chunks.first, sums, ratios, num_tensors, num_chunks,
        guard if guard is not None else sums, CHECKED=guard is not None, BLOCK=RATIO_BLOCK,
    )  # fmt: skip
    _apply[(num_chunks,)](
        *tables, ratios, applied, num_tensors,
        CHECKED=guard is not None, TENSORS=triton.next_power_of_2(num_tensors), **options,
    )  # fmt: skip
    return None if guard is None else applied


def match_strides(p: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """The gradient if it has p's strides, else a copy that has them. Raises ValueError."""
    if gradient is None or not gradient.dtype == p.dtype == torch.float32:
        raise ValueError("fused LARS needs float32 parameters and gradients")
    strides = [
        [s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (p, gradient)
    ]
    if strides[0] == strides[1]:
        return gradient
    return torch.empty_like(p).copy_(gradient)


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


# Columns of the table of hyper-parameters; _ADAPT: 1 if trust ratio and weight decay apply, else 0.
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
def _decay(row):
    """Weight decay of a row of the table, 0 where it does not apply."""
    return tl.load(row + _DECAY) * tl.load(row + _ADAPT)


@triton.jit
def _sums(
    addresses, table, tensors, first, numel, sums, num_tensors, num_chunks,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    tensor = tl.load(tensors + chunk)
    row = table + tensor * _COLUMNS
    start = (chunk - tl.load(first + tensor)).to(tl.int64) * CHUNK
    end = _numel(numel, tensor, ALIGNED)
    decay = _decay(row)
    p_pointer = _pointer(addresses, 0, tensor, num_tensors, ALIGNED)
    g_pointer = _pointer(addresses, 1, tensor, num_tensors, ALIGNED)
    acc_p = tl.zeros([BLOCK], tl.float32)
    acc_u = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, CHUNK, BLOCK):
        element = start + offset + tl.arange(0, BLOCK)
        inside = element < end
        p = tl.load(p_pointer + element, inside, other=0.0)
        u = tl.load(g_pointer + element, inside, other=0.0) + decay * p
        acc_p += p * p
        acc_u += u * u
    tl.store(sums + chunk, tl.sum(acc_p))
    tl.store(sums + num_chunks + chunk, tl.sum(acc_u))


@triton.jit
def _ratios(
    table, first, sums, ratios, num_tensors, num_chunks, guard,
    CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    row = table + tensor * _COLUMNS
    acc_p = tl.zeros([BLOCK], tl.float32)
    acc_u = tl.zeros([BLOCK], tl.float32)
    end = tl.load(first + tensor + 1)
    for start in range(tl.load(first + tensor), end, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        acc_p += tl.load(sums + chunk, chunk < end, other=0.0)
        acc_u += tl.load(sums + num_chunks + chunk, chunk < end, other=0.0)
    p_norm = tl.sqrt(tl.sum(acc_p))
    u_norm = tl.sqrt(tl.sum(acc_u))
    ratio = 1.0
    if (tl.load(row + _ADAPT) != 0) & (p_norm > 0) & (u_norm > 0):
        ratio = tl.load(row + _TRUST) * p_norm / u_norm
    tl.store(ratios + tensor, ratio)
    finite = 1.0
    if CHECKED:
        magnitude = u_norm + tl.abs(tl.load(guard).to(tl.float32))
        finite = tl.where(magnitude < float("inf"), 1.0, 0.0)  # false for NaN, too
    tl.store(ratios + num_tensors + tensor, finite)


@triton.jit
def _apply(
    addresses, table, tensors, first, numel, ratios, applied, num_tensors,
    CHECKED: tl.constexpr, TENSORS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    if CHECKED:
        index = tl.arange(0, TENSORS)
        finite = tl.load(ratios + num_tensors + index, index < num_tensors, other=1.0)
        finite = tl.min(finite)
        if chunk == 0:
            tl.store(applied, finite > 0)
        if finite == 0:
            return
    tensor = tl.load(tensors + chunk)
    row = table + tensor * _COLUMNS
    start = (chunk - tl.load(first + tensor)).to(tl.int64) * CHUNK
    end = _numel(numel, tensor, ALIGNED)
    decay = _decay(row)
    ratio = tl.load(ratios + tensor)
    momentum = tl.load(row + _MOMENTUM)
    lr = tl.load(row + _LR)
    p_pointer = _pointer(addresses, 0, tensor, num_tensors, ALIGNED)
    g_pointer = _pointer(addresses, 1, tensor, num_tensors, ALIGNED)
    m_pointer = _pointer(addresses, 2, tensor, num_tensors, ALIGNED)
    for offset in range(0, CHUNK, BLOCK):
        element = start + offset + tl.arange(0, BLOCK)
        inside = element < end
        p = tl.load(p_pointer + element, inside, other=0.0)
        u = tl.load(g_pointer + element, inside, other=0.0) + decay * p
        m = momentum * tl.load(m_pointer + element, inside, other=0.0) + ratio * u
        tl.store(m_pointer + element, m, inside)
        tl.store(p_pointer + element, p - lr * m, inside)
