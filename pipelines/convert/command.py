"""`bt-convert SOURCE OUT`: converts images into training files that contain only intact images.

Every image is decoded once, so damage is found at conversion and not in training: all broken
images are listed, and the output is kept only if there are none or if --skip-broken leaves them
out. Plain JPEGs keep their bytes (see `jpeg.prepare`).

The order of the images and the bytes of the output depend neither on the number of workers nor on
interruptions (`journal.py`). OUT appears complete or not at all, and train and val both or neither;
until then all files are in `OUT.partial`.

Exit codes: 0 success, 1 broken images or a failed write, 2 wrong usage or a source that cannot be
read, 128 + signal when stopped.
"""

import contextlib
import errno
import math
import os
import re
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipelines import __version__
from pipelines.common.atomic import OutputExists, work_folder
from pipelines.common.console import count_items, plural, print_line, replace_closed_streams
from pipelines.common.cpu import usable_cores
from pipelines.common.flags import parse_flags
from pipelines.common.signals import Stopped, signals_raise_stopped
from pipelines.convert import data_page, findings
from pipelines.convert.data_report import Report, account
from pipelines.convert.filters import DROPPED, select_listed
from pipelines.convert.image_table import ImageTable
from pipelines.convert.journal import Journal
from pipelines.convert.jpeg import OUT_OF_FILES
from pipelines.convert.manifest import Manifest, SourceError, Split
from pipelines.convert.pixels import PixelFlags
from pipelines.convert.sources import find_splits
from pipelines.convert.sources.beton_file import val_path
from pipelines.convert.sources.splits import SourceOptions
from pipelines.convert.targets import BetonTarget, ShardTarget, UsageError
from pipelines.convert.verify import DamagedResult, verify
from pipelines.convert.workers import AnyCheck, WorkerDied
from pipelines.convert.write_split import write_split


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Convert images into training files, after checking every image; all or nothing."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Source of the images: a folder of class folders, of images, or containing train/ and val/;
    the ILSVRC2012 archives or their folder; .parquet files of the Hugging Face hub or their folder;
    .tar web shards or their folder; a .beton; a .txt with a path and a label per line; a folder
    with all parts written with --shard."""

    out: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
    """Output file, ending in .beton; validation images go to the same name with .val.beton. With
    --format webdataset, the output folder."""

    format: Literal["beton", "webdataset"] = "beton"
    """Output format. beton: FFCV's, version 2. webdataset: tar shards with an index for DALI."""

    max_side: int | None = None
    """Longest side of stored images in pixels; larger images are resized, 0 resizes none. Default:
    512; 0 for sources written by bt-convert or FFCV."""

    workers: int = max(usable_cores(), 2)
    """Number of worker processes; default: one per usable core, at least 2. 1 converts in the main
    process, which ends if an image crashes the decoder."""

    overwrite: bool = False
    """Permission to replace an existing OUT."""

    check: AnyCheck = "auto"
    """Check of plain JPEGs. full: decode every image once. quick: check only the structure of the
    files; for data known to be intact. auto: full, but images of a .beton of bt-convert, which have
    been decoded before, are copied after a comparison of their checksums."""

    subset: int | None = None
    """Number of training images to convert, spread evenly over the classes; default: all."""

    include: Path | None = None
    """File with the names of the training images to convert, one a line, as in the report. Other
    training images are left out; validation images are not."""

    exclude: Path | None = None
    """File with the names of the training images to leave out, one a line, as in the report."""

    classes: Path | None = None
    """File with the names of the classes to convert, one a line; applies to both splits."""

    drop: str | None = None
    """Training images to leave out, comma-separated. exact: those identical to an earlier one.
    overlap: those identical to a validation image. blank: those of nearly
    one colour (standard deviation below 2 of 255), which small spots on black can be, too."""

    shard: str = "1/1"
    """Part of the images to convert, for example 2/4 on the second of four machines. A folder of
    all parts, given as SOURCE, is joined after a check that the parts belong together."""

    shard_size: int = 1000
    """Maximum size of a web shard in MB."""

    train: str | None = None
    """Pattern of the training files in SOURCE, such as 'fold[1-4]*'; folders, if it holds images in
    folders. What neither this nor --val matches is left out. Default: by the names."""

    val: str | None = None
    """Pattern of the validation files or folders in SOURCE; with --train."""

    all_train: bool = False
    """Training on all images of SOURCE: names of splits are ignored, and folders named train, val
    or test are classes."""

    image_key: str | None = None
    """End of the images' names in web shards, such as jpg or left.png, whose beginning is the key
    of a sample; column of the images in parquet files. Default: the one image of a sample, whose
    key ends at the first dot; image or img."""

    label_key: str | None = None
    """Column, or field of .json, with the labels; in web shards also the end of the label files'
    names, or "folder" or "archive", whose names are then the classes. Default: cls, label, labels
    or fine_label."""

    labels: Path | None = None
    """Classes of the images in ILSVRC2012_img_val.tar: ILSVRC2012_devkit_t12.tar.gz, or a text file
    with a class, or an image and its class, per line. Default: the former, beside the archive."""

    bits: int | None = None
    """Bits of an image of more than 8 (16-bit PNG, TIFF, ...): 2^bits - 1 is white, 0 black."""

    range: str | None = None
    """Values that are black and white in an image of more than 8 bits, for example 0:3000; linear
    between, clipped beyond."""

    bands: str | None = None
    """Bands of an image with others than grey or RGB that become red, green and blue, for example
    4,3,2, or grey, for example 8; counted from 1."""

    page: int | None = None
    """Page of a TIFF, or frame of an animation, with several; counted from 1. Default: no page, and
    the first frame."""

    skip_broken: bool = False
    """Conversion without the broken images, which are listed."""

    continue_: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """Continuation of an interrupted conversion, after a check of its partial output, which is kept
    if this one is interrupted."""

    verify: bool = False
    """Verification of OUT, or of SOURCE without OUT: images are decoded, checksums compared, and
    the sizes of the classes printed."""


class BrokenImages(ValueError):
    """Some images cannot be read and --skip-broken was not given."""


def main(argv: list[str] | None = None) -> int:
    """The `bt-convert` command; returns its exit code."""
    replace_closed_streams()
    try:
        if (sys.argv[1:] if argv is None else argv) == ["--version"]:
            print_line(__version__)
            return 0
        config = parse_flags(Convert, "bt-convert", argv, config=(tyro.conf.FlagCreatePairsOff,))
    except ValueError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        return _fail_without_reader("nothing was written")
    kept = "partial output is kept for --continue" if config.continue_ else "nothing was written"
    try:
        with signals_raise_stopped():
            _check_numbers(config)
            if config.verify and config.out is None:
                _require_no_conversion_flags(config)
                outs = [config.source]
                if config.source.suffix == ".beton" and val_path(config.source).exists():
                    outs.append(val_path(config.source))
            else:
                written, page = convert(config)
                kept = "the conversion is complete"
                for path, report in written:
                    print_line(f"Wrote {path}: {report.summary()}")
                    print_line(account(report.content({})))
                for note in filter(None, (findings.note(report) for _, report in written)):
                    print_line(f"{note}: see {page}")
                outs = list(dict.fromkeys(path for path, _ in written))
            for out in outs if config.verify else ():
                verify(out, workers=config.workers)
        return 0
    except Stopped as stopped:
        number = stopped.args[0]
        return _fail(f"stopped by {signal.Signals(number).name}; {kept}", 128 + number)
    except OutputExists as error:
        out = error.filename
        return _fail(f"OUT {out} exists; choose another name, or replace it with --overwrite", 2)
    except (UsageError, SourceError) as error:
        return _fail(str(error), 2)
    except (BrokenImages, DamagedResult, WorkerDied) as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        return _fail_without_reader(kept)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            import resource  # not on Windows, which has no such limit

            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            advice = "raise the limit, for example with ulimit -n 1024"
            return _fail(f"too many open files: at most {limit} here; {advice}; {kept}", 1)
        action = f"write {config.out}" if config.out else f"verify {config.source}"
        if _is_of_source(error, config):
            return _fail(f"SOURCE {config.source} cannot be read: {error}; {kept}", 2)
        is_full = config.out and error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space or choose another folder for OUT" if is_full else ""
        return _fail(f"cannot {action}: {error}{advice}; {kept}", 1)
    except ValueError as error:  # contents that no source checks for, such as invalid UTF-8
        return _fail(f"SOURCE {config.source} cannot be read: {error}", 2)


def _is_of_source(error: OSError, config: Convert) -> bool:
    """Whether a file below SOURCE failed, and not one that is written, perhaps into SOURCE."""
    if config.out is None or not isinstance(error.filename, str):
        return False
    is_below = Path(error.filename).is_relative_to(config.source)
    return is_below and not error.filename.startswith(str(config.out.with_suffix("")))


def convert(config: Convert) -> tuple[list[tuple[Path, Report]], Path]:
    """Run the conversion; returns (file or folder that was written, its report) by split, and the
    HTML file.

    Raises UsageError, SourceError, BrokenImages, OSError (such as OutputExists), WorkerDied.
    """
    out, part = _check_arguments(config)
    flags = _pixel_flags(config)
    target: BetonTarget | ShardTarget = (
        BetonTarget(out, config.overwrite)
        if config.format == "beton"
        else ShardTarget(out, config.overwrite, config.shard_size * 1_000_000)
    )
    print_line(f"Listing {config.source}")
    options = _values(config, *(field.name for field in fields(SourceOptions)))
    splits = find_splits(config.source, SourceOptions(**options))
    target.check(list(splits))
    max_side = splits["train"].max_side if config.max_side is None else config.max_side
    drop, check = _drop_settings(config, splits)
    lists = _values(config, "include", "exclude", "classes")
    select_listed(splits, **lists)
    settings = _values(config, "format", "check", "shard_size", "subset", "image_key")
    settings |= {"max_side": max_side, "part": part, "drop": drop} | asdict(flags)

    work_path = out.with_name(f"{out.name}.partial")
    existed = work_path.exists()
    with contextlib.ExitStack() as stack:
        try:
            work = stack.enter_context(work_folder(work_path, resume=config.continue_))
        except BlockingIOError:
            raise UsageError(
                f"OUT {out} is being written by another bt-convert right now"
            ) from None
        if existed and not config.continue_:
            print_line(f"Removed {work_path}, left by a conversion that was killed")
        reports: dict[str, Report] = {}
        for name, split in splits.items():
            class_names = reports["train"].manifest.class_names if reports else None
            reports[name] = _scan(name, split, work, config, part, class_names)
        with contextlib.ExitStack() as files:
            journals = {}
            for name, report in reports.items():
                origin = {"version": __version__, "images": report.manifest.sha256}
                journals[name] = Journal(work / f"{name}.journal", origin | settings)
                files.callback(journals[name].close)
            held_out: ImageTable | None = None
            # First val, with which the training images are compared.
            for name, report in reversed(reports.items()):
                writer = target.writer(work, report)
                files.enter_context(writer)
                write_split(
                    writer,
                    journals[name],
                    report,
                    workers=config.workers,
                    max_side=max_side,
                    check=check,
                    flags=flags,
                    drop=drop if name == "train" else (),
                    held_out=held_out,
                )
                held_out = report.images
            _require_images(reports, config)
            for report in reports.values():
                val = reports.get("val") if report.name == "train" else None
                report.findings = findings.find(report, val)
            # Raises ValueError if the account does not add up.
            page = data_page.draw(str(config.source), reports)
        settings |= {name: None if path is None else str(path) for name, path in lists.items()}
        published = target.publish(work, reports, {"source": str(config.source)} | settings, page)
    return [(published[name], report) for name, report in reports.items()], target.page


def _values(config: Convert, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _scan(
    name: str,
    split: Split,
    work: Path,
    config: Convert,
    part: tuple[int, int],
    class_names: list[str] | None,
) -> Report:
    split.images = count_items(f"Listing {name}", split.images)
    manifest = Manifest(split, work, class_names)
    if config.subset is not None and name == "train":
        manifest.select_subset(config.subset)
    manifest.select_part(*part)
    if not len(manifest):
        raise UsageError(f"--shard {config.shard}: {name} has fewer images than parts")
    unlabelled = manifest.samples_per_class[-1] if manifest.class_names else 0
    print_line(
        f"{name}: {len(manifest):,} images, {plural(len(manifest.class_names), 'class')}"
        + (f"; without a class: {unlabelled:,}" if unlabelled else "")
    )
    for hint in split.unused:
        print_line(f"{name}: not used as labels: {hint}")
    for warning in split.warnings:
        print_line(f"{name}: warning: {warning}")
    return Report(name, split, manifest)


def _check_numbers(config: Convert) -> None:
    for name in ("max_side", "subset", "workers", "shard_size", "bits", "page"):
        value, minimum = getattr(config, name), int(name != "max_side")
        if value is not None and value < minimum:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be {minimum} or more")


def _require_no_conversion_flags(config: Convert) -> None:
    """Raise UsageError for a flag that has no effect on --verify without OUT."""
    for name in sorted(_changed(config) - {"source", "workers", "verify"}):
        flag = name.rstrip("_").replace("_", "-")
        raise UsageError(f"--{flag} applies to a conversion; --verify without OUT only reads")


def _changed(config: Convert) -> set[str]:
    """Names of the fields that differ from their defaults."""
    return {item.name for item in fields(config) if getattr(config, item.name) != item.default}


def _check_arguments(config: Convert) -> tuple[Path, tuple[int, int]]:
    """Check OUT and --shard before any work; returns OUT and (part number, number of parts)."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", config.shard)
    number, num_parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= num_parts:
        raise UsageError(f"--shard {config.shard}: must be like 2/4, the second of four parts")
    if (out := config.out) is None:
        raise UsageError("OUT is missing: bt-convert SOURCE OUT")
    if config.format == "beton" and "shard_size" in _changed(config):
        raise UsageError("--shard-size applies to --format webdataset")
    if out.is_symlink() and out.is_dir():  # write the folder itself, do not replace the link
        out = out.resolve()
    if not out.parent.is_dir():
        raise UsageError(f"OUT {out}: the folder {out.parent} does not exist; create it first")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"OUT {out}: no permission to write into {out.parent}")
    return out, (number, num_parts)


def _drop_settings(config: Convert, splits: dict[str, Split]) -> tuple[list[str], AnyCheck]:
    """What --drop leaves out, and the check with which that is known. Raises UsageError."""
    values = config.drop.split(",") if config.drop is not None else []
    if unknown := [value for value in values if value not in DROPPED]:
        known = ", ".join(sorted(DROPPED))
        raise UsageError(f"--drop {config.drop}: {unknown[0]!r} is none of {known}")
    drop = [value for value in DROPPED if value in values]
    if {"exact", "overlap"} & set(drop) and config.shard != "1/1":
        raise UsageError(
            f"--drop {config.drop}: a part has only some of the images; give --drop when the parts"
            " are joined"
        )
    if "overlap" in drop and "val" not in splits:
        raise UsageError(f"--drop overlap: {config.source} has no validation images")
    if "blank" not in drop:
        return drop, config.check
    if config.check == "quick":
        raise UsageError("--drop blank decodes all images; leave out --check quick")
    return drop, "full"


def _pixel_flags(config: Convert) -> PixelFlags:
    """Parse --range and --bands. Raises UsageError."""
    limits = bands = None
    if config.range is not None:
        try:
            low, high = map(float, config.range.split(":"))
        except ValueError:
            low = high = 0
        if not -math.inf < low < high < math.inf:
            raise UsageError(f"--range {config.range}: must be like 0:3000, black and white")
        if config.bits is not None:
            raise UsageError("--bits and --range both define white; give one of them")
        limits = low, high
    if config.bands is not None:
        if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4},[1-9]\d{0,4})?", config.bands, re.ASCII):
            raise UsageError(f"--bands {config.bands}: must be three like 4,3,2 or one, from 1")
        bands = tuple(map(int, config.bands.split(",")))
    if config.bits is not None and config.bits > 64:
        raise UsageError(f"--bits {config.bits}: must be 64 or less")
    if config.source.suffix == ".beton" and _changed(config) & {"bits", "range", "bands", "page"}:
        raise UsageError("--bits, --range, --bands and --page do not apply to a .beton")
    return PixelFlags(config.bits, limits, bands, config.page)


def _require_images(reports: dict[str, Report], config: Convert) -> None:
    """Raise BrokenImages if a split has no images, or broken ones without --skip-broken."""
    num_broken = sum(len(report.rejects) for report in reports.values())
    if num_broken and not config.skip_broken:
        raise BrokenImages(
            f"{num_broken} broken (listed above); nothing was written. Repair or remove them, or "
            f"leave them out with --skip-broken"
        )
    for report in reports.values():
        if not report.num_images:
            drop = f"--drop {config.drop} leaves no image"
            what = drop if report.dropped else "no image is readable"
            raise BrokenImages(f"{report.split.root}: {what}; nothing was written")


def _fail_without_reader(kept: str) -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes again at exit
    return _fail(f"the reader of standard output has closed it; {kept}", 1)


def _fail(message: str, code: int) -> int:
    print_line(f"bt-convert: {message}", file=sys.stderr)
    return code
