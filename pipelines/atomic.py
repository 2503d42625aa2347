"""Files that appear whole or not at all.

Written beside its final name, flushed to the disk, then renamed: a reader sees the old file or the
complete new one. The temporary is locked while its writer lives, so a later run can tell the
litter of a killed process from the work of a running one, whatever the process ids say (they repeat
across containers).
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
            with contextlib.suppress(OSError):  # a file system without locks still gets its file
                fcntl.flock(file, fcntl.LOCK_EX)
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


def remove_leftovers(path: str | os.PathLike) -> list[Path]:
    """Remove the temporaries that killed writers of `path` left; return what was removed.

    Raises BlockingIOError, naming the temporary, if one belongs to a writer that is still running.
    """
    path = Path(path)
    removed = []
    for temporary in sorted(path.parent.iterdir()):
        prefix, _, process_id = temporary.name.rpartition(".tmp-")
        if prefix != path.name or not process_id.isdecimal():
            continue
        with open(temporary, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, "is being written now", str(temporary)) from None
            except OSError:  # no locks here: nobody can tell whose it is, so it stays
                continue
            temporary.unlink()
        removed.append(temporary)
    return removed


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(errno.EEXIST, "File exists", str(path))


def sync(path: Path) -> None:
    """Make a file's contents durable, or a folder's renames (a file's own fsync does not)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
