"""One split, from its source to its writer: what an earlier process did of it, then the rest."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

from pipelines.common.console import progress, say
from pipelines.convert.data_report import Report
from pipelines.convert.journal import Journal
from pipelines.convert.jpeg import Check
from pipelines.convert.manifest import Image, SourceError
from pipelines.convert.targets import Writer
from pipelines.convert.workers import Outcome, prepare_all


def write_split(
    writer: Writer,
    journal: Journal,
    report: Report,
    *,
    workers: int,
    max_side: int,
    check: Check,
) -> None:
    """Prepare all images of the report's listing, write them, note them in journal and report.

    Raises SourceError when the source vanishes, OSError when writing fails, WorkerDied.
    """
    prepare = functools.partial(prepare_all, max_side=max_side, check=check)
    with progress(report.name, len(report.listing)) as advance:
        for image, outcome, is_new in _outcomes(writer, journal, report, prepare, workers):
            if (prepared := outcome.image) is None:
                report.reject(image.name, outcome.reason)
                if not report.split.root.exists():
                    raise SourceError(f"{report.split.root} has vanished")
            else:
                writer.add(
                    prepared.jpeg,
                    prepared.height,
                    prepared.width,
                    image.label,
                    image.name,
                    checksum=outcome.checksum,
                )
                report.accept(image.name, image.label, prepared, outcome.num_bytes)
            if is_new:
                journal.append(outcome)
            advance()
    report.show_problems()
    if len(writer):
        writer.finalize()
        report.checksum = writer.sha256()


def _outcomes(
    writer: Writer, journal: Journal, report: Report, prepare: Callable, workers: int
) -> Iterator[tuple[Image, Outcome, bool]]:
    """(image, what became of it, is that new?): first what the journal knows, then the rest."""
    images = iter(report.listing)
    num_recovered = 0
    with contextlib.closing(journal.recover(writer.recover)) as recovered:
        for outcome in recovered:
            image = next(images)
            if outcome.image is None:  # it may have been repaired since, and then shifts the rest
                ((_, outcome),) = prepare(report.split.load(iter([image])), workers=1)
                if outcome.image is not None:
                    images = itertools.chain([image], images)
                    break
            num_recovered += 1
            yield image, outcome, False
    writer.discard_rest()
    if num_recovered:
        say(f"{report.name}: {num_recovered:,} images were done before and are as they were")
    with contextlib.closing(prepare(report.split.load(images), workers=workers)) as prepared:
        for image, outcome in prepared:
            yield image, outcome, True
