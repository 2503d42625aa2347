"""External merge sort of file names: sorted runs in an unnamed temporary file, then merged."""

import heapq
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import BinaryIO

RUN_LENGTH = 50_000  # names in memory at a time
READ_SIZE = 1 << 16  # bytes of each run in memory while merging
_LENGTH = struct.Struct("<I")


def sorted_names(names: Iterable[str]) -> Iterator[str]:
    """`sorted(names)` for paths as returned by `os`. Writes no file for fewer than RUN_LENGTH."""
    names = iter(names)
    run = sorted(islice(names, RUN_LENGTH))
    if len(run) < RUN_LENGTH:
        yield from run
        return
    with tempfile.TemporaryFile() as file:
        starts = [0]
        while run:
            for name in run:
                encoded = os.fsencode(name)
                file.write(_LENGTH.pack(len(encoded)) + encoded)
            starts.append(file.tell())
            run = sorted(islice(names, RUN_LENGTH))
        file.flush()
        yield from heapq.merge(*(_read_run(file, *ends) for ends in pairwise(starts)))


def _read_run(file: BinaryIO, start: int, end: int) -> Iterator[str]:
    """The names between two offsets; independent of the file's position, which runs share."""
    rest = b""
    while start < end:
        piece = os.pread(file.fileno(), min(READ_SIZE, end - start), start)
        start += len(piece)
        rest += piece
        position = 0
        while len(rest) >= position + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(rest, position)
            following = position + _LENGTH.size + length
            if following > len(rest):
                break
            yield os.fsdecode(rest[position + _LENGTH.size : following])
            position = following
        rest = rest[position:]
