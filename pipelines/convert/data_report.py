"""The report on the conversion of a split: printed lines and the JSON file beside the output."""

import statistics
import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import pipelines
from pipelines.common.console import plural, print_line
from pipelines.convert.filters import NOT_SELECTED
from pipelines.convert.image_table import ImageTable
from pipelines.convert.jpeg import JPEG_EXTENSIONS
from pipelines.convert.manifest import Manifest, SourceImage, Split
from pipelines.convert.pixels import FIRST_FRAME
from pipelines.convert.workers import Outcome

MAX_LISTED = 100  # names in a list of the report, whose total is stated


class Report:
    """Counts of one converted split, and its repaired and rejected images.

    Attributes: `images`, those that are stored, and `held_out`, those of the validation split, both
    from `write_split`; `overlaps`, pairs (index, index in `held_out`) of identical images;
    `dropped`, what --drop left out, by reason, and `left_out`, the first of these images;
    `findings`, what `findings.find` found.
    """

    images: ImageTable

    def __init__(self, name: str, split: Split, manifest: Manifest):
        self.name = name  # train or val
        self.split = split
        self.manifest = manifest
        self.actions: Counter[str] = Counter()  # kept, resized, reencoded
        self.reencoded: Counter[str] = Counter()  # why, or from which format and with which flags
        self.samples_per_class: Counter[int] = Counter()
        self.repairs: list[dict[str, str]] = []  # the first ones
        self.num_repairs = 0
        self.rejects = [{"path": path, "reason": reason} for path, reason in split.problems]
        self.held_out: ImageTable | None = None
        self.overlaps = array("I")
        self.dropped: Counter[str] = Counter()
        self.left_out: list[dict[str, str]] = []
        self.findings: dict = {}
        self._not_stored = array("I")  # positions in the manifest
        self.bytes_in = self.bytes_out = self.longest_side = 0
        self.checksum = ""

    @property
    def num_images(self) -> int:
        return self.actions.total()

    def add(self, entry: SourceImage, outcome: Outcome) -> None:
        """Count an image that was stored, or list one that was not."""
        if (image := outcome.image) is None:
            self._leave_out({"path": entry.name, "reason": outcome.reason}, outcome.is_dropped)
            return
        if self.held_out is not None:
            same = self.held_out.find(image.jpeg, outcome.checksum)
            self.overlaps.extend((len(self.images), same) if same >= 0 else ())
        self.images.add(image, outcome.checksum, entry.label)
        action, _, why = image.action.partition(" ")
        self.actions[action] += 1
        self.samples_per_class[entry.label] += 1
        self.bytes_in += outcome.num_bytes
        self.bytes_out += len(image.jpeg)
        self.longest_side = max(self.longest_side, image.height, image.width)
        if action == "reencoded":
            self.reencoded[why.strip("()").partition(":")[0]] += 1
        # A PNG named .png is merely another format; a PNG named .jpg counts as repaired.
        if action == "reencoded" and Path(entry.name).suffix.lower() in JPEG_EXTENSIONS:
            self.num_repairs += 1
            if len(self.repairs) < MAX_LISTED:
                self.repairs.append({"path": entry.name, "why": why.strip("()")})

    def _leave_out(self, image: dict[str, str], is_dropped: bool) -> None:
        self._not_stored.append(self.num_images + len(self._not_stored))
        if not is_dropped:
            self.rejects.append(image)
            return
        self.dropped[image["reason"]] += 1
        if len(self.left_out) < MAX_LISTED:
            self.left_out.append(image)

    def names(self, indices: Iterable[int]) -> dict[int, str]:
        """The names of stored images."""
        unique = np.unique(np.fromiter(indices, np.int64))
        skipped = np.asarray(self._not_stored, np.int64)
        before = skipped - np.arange(len(skipped))  # images stored before each of them
        positions = (unique + np.searchsorted(before, unique, "right")).tolist()
        entries = self.manifest.pick(positions)
        return {
            index: entries[position].name
            for index, position in zip(unique.tolist(), positions, strict=True)
        }

    def print_problems(self) -> None:
        """Print what only a flag changes, empty classes, and on stderr all broken images."""
        if frames := sum(n for why, n in self.reencoded.items() if why.endswith(FIRST_FRAME)):
            print_line(f"Of {frames:,} animations only the first frame is stored; see --page")
        present = self.manifest.samples_per_class
        empty = [name for label, name in enumerate(self.manifest.class_names) if not present[label]]
        if empty:
            shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
            print_line(f"Classes without images in {self.split.root}: {shown}")
        for reject in self.rejects:
            path, reason = self.split.root / reject["path"], reject["reason"]
            print_line(f"Broken: {path}: {reason}", file=sys.stderr)

    def summary(self) -> str:
        """The counts as one line."""
        parts = [f"{count:,} {action}" for action, count in sorted(self.actions.items())]
        if self.rejects:
            parts.append(f"{len(self.rejects):,} broken left out")
        classes = plural(len(self.manifest.class_names), "class")
        return (
            f"{self.name}, {self.num_images:,} images ({', '.join(parts)}), {classes}, "
            f"{self.bytes_out / 1e9:.2f} GB from {self.bytes_in / 1e9:.2f} GB"
        )

    def content(self, settings: dict) -> dict:
        """The JSON report of this split."""
        manifest = self.manifest
        found = manifest.num_listed + len(self.split.problems) + self.split.ignored.total()
        not_selected = Counter({NOT_SELECTED: manifest.num_listed - len(manifest)})
        names = manifest.class_names
        return {
            "bt_fast_version": pipelines.__version__,
            "split": self.name,
            **settings,
            "listing": manifest.sha256,
            "checksum": f"sha256:{self.checksum}",
            "num_images": self.num_images,
            "num_classes": len(names),
            "actions": dict(self.actions),
            "reencoded": dict(self.reencoded),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "longest_side": self.longest_side,
            "classes": names,
            "samples_per_class": [self.samples_per_class[label] for label in range(len(names))],
            "found": found,
            "ignored": dict(self.split.ignored + not_selected + self.dropped),
            "dropped": self.left_out,
            "dropped_by_reason": dict(self.dropped),
            **self.findings,
            "num_repairs": self.num_repairs,
            "repairs": self.repairs,
            "rejects": self.rejects,
        }


def class_sizes(names: list[str], counts: list[int]) -> str:
    """The numbers of images of the classes, as text."""
    smallest, largest = min(counts), max(counts)
    return (
        f"{smallest:,} images ({names[counts.index(smallest)]}) to {largest:,}"
        f" ({names[counts.index(largest)]}), median {statistics.median(counts):,.0f}"
    )


def account(report: dict) -> str:
    """What a source had, as one line. Raises ValueError if it does not add up."""
    found, stored, rejected = report["found"], report["num_images"], len(report["rejects"])
    ignored = report["ignored"]
    if found != stored + rejected + sum(ignored.values()):
        raise ValueError(
            f"the account does not add up: {found} found, {stored} stored, {rejected} rejected"
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ignored.items())
    return (
        f"{report['split']}: {found:,} found = {stored:,} stored + {rejected:,} rejected"
        f" + {sum(ignored.values()):,} ignored" + (f" ({reasons})" if reasons else "")
    )
