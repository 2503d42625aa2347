"""What several sources share: splits by file name, sorted names, and members of tar archives."""

import errno
import heapq
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

from pipelines.convert.manifest import SourceError

RUN_LENGTH = 50_000  # names that are sorted in memory
_SPLIT_NAME = re.compile(r"(?:^|[^a-z])(train|val|validation|test)(?=[^a-z]|$)")


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Returns {"train": files, "val": files}, sorted by name; all for train if no name has a split.

    Examples of names: `data/train-00000-of-00294.parquet`, `imagenet-val-000003.tar`. Test files
    are left out. Raises SourceError if only test files are left.
    """
    matches = {path: _SPLIT_NAME.search(path.stem.lower()) for path in sorted(files)}
    names = {path: match[1] if match else "" for path, match in matches.items()}
    if not any(names.values()):
        return {"train": list(names)}
    splits = {
        "train": [path for path, name in names.items() if name == "train"],
        "val": [path for path, name in names.items() if name.startswith("val")],
    }
    if not splits["train"]:  # validation files alone are trained on
        splits = {"train": splits["val"]}
    if not splits["train"]:
        raise SourceError(f"{files[0].parent} has only files named for testing")
    return {name: paths for name, paths in splits.items() if paths}


@contextmanager
def temporary_files() -> Iterator[None]:
    """Raise SourceError where TMPDIR has no space or does not exist."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) and tempfile.tempdir:
            raise
        folder = tempfile.tempdir or os.environ.get("TMPDIR", "")
        raise SourceError(
            f"temporary files cannot be written to TMPDIR ({folder}): {error.strerror}; set TMPDIR "
            f"to a folder with space"
        ) from None


def sorted_names(names: Iterable[str]) -> Iterator[str]:
    """`sorted(names)`. Of more than RUN_LENGTH names, sorted runs are merged from unnamed files."""
    names = iter(names)
    run = sorted(islice(names, RUN_LENGTH))
    if len(run) < RUN_LENGTH:
        yield from run
        return
    with temporary_files(), ExitStack() as stack:
        files = []
        while run:
            file = stack.enter_context(tempfile.TemporaryFile("w+"))
            file.writelines(json.dumps(name) + "\n" for name in run)
            file.seek(0)
            files.append(file)
            run = sorted(islice(names, RUN_LENGTH))
        yield from heapq.merge(*(map(json.loads, file) for file in files))


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
