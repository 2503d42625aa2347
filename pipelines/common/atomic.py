"""Files that appear whole or not at all.

Written beside its final name, flushed to the disk, then renamed: a reader sees the old file or the
complete new one. Work of hours that can be continued stands in a folder beside its final name,
locked while its owner lives: so a later run can tell what a killed process left from what a running
one is writing.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"  # in every work folder: others are not touched


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Yield a writable binary file that becomes `path` if the block ends without an exception.

    Raises FileExistsError if `path` exists and `overwrite` is false, now or when the block ends.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    _refuse_existing(path, overwrite)
    with open(temporary, "w+b") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _refuse_existing(path, overwrite)
            os.replace(temporary, path)
        except BaseException:  # also KeyboardInterrupt: no half-written file survives
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    sync(path.parent)


@contextlib.contextmanager
def work_folder(path: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield the folder `path`, locked, for what is not finished yet; it is gone after the block.

    What a killed process left there is removed first; with `resume` it is kept, and also stays
    when the block ends with an exception.
    Raises BlockingIOError if another process works there, FileExistsError if the folder is not one
    of ours.
    """
    path.mkdir(exist_ok=True)
    if any(path.iterdir()) and not (path / UNFINISHED).exists():
        raise FileExistsError(errno.EEXIST, "Is a folder of somebody else", str(path))
    (path / UNFINISHED).touch()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, path)
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
    finally:
        os.close(descriptor)


def open_for_recovery(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading and writing; what it contains stays."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "is being written now", str(path)) from None
    except OSError:  # a file system without locks: take its user's word
        pass


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:  # a link that leads nowhere is somebody's, too
        raise FileExistsError(errno.EEXIST, "File exists", str(path))


def sync(path: Path) -> None:
    """Make a file's contents durable, or a folder's renames (a file's own fsync does not)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
