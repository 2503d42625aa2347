"""`bt-convert --verify`: reads an output again and checks every image against its checksum."""

import hashlib
import sys
from collections import Counter
from pathlib import Path

from pipelines.beton import BetonReader
from pipelines.common.console import plural, print_line, progress
from pipelines.convert.data_report import account, class_sizes
from pipelines.convert.manifest import Manifest, SourceError, Split
from pipelines.convert.sources import beton_file, parts, shards
from pipelines.convert.workers import prepare_all

MAX_BARS = 20  # most classes that are printed as a bar each


class DamagedResult(ValueError):
    """Part of an output differs from what was written."""


def verify(path: Path, *, workers: int) -> None:
    """Decode every image of a `.beton` or a folder of web shards, and compare all checksums.

    Prints a histogram of the labels. Raises DamagedResult after listing all damage; SourceError.
    """
    num_damaged = 0
    if path.suffix == ".beton":
        reader = beton_file.open_beton(path)
        num_damaged += _verify_images(beton_file.read_split(reader), workers, reader)
        num_damaged += _verify_account(path, len(reader), parts.read_report(path))
    elif path.is_dir() and shards.has_dataset(path):
        dataset = shards.read_dataset(path)
        for name, split in shards.dataset_splits(path, dataset).items():
            report = dataset["splits"][name]
            num_damaged += _verify_shards(path, report["shards"])
            num_damaged += _verify_images(split, workers)
            num_stored = sum(shard["num_images"] for shard in report["shards"])
            num_damaged += _verify_account(path, num_stored, report)
    else:
        raise SourceError(f"--verify {path}: neither a .beton nor a folder with dataset.json")
    if num_damaged:
        raise DamagedResult(f"{path}: {num_damaged} damaged (listed above); convert again")


def _verify_account(path: Path, num_stored: int, report: dict) -> int:
    """Repeat the account of the conversion's report; returns 1 if it does not add up, else 0."""
    if "found" not in report:
        print_line(f"{path}: no account of the conversion, whose report is missing or older")
        return 0
    try:
        if report["num_images"] != num_stored:
            raise ValueError(f"the report counts {report['num_images']} images, not {num_stored}")
        print_line(account(report))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print_line(f"Damaged: {path}: its report: {error}", file=sys.stderr)
        return 1
    return 0


def _verify_shards(folder: Path, entries: list[dict]) -> int:
    """Compare the SHA-256 of each shard with its entry; returns the number that differ."""
    print_line(f"Comparing the SHA-256 of {len(entries):,} shards")
    num_damaged = 0
    for entry in entries:
        with open(folder / entry["name"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                num_damaged += 1
                reason = "its SHA-256 differs from that in dataset.json"
                print_line(f"Damaged: {folder / entry['name']}: {reason}", file=sys.stderr)
    return num_damaged


def _verify_images(split: Split, workers: int, reader: BetonReader | None = None) -> int:
    """Decode all images, count labels; returns the number of damaged images."""
    manifest = Manifest(split)
    actions: Counter[str] = Counter()
    num_damaged = 0
    with progress(f"Verifying {split.root.name}", len(manifest)) as advance:
        outcomes = prepare_all(iter(manifest), workers=workers, max_side=0, check="full")
        for index, (image, outcome) in enumerate(outcomes):
            advance()
            reason = outcome.reason
            if (prepared := outcome.image) is not None:
                actions[prepared.action] += 1
                size = (prepared.height, prepared.width)
                if reader is not None and reader.size(index) != size:
                    reason = f"is of {size} pixels, but {reader.size(index)} in the table"
            if reason:
                num_damaged += 1
                print_line(
                    f"Damaged: {split.root}: image {index} ({image.name}): {reason}",
                    file=sys.stderr,
                )
    kept = actions.pop("kept", 0)
    others = "".join(f", {count:,} {action}" for action, count in sorted(actions.items()))
    print_line(f"{split.root}: {kept:,} of {len(manifest):,} images are intact plain JPEGs{others}")
    _print_labels(manifest)
    return num_damaged


def _print_labels(manifest: Manifest) -> None:
    """Print the sizes of the classes, and a bar for each of a few."""
    names = manifest.class_names
    counts = [manifest.samples_per_class[label] for label in range(len(names))]
    print_line(plural(len(names), "class") + (f" of {class_sizes(names, counts)}" if names else ""))
    for name, count in zip(names, counts, strict=True) if len(names) <= MAX_BARS else ():
        print_line(f"{count:>9,} {'#' * round(40 * count / max(counts))} {name}")
