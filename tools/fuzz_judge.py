"""Mutation of one input of `fuzz.py` and the verdict on it."""

import contextlib
import faulthandler
import signal
import warnings
from collections.abc import Iterator

import numpy as np

from tools.fuzz_targets import TARGETS, Verdict

SECONDS_PER_INPUT = 60
_BOUNDARIES = [0, 1, 2, 7, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
_BOUNDARIES += [2**62, 2**63 - 1, 2**63, 2**64 - 1, 4096, 2 << 20, 65500, 65535]


def mutate(data: bytes, generator: np.random.Generator) -> tuple[bytes, bool]:
    """Returns the bytes after one to three mutations, and whether they are truncated."""
    changed = bytearray(data)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # most of a page is padding
    is_cut = False
    for _ in range(generator.integers(1, 4)):
        where = int(
            generator.choice(used) if generator.random() < 0.8 else len(data) * generator.random()
        )
        where = min(where, len(changed) - 1)
        match generator.integers(8):
            case 0 | 1:
                changed[where] ^= 1 << int(generator.integers(8))
            case 2:
                changed[where] = int(generator.integers(256))
            case 3 | 4:  # a length, an offset, a count
                width = int(generator.choice([2, 4, 8]))
                order = "little" if generator.random() < 0.5 else "big"
                value = int(generator.choice(np.array([*_BOUNDARIES, len(data)], np.uint64)))
                field = (value % 2 ** (8 * width)).to_bytes(width, order)
                changed[where : where + width] = field[: len(changed) - where]
            case 5:
                length = min(int(2 ** (generator.random() * 12)), len(changed) - where)
                source = int(len(changed) * generator.random())
                piece = (
                    changed[source : source + length] if generator.random() < 0.5 else bytes(length)
                )
                changed[where : where + len(piece)] = piece
            case 6 if not is_cut:
                del changed[max(where, 1) :]
                is_cut = True
            case _:  # insertion or deletion
                length = 1 + int(generator.integers(16))
                if generator.random() < 0.5:
                    changed[where:where] = generator.bytes(length)
                elif len(changed) > length:
                    del changed[where : where + length]
    return bytes(changed), is_cut and len(changed) < len(data)


def judge(target, number: int, seed: int) -> tuple[Verdict, str, bytes]:
    """Returns the verdict on input `number`, the message if there is one, and the input."""
    generator = np.random.default_rng([seed, list(TARGETS).index(target.name), number])
    original = number % len(target.originals)
    data, is_cut = mutate(target.originals[original], generator)
    if data == target.originals[original]:
        return "unharmed", "", data
    with _limit(SECONDS_PER_INPUT), warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return (*target.judge(original, data, is_cut), data)
        except ValueError as error:
            lines = str(error).splitlines()
            return ("refused" if len(lines) == 1 else "CRASH"), str(error), data
        except Exception as error:
            return "CRASH", f"{type(error).__name__}: {error}", data


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after `seconds`; exit with a stack trace if that takes twice as long."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
