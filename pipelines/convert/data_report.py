"""What a conversion reports of a split: its lines, and the JSON file beside the result."""

import sys
from collections import Counter
from pathlib import Path

import pipelines
from pipelines.common.console import say
from pipelines.convert.jpeg import JPEG_EXTENSIONS, Prepared
from pipelines.convert.manifest import Listing, Split


class Report:
    """Counts of one split that was converted, and what happened to which of its images.

    `checksum` is the writer's: for a `.beton` `beton_layout.content_sha256`, SHA-256 over the
    metadata table and the table of the images' CRC-32, which `BetonReader.sha256()` gives again.
    """

    def __init__(self, name: str, split: Split, listing: Listing):
        self.name = name  # train or val
        self.split = split
        self.listing = listing
        self.actions: Counter[str] = Counter()  # kept, resized, reencoded
        self.samples_per_class: Counter[int] = Counter()
        self.repairs: list[dict[str, str]] = []
        self.rejects = [{"path": path, "reason": reason} for path, reason in split.problems]
        self.bytes_in = self.bytes_out = self.longest_side = 0
        self.checksum = ""

    @property
    def num_images(self) -> int:
        return self.actions.total()

    def accept(self, path: str, label: int, image: Prepared, bytes_in: int) -> None:
        """Count an image that was stored."""
        action, _, why = image.action.partition(" ")
        self.actions[action] += 1
        self.samples_per_class[label] += 1
        self.bytes_in += bytes_in
        self.bytes_out += len(image.jpeg)
        self.longest_side = max(self.longest_side, image.height, image.width)
        # A PNG named .png is simply another format; one named .jpg was repaired.
        if action == "reencoded" and Path(path).suffix.lower() in JPEG_EXTENSIONS:
            self.repairs.append({"path": path, "why": why.strip("()")})

    def reject(self, path: str, reason: str) -> None:
        """Note a file that cannot be stored."""
        self.rejects.append({"path": path, "reason": reason})

    def show_problems(self) -> None:
        """List what the user should know of the source: all broken images, on stderr."""
        for reason, count in self.split.ignored.items():
            if count:
                say(f"Ignored in {self.split.root}: {count} {reason}")
        present = self.listing.samples_per_class
        empty = [name for label, name in enumerate(self.split.class_names) if not present[label]]
        if empty:
            shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
            say(f"Without images, but kept as classes, in {self.split.root}: {shown}")
        for reject in self.rejects:
            say(f"Broken: {self.split.root / reject['path']}: {reject['reason']}", file=sys.stderr)

    def summary(self) -> str:
        """One line."""
        parts = [f"{count:,} {action}" for action, count in sorted(self.actions.items())]
        if self.rejects:
            parts.append(f"{len(self.rejects):,} broken left out")
        classes = len(self.split.class_names)
        return (
            f"{self.name}, {self.num_images:,} images ({', '.join(parts)}), {classes:,} classes, "
            f"{self.bytes_out / 1e9:.2f} GB from {self.bytes_in / 1e9:.2f} GB"
        )

    def content(self, settings: dict) -> dict:
        """What the JSON file beside the result says of this split."""
        names = self.split.class_names
        return {
            "bt_fast_version": pipelines.__version__,
            "split": self.name,
            **settings,
            "listing": self.listing.sha256,
            "checksum": f"sha256:{self.checksum}",
            "num_images": self.num_images,
            "num_classes": len(names),
            "actions": dict(self.actions),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "longest_side": self.longest_side,
            "classes": names,
            "samples_per_class": [self.samples_per_class[label] for label in range(len(names))],
            "ignored": dict(+self.split.ignored),
            "repairs": self.repairs,
            "rejects": self.rejects,
        }
