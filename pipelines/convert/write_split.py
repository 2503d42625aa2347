"""Writes one split: first the images that an interrupted conversion stored, then the others."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator

from pipelines.common.console import print_line, progress
from pipelines.convert.data_report import Report
from pipelines.convert.filters import DROPPED
from pipelines.convert.image_table import ImageTable
from pipelines.convert.journal import Journal
from pipelines.convert.manifest import SourceError, SourceImage
from pipelines.convert.pixels import PixelFlags
from pipelines.convert.targets import Writer
from pipelines.convert.workers import CRASHED, AnyCheck, Outcome, prepare_all


def write_split(
    writer: Writer,
    journal: Journal,
    report: Report,
    *,
    workers: int,
    max_side: int,
    check: AnyCheck,
    flags: PixelFlags,
    drop: Collection[str] = (),
    held_out: ImageTable | None = None,
) -> None:
    """Convert and write all images of the report's manifest; record them in journal and report.

    drop: what is left out, keys of `DROPPED`. held_out: the validation images, if there are any.
    Raises SourceError when the source disappears, OSError when writing fails, WorkerDied.
    """
    report.images = ImageTable(len(report.manifest), writer.stored)
    report.held_out = held_out
    prepare = functools.partial(prepare_all, max_side=max_side, check=check, flags=flags)
    decide = functools.partial(_drop, drop=drop, report=report)
    with progress(report.name, len(report.manifest)) as advance:
        for entry, outcome, is_new in _outcomes(writer, journal, report, prepare, decide, workers):
            if (image := outcome.image) is not None:
                writer.add(
                    image.jpeg, image.height, image.width, entry.label, entry.name, outcome.checksum
                )
            elif not outcome.is_dropped and not report.split.root.exists():
                raise SourceError(f"{report.split.root} no longer exists")
            report.add(entry, outcome)
            if is_new:
                journal.append(outcome)
            advance()
    report.print_problems()
    if len(writer):
        writer.finalize()
        report.checksum = writer.sha256()


def _drop(outcome: Outcome, drop: Collection[str], report: Report) -> Outcome:
    """The outcome without its image, if that is to be left out."""
    if not drop or (image := outcome.image) is None:
        return outcome

    def is_in(table: ImageTable | None) -> bool:
        return table is not None and table.find(image.jpeg, outcome.checksum) >= 0

    applies = {
        "overlap": lambda: is_in(report.held_out),
        "exact": lambda: is_in(report.images),
        "blank": lambda: image.is_blank,
    }
    for kind in drop:
        if applies[kind]():
            return dataclasses.replace(outcome, image=None, reason=DROPPED[kind], is_dropped=True)
    return outcome


def _outcomes(
    writer: Writer,
    journal: Journal,
    report: Report,
    prepare: Callable,
    decide: Callable[[Outcome], Outcome],
    workers: int,
) -> Iterator[tuple[SourceImage, Outcome, bool]]:
    """Yield (image, outcome, is new): first those recovered from the journal, then the others."""
    images = iter(report.manifest)
    num_recovered = 0
    with contextlib.closing(journal.recover(writer.recover)) as recovered:
        for outcome in recovered:
            image = next(images)
            if outcome.image is not None:
                changed = decide(outcome).is_dropped  # a validation image was repaired since
            elif outcome.is_dropped:
                changed = False
            else:  # if repaired since, its JPEG moves all that follow
                alone = 2 if outcome.reason.startswith(CRASHED) else 1  # 2: in a process
                ((_, outcome),) = prepare(report.split.load(iter([image])), workers=alone)
                changed = outcome.image is not None
            if changed:
                images = itertools.chain([image], images)
                break
            num_recovered += 1
            yield image, outcome, False
    writer.discard_rest()
    if num_recovered:
        print_line(f"{report.name}: {num_recovered:,} images were converted before and are intact")
    with contextlib.closing(prepare(report.split.load(images), workers=workers)) as prepared:
        for image, outcome in prepared:
            yield image, decide(outcome), True
