"""`bt-convert SOURCE OUT`: a folder of images becomes one file in which every image is sound.

Every image is decoded once here, so that a damaged one is found now and not trained on later:
broken files are listed, all of them, and the result is kept only if there are none or they were
knowingly left out (--skip-broken). Plain JPEGs keep their bytes (see `images.prepare`).

The order of the images and the bytes of the result do not depend on the number of workers.
OUT appears whole or not at all; a folder with train/ and val/ gives OUT and its sibling
`out.val.beton`, both or neither. Beside each stands a report, `out.beton.json`.

Exit codes: 0 done, 1 broken images or a failed write, 2 wrong usage, 128 + signal when stopped.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines.atomic import remove_leftovers
from pipelines.beton_writer import BetonWriter
from pipelines.flags import parse_flags, usable_cores
from pipelines.images import Check
from pipelines.report import Report, progress, say
from pipelines.sources import SourceError, Split, find_splits
from pipelines.workers import WorkerDied, prepare_all


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Convert a folder of images into one file for training: checked, in order, atomic."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder with one folder per class, or with train/ and val/ of such, or with images."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write, ending in .beton; a val/ folder goes to the same name with .val.beton."""

    format: Literal["beton"] = "beton"
    """Target format: FFCV's .beton, version 2."""

    max_side: int = 512
    """Shrink images whose longer side has more pixels than this; 0 shrinks none."""

    workers: int = usable_cores()
    """Worker processes; by default one per usable core. 1 works in this process."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    check: Check = "full"
    """full: decode every image once, so that no broken one is kept. quick: trust a plain JPEG whose
    structure is sound; for data known to be good."""

    subset: int | None = None
    """Convert only this many training images, evenly over the classes."""

    skip_broken: bool = False
    """Leave unreadable images out, list them, and keep the rest."""


class UsageError(ValueError):
    """The command cannot be carried out as given; the message says what to change."""


class BrokenImages(ValueError):
    """Some images cannot be read and --skip-broken was not given."""


class Stopped(BaseException):
    """A signal asked us to stop. Not an Exception: nothing but `main` may swallow it."""


def main(argv: list[str] | None = None) -> int:
    """The `bt-convert` command; returns its exit code."""
    try:
        config = parse_flags(Convert, "bt-convert", argv, config=(tyro.conf.FlagCreatePairsOff,))
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        with _signals_raise_stopped():
            convert(config)
        return 0
    except Stopped as stopped:
        number = stopped.args[0]
        return _fail(f"stopped by {signal.Signals(number).name}; nothing was written", 128 + number)
    except (UsageError, SourceError) as error:
        return _fail(str(error), 2)
    except BrokenImages as error:
        return _fail(str(error), 1)
    except WorkerDied:
        reason = "a worker process died, most likely for lack of memory; try fewer --workers"
        return _fail(reason, 1)
    except BrokenPipeError:
        return _fail("the reader of the output has gone; nothing was written", 1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space or choose another folder for OUT" if full else ""
        return _fail(f"cannot write {config.out}: {error}{advice}", 1)


def convert(config: Convert) -> dict[Path, Report]:
    """Carry out the command; returns the report of each file written.

    Raises UsageError, SourceError, BrokenImages, OSError, WorkerDied.
    """
    _check(config)
    say(f"Listing {config.source}")
    splits = find_splits(config.source)
    if config.subset is not None:
        splits["train"].keep(config.subset)
    outs = {"train": config.out, "val": config.out.with_suffix(".val.beton")}
    reports = {outs[name]: Report(config.source, split) for name, split in splits.items()}
    for out in outs.values():
        _check_out(out, config.overwrite)
    if "val" not in splits and outs["val"].exists():
        raise UsageError(
            f"{outs['val']} is left from another conversion and would pass for the held-out images"
            f" of {config.out}, but {config.source} has no val/: remove it or choose another OUT"
        )

    with contextlib.ExitStack() as files:  # renames what was written, or removes it
        for name, split in splits.items():
            report = reports[outs[name]]
            writer = files.enter_context(
                BetonWriter(
                    outs[name],
                    num_samples=len(split.paths),
                    class_names=split.class_names,
                    overwrite=config.overwrite,
                )
            )
            _write_images(split, writer, report, config, title=name)
            report.show_problems()
            if len(writer):
                writer.finalize()
                report.checksum = writer.sha256()
        _require_sound(reports, config)
    for out, report in reports.items():
        report.save(out, config.max_side)
        say(f"Wrote {out}: {report.summary()}")
    return reports


def _write_images(
    split: Split, writer: BetonWriter, report: Report, config: Convert, title: str
) -> None:
    outcomes = prepare_all(
        split, workers=config.workers, max_side=config.max_side, check=config.check
    )
    with contextlib.closing(outcomes), progress(title, len(split.paths)) as advance:
        for path, label, outcome in zip(split.paths, split.labels, outcomes, strict=True):
            if outcome.image is None:
                report.reject(path, outcome.reason)
            else:
                image = outcome.image
                writer.add(
                    image.jpeg, image.height, image.width, label, path, checksum=outcome.checksum
                )
                report.accept(path, label, image, outcome.num_bytes)
            advance()


def _check(config: Convert) -> None:
    """All that can be known to be wrong before any work."""
    if config.max_side < 0:
        raise UsageError(f"--max-side {config.max_side}: must be 0 (shrink nothing) or more pixels")
    if config.subset is not None and config.subset < 1:
        raise UsageError(f"--subset {config.subset}: must be 1 or more images")
    if config.workers < 1:
        raise UsageError(f"--workers {config.workers}: must be 1 or more")
    out = config.out
    if out.is_dir():
        raise UsageError(f"OUT {out} is a folder; name a file, for example {out / 'out.beton'}")
    if out.suffix != ".beton":
        raise UsageError(f"OUT {out} must end in .beton")
    if not out.parent.is_dir():
        raise UsageError(f"OUT {out}: the folder {out.parent} does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"OUT {out}: no permission to write into {out.parent}")
    _check_out(out, config.overwrite)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UsageError(f"OUT {out} exists; choose another name, or replace it with --overwrite")
    try:
        for leftover in remove_leftovers(out):
            say(f"Removed {leftover}, left by a conversion that was killed")
    except BlockingIOError:
        raise UsageError(f"OUT {out} is being written by another bt-convert right now") from None


def _require_sound(reports: dict[Path, Report], config: Convert) -> None:
    num_broken = sum(len(report.rejects) for report in reports.values())
    if num_broken and not config.skip_broken:
        raise BrokenImages(
            f"{num_broken} broken (listed above); nothing was written. Repair or remove them, or "
            f"leave them out with --skip-broken"
        )
    for report in reports.values():
        if not report.num_images:
            raise BrokenImages(
                f"{report.split.root}: not one image is readable; nothing was written"
            )


@contextlib.contextmanager
def _signals_raise_stopped() -> Iterator[None]:
    """SIGINT and SIGTERM become Stopped, so that every `with` block cleans up after itself."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread, whoever that belongs to
        return

    def stop(number, frame):
        for other in previous:
            signal.signal(other, signal.SIG_IGN)  # the clean-up is short: let it finish
        raise Stopped(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _fail(message: str, code: int) -> int:
    say(f"bt-convert: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
