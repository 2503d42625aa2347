"""Writes one split: first the images that an interrupted conversion stored, then the others."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

from pipelines.common.console import print_line, progress
from pipelines.convert.data_report import Report
from pipelines.convert.journal import Journal
from pipelines.convert.jpeg import Check
from pipelines.convert.manifest import SourceError, SourceImage
from pipelines.convert.pixels import PixelFlags
from pipelines.convert.targets import Writer
from pipelines.convert.workers import CRASHED, Outcome, prepare_all


def write_split(
    writer: Writer,
    journal: Journal,
    report: Report,
    *,
    workers: int,
    max_side: int,
    check: Check,
    flags: PixelFlags,
) -> None:
    """Convert and write all images of the report's manifest; record them in journal and report.

    Raises SourceError when the source disappears, OSError when writing fails, WorkerDied.
    """
    prepare = functools.partial(prepare_all, max_side=max_side, check=check, flags=flags)
    with progress(report.name, len(report.manifest)) as advance:
        for entry, outcome, is_new in _outcomes(writer, journal, report, prepare, workers):
            if (image := outcome.image) is None:
                report.rejects.append({"path": entry.name, "reason": outcome.reason})
                if not report.split.root.exists():
                    raise SourceError(f"{report.split.root} no longer exists")
            else:
                writer.add(
                    image.jpeg, image.height, image.width, entry.label, entry.name, outcome.checksum
                )
                report.accept(entry.name, entry.label, image, outcome.num_bytes)
            if is_new:
                journal.append(outcome)
            advance()
    report.print_problems()
    if len(writer):
        writer.finalize()
        report.checksum = writer.sha256()


def _outcomes(
    writer: Writer, journal: Journal, report: Report, prepare: Callable, workers: int
) -> Iterator[tuple[SourceImage, Outcome, bool]]:
    """Yield (image, outcome, is new): first those recovered from the journal, then the others."""
    images = iter(report.manifest)
    num_recovered = 0
    with contextlib.closing(journal.recover(writer.recover)) as recovered:
        for outcome in recovered:
            image = next(images)
            if outcome.image is None:  # if repaired since, its JPEG moves all that follow
                alone = 2 if outcome.reason.startswith(CRASHED) else 1  # 2: in a process
                ((_, outcome),) = prepare(report.split.load(iter([image])), workers=alone)
                if outcome.image is not None:
                    images = itertools.chain([image], images)
                    break
            num_recovered += 1
            yield image, outcome, False
    writer.discard_rest()
    if num_recovered:
        print_line(f"{report.name}: {num_recovered:,} images were converted before and are intact")
    with contextlib.closing(prepare(report.split.load(images), workers=workers)) as prepared:
        for image, outcome in prepared:
            yield image, outcome, True
