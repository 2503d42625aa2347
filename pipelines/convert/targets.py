"""The two formats a conversion can write: where the files go, and how they appear together.

Everything is written in the conversion's work folder. When all of it is complete it is moved to
its final names, which takes neither space nor computation and so hardly can fail.
"""

import json
import os
from pathlib import Path

from pipelines.beton.layout import VERSION
from pipelines.beton.writer import BetonWriter
from pipelines.common.atomic import atomic_file, sync
from pipelines.convert.data_report import Report
from pipelines.convert.manifest import Listing, Split
from pipelines.convert.sources.beton_file import val_beside
from pipelines.webdataset.writer import DATASET, ShardWriter

Writer = BetonWriter | ShardWriter


class UsageError(ValueError):
    """The command cannot be carried out as given; the message says what to change."""


class BetonFiles:
    """`out.beton`, for validation images `out.val.beton`, and a report beside each."""

    def __init__(self, out: Path, overwrite: bool):
        self._out, self._overwrite = out, overwrite

    def check(self, splits: list[str]) -> None:
        """Can these be written? Raises UsageError."""
        if self._out.is_dir():
            example = self._out / "out.beton"
            raise UsageError(f"OUT {self._out} is a folder; name a file, for example {example}")
        if self._out.suffix != ".beton":
            raise UsageError(f"OUT {self._out} must end in .beton")
        for name in splits:
            _refuse_existing(self._path(name), self._overwrite)
        if "val" not in splits and os.path.lexists(self._path("val")):
            raise UsageError(
                f"{self._path('val')} is left from another conversion and would pass for the "
                f"held-out images of {self._out}, but SOURCE has none: remove it or choose another"
                f" OUT"
            )

    def writer(self, work: Path, name: str, split: Split, listing: Listing) -> Writer:
        """For one split."""
        return BetonWriter(
            work / f"{name}.beton",
            num_samples=len(listing),
            class_names=split.class_names,
            in_place=True,
        )

    def publish(self, work: Path, reports: dict[str, Report], settings: dict) -> dict[str, Path]:
        """Move the complete files to their names, then write the reports; returns where each is."""
        for name in reports:
            _refuse_existing(self._path(name), self._overwrite)
        for name in reports:
            os.replace(work / f"{name}.beton", self._path(name))
        for name, report in reports.items():
            content = {"format": "beton", "format_version": VERSION, **report.content(settings)}
            path = self._path(name)
            with atomic_file(path.with_name(f"{path.name}.json"), overwrite=True) as file:
                file.write(json.dumps(content, indent=1).encode() + b"\n")
        sync(self._out.parent)
        return {name: self._path(name) for name in reports}

    def _path(self, name: str) -> Path:
        return self._out if name == "train" else val_beside(self._out)


class ShardFolder:
    """A folder of web shards: both splits, and one `dataset.json`."""

    def __init__(self, out: Path, overwrite: bool, max_bytes: int):
        self._out, self._overwrite, self._max_bytes = out, overwrite, max_bytes
        self._writers: dict[str, ShardWriter] = {}

    def check(self, splits: list[str]) -> None:
        """Can the folder be written? Raises UsageError."""
        if not self._out.name or (os.path.lexists(self._out) and not self._out.is_dir()):
            raise UsageError(f"OUT {self._out}: name a new folder for the shards")
        if self._out.is_dir() and any(self._out.iterdir()):
            _refuse_existing(self._out, self._overwrite)
            if not (self._out / DATASET).exists():
                raise UsageError(
                    f"OUT {self._out} has no {DATASET}: --overwrite replaces a folder of web "
                    f"shards, no other"
                )

    def writer(self, work: Path, name: str, split: Split, listing: Listing) -> Writer:
        """For one split."""
        (work / "shards").mkdir(exist_ok=True)
        self._writers[name] = ShardWriter(
            work / "shards",
            name,
            max_bytes=self._max_bytes,
            has_classes=bool(split.class_names),
        )
        return self._writers[name]

    def publish(self, work: Path, reports: dict[str, Report], settings: dict) -> dict[str, Path]:
        """Describe the shards in `dataset.json`, and move the folder to its name: returned."""
        contents = {}
        for name, report in reports.items():
            contents[name] = report.content(settings) | {"shards": self._writers[name].shards}
            classes = contents[name].pop("classes")  # the same for all: given once
        dataset = {
            "format": "webdataset",
            "format_version": 1,
            "num_images": sum(content["num_images"] for content in contents.values()),
            "num_classes": len(classes),
            "classes": classes,
            "splits": contents,
        }
        with atomic_file(work / "shards" / DATASET, overwrite=True) as file:
            file.write(json.dumps(dataset, indent=1).encode() + b"\n")
        self.check(list(reports))
        replaced = work / "replaced"  # goes with the work folder
        try:
            if self._out.exists():
                os.replace(self._out, replaced)
            os.replace(work / "shards", self._out)
        except BaseException:
            if replaced.exists() and not self._out.exists():
                os.replace(replaced, self._out)
            raise
        sync(self._out.parent)
        return dict.fromkeys(reports, self._out)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if os.path.lexists(out) and not overwrite:  # a link that leads nowhere is somebody's, too
        raise UsageError(f"OUT {out} exists; choose another name, or replace it with --overwrite")
