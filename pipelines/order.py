"""Sample order and random keys: pure functions of (seed, epoch, sample, view).

There is no state. Any rank, loader or resumed run computes the order of an epoch and every random
number of a view without the previous ones, so a view depends neither on its batch nor on the
number of ranks, and resuming is an offset into the order.

Randomness is counter-based (Salmon et al., SC 2011): a 64-bit key identifies the view, and draw i
is a hash of (key, stream, i). The hash is SplitMix64's finaliser (Steele et al., OOPSLA 2014) in
integer arithmetic: NumPy may change the streams of its generators between versions (NEP 19), and a
resumed run must not depend on the version.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: SplitMix64's increment
_MASK = (1 << 64) - 1

# First argument of a hash: separates the order's numbers, the views' keys and the steps' keys.
_ORDER, _VIEW, _STEP = 1, 2, 3


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of uint64 in which every bit affects all bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _hash(*parts: "int | np.ndarray") -> np.ndarray:
    """Hash of a sequence of integers, or of arrays that broadcast -> uint64 array."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        if not isinstance(part, np.ndarray):
            part = np.array(part & _MASK, np.uint64)
        state = _mix((state ^ part.astype(np.uint64, copy=False)) + np.uint64(_GOLDEN))
    return state


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, the same on every rank.

    Returns int64[num_samples], a uniformly random permutation of range(num_samples).
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    keys = _hash(_ORDER, seed, epoch, np.arange(num_samples, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def view_keys(samples: np.ndarray, *, seed: int, epoch: int, view: int) -> np.ndarray:
    """The random keys of one view (0 or 1) of the given samples: int64[n] -> uint64[n]."""
    return _hash(_VIEW, seed, epoch, view, np.asarray(samples))


def step_keys(rows: np.ndarray, *, seed: int, step: int, view: int) -> np.ndarray:
    """The random keys of a step for one view (0 or 1) of the images at the given positions of the
    global batch: int64[n] -> uint64[n]."""
    return _hash(_STEP, seed, step, view, np.asarray(rows))


def uniforms(keys: np.ndarray, stream: int, count: int) -> np.ndarray:
    """`count` uniform draws in [0, 1) for each key: uint64[n] -> float64[n, count].

    `stream` identifies the purpose (crop, colours, ...), so that more draws for one purpose do not
    change the others.
    """
    counters = np.arange(count, dtype=np.uint64)
    bits = _hash(np.asarray(keys, np.uint64)[:, None], stream, counters[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53  # the top 53 bits, the precision of float64
