"""What a tar archive holds, without unpacking it: where the bytes of each member lie."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from pipelines.convert.manifest import SourceError


def members(path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The regular files in the archive at `path`, or in the one at its bytes [start, end).

    `offset_data` counts from the beginning of `path`. Memory does not grow with their number.
    Raises SourceError where the archive is damaged or cut off.
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
        raise SourceError(f"{path} is not a whole tar archive: {error}; get it again") from None
