"""Locates the members of a tar archive without unpacking it."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.convert.manifest import SourceError


def members(path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in the archive `path`, or in the archive at its bytes [start, end).

    `offset_data` is relative to the beginning of `path`. Memory does not grow with their number.
    Raises SourceError if the archive is damaged or truncated.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if end is not None and member.offset >= end:
                        return
                    if member.isreg():
                        yield member
    except tarfile.TarError as error:
        raise SourceError(f"{path} is not a complete tar archive: {error}; get it again") from None
