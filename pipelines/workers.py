"""Many image files made into plain JPEGs by worker processes, in order, few at a time."""

import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from pipelines.images import Check, Prepared, UnreadableImage, prepare, read_image
from pipelines.sources import Split

CHUNK = 8  # files per task: enough to hide the hand-over, few enough to bound the memory
TASKS_PER_WORKER = 3  # in flight, so that no worker waits for the writer


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker made of one file: an image and its CRC-32, or the reason why not."""

    num_bytes: int
    image: Prepared | None = None
    checksum: int = 0
    reason: str = ""


def prepare_all(
    split: Split, *, workers: int, max_side: int, check: Check
) -> Generator[Outcome, None, None]:
    """One per path, in order. At most 32 images per worker are in memory."""
    starts = range(0, len(split.paths), CHUNK)
    tasks = ((split.root, split.paths[start : start + CHUNK], max_side, check) for start in starts)
    if workers == 1:
        for task in tasks:
            yield from _prepare_files(*task)
        return
    # A server forks the workers: they start fast, and inherit neither threads nor open files.
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            pending: deque[Future[list[Outcome]]] = deque()
            for task in tasks:
                pending.append(pool.submit(_prepare_files, *task))
                if len(pending) > TASKS_PER_WORKER * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_files(root: Path, paths: list[str], max_side: int, check: Check) -> list[Outcome]:
    outcomes = []
    for path in paths:
        num_bytes = 0
        try:
            data = read_image(root / path)
            num_bytes = len(data)
            image = prepare(data, max_side, check)
            outcome = Outcome(num_bytes, image, zlib.crc32(image.jpeg))
        except UnreadableImage as error:
            outcome = Outcome(num_bytes, reason=str(error))
        outcomes.append(outcome)
    return outcomes


def _start_worker() -> None:
    """Ctrl-C is the parent's business; and a worker does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"  # there is a worker per core already

    parent = parent_process()
    assert parent is not None

    def die_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
