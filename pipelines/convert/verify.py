"""`bt-convert --verify`: reads a result again and says whether every image is what was stored."""

import hashlib
import io
import statistics
import sys
from collections import Counter
from pathlib import Path

from PIL import Image as Picture
from PIL import ImageDraw

from pipelines.beton import BetonReader
from pipelines.common.atomic import atomic_file
from pipelines.common.console import progress, say
from pipelines.convert.manifest import Listing, SourceError, Split
from pipelines.convert.sources import beton_file, shards
from pipelines.convert.workers import prepare_all

COLUMNS, SIDE, CAPTION = 10, 120, 14  # of the contact sheet: pictures a row, pixels
NUM_PICTURES = 100
BARS = 20  # classes at most that get a bar of their own


class DamagedResult(ValueError):
    """Something is not as it was written."""


def verify(path: Path, *, workers: int) -> None:
    """Decode every image of a `.beton` or a folder of web shards, and compare all checksums.

    Prints the labels' histogram; draws a contact sheet beside each split, `out.beton.png`.
    Raises DamagedResult, after all that is damaged was listed; SourceError.
    """
    num_damaged = 0
    if path.suffix == ".beton":
        reader = beton_file.open_beton(path)
        sheet = path.with_name(f"{path.name}.png")
        num_damaged += _verify_images(beton_file.split_of(reader), sheet, workers, reader)
    elif path.is_dir() and shards.is_ours(path):
        dataset = shards.read_dataset(path)
        for name, split in shards.our_splits(path, dataset).items():
            num_damaged += _verify_shards(path, dataset["splits"][name]["shards"])
            sheet = path.with_name(f"{path.name}.{name}.png")
            num_damaged += _verify_images(split, sheet, workers)
    else:
        raise SourceError(f"--verify {path}: neither a .beton nor a folder of bt-fast's web shards")
    if num_damaged:
        raise DamagedResult(f"{path}: {num_damaged} damaged (listed above); convert again")


def _verify_shards(folder: Path, contents: list[dict]) -> int:
    """Compare each shard's SHA-256; returns how many differ."""
    say(f"Comparing the SHA-256 of {len(contents):,} shards")
    num_damaged = 0
    for content in contents:
        with open(folder / content["name"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != content["sha256"]:
                num_damaged += 1
                reason = "other bytes than written (SHA-256)"
                say(f"Damaged: {folder / content['name']}: {reason}", file=sys.stderr)
    return num_damaged


def _verify_images(
    split: Split, sheet: Path, workers: int, reader: BetonReader | None = None
) -> int:
    """Decode all, draw some, count labels; returns how many are damaged."""
    listing = Listing(split)
    step = -(-len(listing) // NUM_PICTURES)
    pictures: list[tuple[str, bytes]] = []
    actions: Counter[str] = Counter()
    num_damaged = 0
    with progress(f"Verifying {split.root.name}", len(listing)) as advance:
        outcomes = prepare_all(iter(listing), workers=workers, max_side=0, check="full")
        for index, (image, outcome) in enumerate(outcomes):
            advance()
            reason = outcome.reason
            if (prepared := outcome.image) is not None:
                actions[prepared.action] += 1
                size = (prepared.height, prepared.width)
                if reader is not None and reader.size(index) != size:
                    reason = f"is of {size} pixels, and {reader.size(index)} in the table"
                if index % step == 0:
                    label = split.class_names[image.label] if image.label >= 0 else ""
                    pictures.append((label, prepared.jpeg))
            if reason:
                num_damaged += 1
                say(
                    f"Damaged: {split.root}: image {index} ({image.name}): {reason}",
                    file=sys.stderr,
                )
    kept = actions.pop("kept", 0)
    others = "".join(f", {count:,} {action}" for action, count in sorted(actions.items()))
    say(f"{split.root}: {kept:,} of {len(listing):,} images are sound plain JPEGs{others}")
    _show_labels(split, listing.samples_per_class)
    if pictures:
        try:
            _draw_sheet(pictures, sheet)
            say(f"Contact sheet: {sheet}")
        except OSError as error:  # what is verified may lie where nobody may write
            say(f"No contact sheet: {error}")
    return num_damaged


def _show_labels(split: Split, counts: Counter[int]) -> None:
    """A bar per class where they are few, else how even they are."""
    if not split.class_names:
        say("No classes")
        return
    values = [counts[label] for label in range(len(split.class_names))]
    if len(values) <= BARS:
        for name, value in zip(split.class_names, values, strict=True):
            say(f"{value:>9,} {'#' * round(40 * value / max(values))} {name}")
    else:
        rarest = split.class_names[values.index(min(values))]
        say(
            f"{len(values):,} classes of {min(values):,} ({rarest}) to {max(values):,} images, "
            f"median {statistics.median(values):,.0f}"
        )


def _draw_sheet(pictures: list[tuple[str, bytes]], path: Path) -> None:
    """Evenly spaced images with the names of their classes, as a PNG."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = Picture.new("RGB", (COLUMNS * SIDE, rows * (SIDE + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (label, jpeg) in enumerate(pictures):
        left, top = number % COLUMNS * SIDE, number // COLUMNS * (SIDE + CAPTION)
        stored = Picture.open(io.BytesIO(jpeg))
        stored.draft("RGB", (SIDE, SIDE))  # decodes as few pixels as are needed
        picture = stored.convert("RGB")
        picture.thumbnail((SIDE - 4, SIDE - 4))
        sheet.paste(picture, (left + 2, top + 2))
        caption = label.encode("ascii", "replace").decode()[:18]
        draw.text((left + 2, top + SIDE), caption, fill="black")
    with atomic_file(path, overwrite=True) as file:
        sheet.save(file, "PNG")
