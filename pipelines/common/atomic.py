"""Files that appear complete or not at all.

A file is written beside its final name, synced, then renamed: a reader sees the old file or the
complete new one. Long work that can be continued is written to a folder beside the final name,
which is locked while its process runs and thus distinguished from that of a killed process.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.common.signals import signals_ignored

# Flags of os.open to read a file: opening a named pipe would wait for a writer, and Windows would
# translate line ends.
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
UNFINISHED = ".unfinished"  # marks a work folder; folders without it are never changed


class OutputExists(FileExistsError):
    """The output exists and must not be overwritten; `filename` is its path."""


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise OutputExists if `path` exists, even as a broken link, and `overwrite` is false."""
    if os.path.lexists(path) and not overwrite:
        raise OutputExists(errno.EEXIST, "File exists", str(path))


def require_place(path: Path, flag: str) -> None:
    """Raise ValueError if `path`, a flag's value, cannot be a file: before any work is done."""
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Yield a writable binary file that becomes `path` if the block ends without an exception.

    Raises OutputExists if `path` exists and `overwrite` is false.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    refuse_existing(path, overwrite)
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(path, overwrite)
        os.replace(temporary, path)
    except BaseException:  # including KeyboardInterrupt: no partial file may stay
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def write_text(path: str | os.PathLike, text: str, *, overwrite: bool = False) -> None:
    """Write a file as `atomic_file` does; names that are not UTF-8 are written as their bytes."""
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def move_together(moves: Iterable[tuple[Path, Path]]) -> None:
    """Move files and folders to their final paths, and sync the folders of these; a stop signal
    waits, a failure moves them back.

    What stood at these paths is replaced, and not restored by a failure.
    """
    moved: list[tuple[Path, Path]] = []
    with signals_ignored():
        try:
            for source, path in moves:
                os.replace(source, path)
                moved.append((source, path))
        except OSError:
            for source, path in reversed(moved):
                os.replace(path, source)
            raise
    for folder in {path.parent for _, path in moved}:
        sync(folder)


@contextlib.contextmanager
def work_folder(path: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield the locked folder `path` for unfinished files; it is removed after the block.

    With `resume`, files that a killed process left there are kept, also when the block fails.
    Raises BlockingIOError if another process has locked the folder, FileExistsError if the folder
    contains files but is not a work folder.
    """
    path.mkdir(exist_ok=True)
    if any(path.iterdir()) and not (path / UNFINISHED).exists():
        raise FileExistsError(errno.EEXIST, "Not a folder of unfinished output", str(path))
    (path / UNFINISHED).touch()
    with locked(path):
        if not resume:
            for entry in path.iterdir():
                if entry.name != UNFINISHED:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        try:
            yield path
        except BaseException:
            if not resume:
                shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process where the platform and the file system have locks.

    Raises BlockingIOError if another process has locked it.
    """
    # Windows cannot open folders, and has no fcntl.
    descriptor = os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None
    try:
        try:
            import fcntl

            assert descriptor is not None
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except (OSError, ImportError):
            pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def open_for_recovery(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading and writing without truncating it."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "r+b")


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """`size` bytes, or fewer at the end of the file, whose own position stays."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, position)
    before = file.tell()
    file.seek(position)
    data = file.read(size)
    file.seek(before)
    return data


def sync(path: Path) -> None:
    """Sync the contents of a file, or the renames in a folder, which syncing a file does not."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
