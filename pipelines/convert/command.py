"""`bt-convert SOURCE OUT`: images become files for training in which every image is sound.

Every image is decoded once here, so that a damaged one is found now and not trained on later:
broken ones are listed, all of them, and the result is kept only if there are none or they were
knowingly left out (--skip-broken). Plain JPEGs keep their bytes (see `images.prepare`).

The order of the images and the bytes of the result depend neither on the number of workers nor on
interruptions (`journal.py`). OUT appears whole or not at all, and train and val both or neither;
until then everything stands in `OUT.partial`.

Exit codes: 0 done, 1 broken images or a failed write, 2 wrong usage or a source that cannot be
read, 128 + signal when stopped.
"""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipelines import __version__
from pipelines.common.atomic import work_folder
from pipelines.common.console import counted, say
from pipelines.common.cpu import usable_cores
from pipelines.common.flags import parse_flags
from pipelines.common.signals import Stopped, signals_raise_stopped
from pipelines.convert.data_report import Report
from pipelines.convert.journal import Journal, OtherSettings
from pipelines.convert.jpeg import Check
from pipelines.convert.manifest import Listing, SourceError, Split
from pipelines.convert.sources import find_splits
from pipelines.convert.targets import BetonFiles, ShardFolder, UsageError
from pipelines.convert.verify import DamagedResult, verify
from pipelines.convert.workers import WorkerDied
from pipelines.convert.write_split import write_split


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Convert images into files for training: checked, in order, all or nothing."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder with one folder per class, or with train/ and val/ of such, or with images; the
    ILSVRC2012 archives or their folder; .parquet of the Hugging Face hub, or their folder; .tar web
    shards, or their folder; a .beton; a .txt with a path and a label in each line; or the folder
    with all parts that --shard made."""

    out: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """File to write, ending in .beton; validation images go to the same name with .val.beton. Or
    folder to write, with --format webdataset."""

    format: Literal["beton", "webdataset"] = "beton"
    """beton: FFCV's format, version 2. webdataset: tar shards, with an index for DALI."""

    max_side: int | None = None
    """Shrink images whose longer side has more pixels than this; 0 shrinks none. Default: 512; 0
    for what bt-convert or FFCV made."""

    workers: int = usable_cores()
    """Worker processes; by default one per usable core. 1 works in this process."""

    overwrite: bool = False
    """Replace OUT if it exists."""

    check: Check = "full"
    """full: decode every image once, so that no broken one is kept. quick: trust a plain JPEG whose
    structure is sound; for data known to be good."""

    subset: int | None = None
    """Convert only this many training images, evenly over the classes."""

    shard: str = "1/1"
    """Convert one part of the images, for example 2/4 on the second of four machines. Put all parts
    into one folder and convert that folder: this checks that they belong together."""

    shard_size: int = 1000
    """MB in a web shard, at most."""

    labels: Path | None = None
    """Classes of ILSVRC2012_img_val.tar, where its development kit (ILSVRC2012_devkit_t12.tar.gz)
    does not lie beside it: that, or a text file with a class or an image and its class a line."""

    skip_broken: bool = False
    """Leave unreadable images out, list them, and keep the rest."""

    continue_: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """Go on where an interrupted conversion stopped, after checking what it left; and keep what is
    done if this one is interrupted."""

    verify: bool = False
    """Read OUT again, or SOURCE where no OUT is given: decode every image, compare checksums, show
    the labels, and draw a contact sheet."""


class BrokenImages(ValueError):
    """Some images cannot be read and --skip-broken was not given."""


def main(argv: list[str] | None = None) -> int:
    """The `bt-convert` command; returns its exit code."""
    if (sys.argv[1:] if argv is None else argv) == ["--version"]:
        print(__version__)
        return 0
    try:
        config = parse_flags(Convert, "bt-convert", argv, config=(tyro.conf.FlagCreatePairsOff,))
    except ValueError as error:
        return _fail(str(error), 2)
    kept = "what is done stays for --continue" if config.continue_ else "nothing was written"
    try:
        with signals_raise_stopped():
            _check_numbers(config)
            only_verify = config.verify and config.out is None
            outs = [config.source] if only_verify else convert(config)
            for out in outs if config.verify else ():
                verify(out, workers=config.workers)
        return 0
    except Stopped as stopped:
        number = stopped.args[0]
        return _fail(f"stopped by {signal.Signals(number).name}; {kept}", 128 + number)
    except (UsageError, SourceError) as error:
        return _fail(str(error), 2)
    except (BrokenImages, DamagedResult, WorkerDied) as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        return _fail(f"the reader of the output has gone; {kept}", 1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space or choose another folder for OUT" if full else ""
        return _fail(f"cannot write {config.out}: {error}{advice}; {kept}", 1)
    except ValueError as error:  # of contents that no room foresaw, such as bytes that are no text
        return _fail(f"SOURCE {config.source} cannot be read: {error}", 2)


def convert(config: Convert) -> list[Path]:
    """Carry out the command; returns the files, or the folder, that were written.

    Raises UsageError, SourceError, BrokenImages, OSError, WorkerDied.
    """
    out, part = _check(config)
    target: BetonFiles | ShardFolder = (
        BetonFiles(out, config.overwrite)
        if config.format == "beton"
        else ShardFolder(out, config.overwrite, config.shard_size * 1_000_000)
    )
    say(f"Listing {config.source}")
    splits = find_splits(config.source, config.labels)
    target.check(list(splits))
    max_side = splits["train"].max_side if config.max_side is None else config.max_side
    settings = {"max_side": max_side, "subset": config.subset, "part": list(part)}

    with _work_folder(out, config) as work:
        reports = {name: _list(name, split, work, config, part) for name, split in splits.items()}
        with contextlib.ExitStack() as files:
            for name, report in reports.items():
                journal = _open_journal(work, report, config, settings)
                files.callback(journal.close)
                writer = target.writer(work, name, report.split, report.listing)
                files.enter_context(writer)
                write_split(
                    writer,
                    journal,
                    report,
                    workers=config.workers,
                    max_side=max_side,
                    check=config.check,
                )
            _require_sound(reports, config)
        published = target.publish(work, reports, {"source": str(config.source), **settings})
    for name, report in reports.items():
        say(f"Wrote {published[name]}: {report.summary()}")
    return list(dict.fromkeys(published.values()))


@contextlib.contextmanager
def _work_folder(out: Path, config: Convert) -> Iterator[Path]:
    path = out.with_name(f"{out.name}.partial")
    was_there = path.exists()
    try:
        with work_folder(path, resume=config.continue_) as work:
            if was_there and not config.continue_:
                say(f"Removed {path}, left by a conversion that was killed")
            yield work
    except BlockingIOError:
        raise UsageError(f"OUT {out} is being written by another bt-convert right now") from None


def _list(name: str, split: Split, work: Path, config: Convert, part: tuple[int, int]) -> Report:
    split.images = counted(f"Listing {name}", split.images)
    listing = Listing(split, scratch=work)
    if config.subset is not None and name == "train":
        listing.keep(config.subset)
    listing.take_part(*part)
    if not len(listing):
        raise UsageError(f"--shard {config.shard}: {name} has too few images for so many parts")
    say(f"{name}: {len(listing):,} images, {len(split.class_names):,} classes")
    return Report(name, split, listing)


def _open_journal(work: Path, report: Report, config: Convert, settings: dict) -> Journal:
    settings = {
        "images": report.listing.sha256,
        "format": config.format,
        "check": config.check,
        "shard_size": config.shard_size,
        **settings,
    }
    try:
        return Journal(work / f"{report.name}.journal", settings)
    except OtherSettings as error:
        raise UsageError(
            f"--continue: {work} was begun with other settings ({error}). Give the same, or begin "
            f"anew without --continue"
        ) from None


def _check_numbers(config: Convert) -> None:
    for flag, value, least in (
        ("--max-side", config.max_side, 0),
        ("--subset", config.subset, 1),
        ("--workers", config.workers, 1),
        ("--shard-size", config.shard_size, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: must be {least} or more")


def _check(config: Convert) -> tuple[Path, tuple[int, int]]:
    """All else that can be known to be wrong before work; returns OUT, and --shard as numbers."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", config.shard)
    number, of = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= of:
        raise UsageError(f"--shard {config.shard}: must be like 2/4, the second of four parts")
    if (out := config.out) is None:
        raise UsageError("OUT is missing: bt-convert SOURCE OUT")
    if out.is_symlink() and out.is_dir():  # its place, not the link to it, is what is written
        out = out.resolve()
    if not out.parent.is_dir():
        raise UsageError(f"OUT {out}: the folder {out.parent} does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"OUT {out}: no permission to write into {out.parent}")
    return out, (number, of)


def _require_sound(reports: dict[str, Report], config: Convert) -> None:
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


def _fail(message: str, code: int) -> int:
    say(f"bt-convert: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
