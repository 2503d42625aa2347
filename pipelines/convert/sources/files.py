"""What several sources share: a walk over folders, and members of tar archives."""

import os
import posixpath
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipelines.common.atomic import UNFINISHED
from pipelines.convert.manifest import SourceError

MAX_LINKS = 40  # in a chain, as in Linux
COMPRESSED = {  # first bytes of a file: what it is, and the command that unpacks it
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
UNFINISHED_DOWNLOADS = (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp")


def walk(top: Path) -> Iterator[tuple[str, os.DirEntry | str]]:
    """(folder, entry) of `top` and all folders below, through links; of an unread one, the reason.

    The reason is empty for a link to a folder that was listed already.
    """
    parents = {*top.resolve().parents, *top.absolute().parents}
    seen = {_identity(folder) for folder in parents}
    pending = [os.fspath(top)]
    while pending:
        folder = pending.pop()
        try:
            identity = _identity(folder)
            if identity in seen:  # a link, perhaps a loop, which torchvision follows for long
                yield folder, ""
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield folder, entry
                    if not is_hidden(entry.name) and is_folder(entry):
                        pending.append(entry.path)
        except OSError as error:
            yield folder, f"folder not readable: {error.strerror}"


def files_below(top: Path) -> Iterator[os.DirEntry]:
    """All files below `top` that are not hidden."""
    for _, entry in walk(top):
        if not isinstance(entry, str) and not is_hidden(entry.name) and not is_folder(entry):
            yield entry


def find_files(top: Path, suffixes: str | tuple[str, ...]) -> list[str]:
    """Paths relative to `top`, sorted, of the files below it with these endings."""
    prefix = len(os.path.join(top, ""))
    return sorted(
        entry.path[prefix:] for entry in files_below(top) if entry.name.lower().endswith(suffixes)
    )


def folders_in(root: Path) -> list[str]:
    """Sorted names of the folders in `root`, without the work folder of an OUT inside it."""
    names = sorted(e.name for e in os.scandir(root) if is_folder(e) and not is_hidden(e.name))
    return [name for name in names if not (root / name / UNFINISHED).exists()]


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden file or folder, or of what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class Member(NamedTuple):
    """A file in a tar archive, or a link to one."""

    name: str
    offset: int  # of its bytes in the file that contains the archive
    size: int
    missing: str = ""  # target of a link that is not in the archive


def members(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yield the regular files in the archive `path`, or in the archive at its bytes [start, end).

    Links follow at the end, with the bytes of their targets. Memory grows with the number of links
    alone. Raises SourceError if the archive is damaged, truncated or compressed.
    """
    links: dict[str, str] = {}
    for info in _headers(path, start, end):
        if info.isreg():
            yield Member(info.name, info.offset_data, info.size)
        elif info.issym():
            links[info.name] = posixpath.join(posixpath.dirname(info.name), info.linkname)
        elif info.islnk():
            links[info.name] = info.linkname
    if not links:
        return
    steps = {posixpath.normpath(name): posixpath.normpath(to) for name, to in links.items()}
    targets = {name: posixpath.normpath(name) for name in links}
    for _ in range(MAX_LINKS):
        targets = {name: steps.get(target, target) for name, target in targets.items()}
    wanted = set(targets.values())
    found = {
        posixpath.normpath(info.name): info
        for info in _headers(path, start, end)
        if info.isreg() and posixpath.normpath(info.name) in wanted
    }
    for name, target in targets.items():
        if target in found:
            yield Member(name, found[target].offset_data, found[target].size)
        else:
            yield Member(name, 0, 0, missing=target)


def _headers(path: Path, start: int, end: int | None) -> Iterator[tarfile.TarInfo]:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]
                    if end is not None and info.offset >= end:
                        break
                    yield info
                _require_end(path, file, archive.offset if info is None else info.offset, end)
    except tarfile.TarError as error:
        refuse_compressed(path)
        raise _incomplete(path, str(error)) from None


def _require_end(path: Path, file: BinaryIO, position: int, end: int | None) -> None:
    """Raise SourceError unless zeros follow the last header, which tarfile does not check: it takes
    a damaged header for the end of the archive."""
    file.seek(position)
    rest = max((sys.maxsize if end is None else end) - position, 0)
    is_first = True
    while chunk := file.read(min(1 << 20, rest)):
        if chunk.strip(b"\0"):
            what = "a damaged header" if is_first and chunk[:512].strip(b"\0") else "more data"
            raise _incomplete(path, f"{what} where it ends, at byte {position}")
        rest -= len(chunk)
        is_first = False
    if is_first:
        raise _incomplete(path, f"its end is missing at byte {position}")


def _incomplete(path: Path, reason: str) -> SourceError:
    return SourceError(f"{path} is not a complete tar archive: {reason}; get it again")


def refuse_compressed(path: Path) -> None:
    """Raise SourceError if the file begins like compressed data."""
    with open(path, "rb") as file:
        first = file.read(8)
    for magic, (kind, command) in COMPRESSED.items():
        if first.startswith(magic):
            raise SourceError(f"{path} is compressed ({kind}); decompress it first: {command}")
