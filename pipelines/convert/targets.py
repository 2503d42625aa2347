"""The two output formats of a conversion: names of the files, and how they appear together.

All files are written in the conversion's work folder and moved when all of them are complete.
"""

import json
import os
from pathlib import Path

from pipelines.beton.layout import VERSION
from pipelines.beton.writer import BetonWriter
from pipelines.common.atomic import move_together, refuse_existing, write_text
from pipelines.convert.data_report import Report
from pipelines.convert.sources.beton_file import val_path
from pipelines.webdataset.writer import DATASET, ShardWriter

Writer = BetonWriter | ShardWriter


class UsageError(ValueError):
    """The command cannot be carried out as given; the message states what to change."""


class BetonTarget:
    """`out.beton`, for validation images `out.val.beton`, a report beside each, and `page`."""

    def __init__(self, out: Path, overwrite: bool):
        self._out, self._overwrite = out, overwrite
        self.page = out.with_suffix(".report.html")

    def check(self, splits: list[str]) -> None:
        """Check that the files can be written. Raises UsageError, OutputExists."""
        if self._out.is_dir():
            example = self._out / "out.beton"
            raise UsageError(f"OUT {self._out} is a folder; name a file, for example {example}")
        if self._out.suffix != ".beton":
            raise UsageError(f"OUT {self._out} must end in .beton")
        for path in reversed(self._files(splits).values()):  # first OUT itself
            refuse_existing(path, self._overwrite)
        if "val" not in splits and os.path.lexists(self._path("val")):
            raise UsageError(
                f"{self._path('val')} is left from another conversion, but would be read as the "
                f"held-out images of {self._out}: remove it or choose another OUT"
            )

    def writer(self, work: Path, report: Report) -> BetonWriter:
        """Create the writer of one split."""
        return BetonWriter(
            work / f"{report.name}.beton",
            num_samples=len(report.manifest),
            class_names=report.manifest.class_names,
            in_place=True,
        )

    def publish(
        self, work: Path, reports: dict[str, Report], settings: dict, page: str
    ) -> dict[str, Path]:
        """Write the reports and move all files to their names; returns those of the images."""
        for name, report in reports.items():
            content = {"format": "beton", "format_version": VERSION, **report.content(settings)}
            write_text(
                work / f"{name}.beton.json", json.dumps(content, indent=1) + "\n", overwrite=True
            )
        write_text(work / "report.html", page, overwrite=True)
        self.check([*reports])
        move_together((work / name, path) for name, path in self._files([*reports]).items())
        return {name: self._path(name) for name in reports}

    def _files(self, splits: list[str]) -> dict[str, Path]:
        """Names in the work folder: final paths, those that readers open last."""
        paths = {name: self._path(name) for name in reversed(splits)}
        reports = {f"{n}.beton.json": p.with_name(f"{p.name}.json") for n, p in paths.items()}
        return {"report.html": self.page, **reports, **{f"{n}.beton": p for n, p in paths.items()}}

    def _path(self, name: str) -> Path:
        return self._out if name == "train" else val_path(self._out)


class ShardTarget:
    """A folder with the web shards of both splits, one `dataset.json` and `page`."""

    def __init__(self, out: Path, overwrite: bool, max_bytes: int):
        self._out, self._overwrite, self._max_bytes = out, overwrite, max_bytes
        self._writers: dict[str, ShardWriter] = {}
        self.page = out / "report.html"

    def check(self, splits: list[str]) -> None:
        """Check that the folder can be written. Raises UsageError, OutputExists."""
        if not self._out.name or (os.path.lexists(self._out) and not self._out.is_dir()):
            raise UsageError(f"OUT {self._out}: name a new folder for the shards")
        if self._out.is_dir() and any(self._out.iterdir()):
            refuse_existing(self._out, self._overwrite)
            if not (self._out / DATASET).exists():
                raise UsageError(
                    f"OUT {self._out} has no {DATASET}: --overwrite replaces only web shards"
                )

    def writer(self, work: Path, report: Report) -> ShardWriter:
        """Create the writer of one split."""
        (work / "shards").mkdir(exist_ok=True)
        self._writers[report.name] = ShardWriter(
            work / "shards",
            report.name,
            max_bytes=self._max_bytes,
            has_classes=bool(report.manifest.class_names),
        )
        return self._writers[report.name]

    def publish(
        self, work: Path, reports: dict[str, Report], settings: dict, page: str
    ) -> dict[str, Path]:
        """Write `dataset.json` and move the folder to its name; returns it for every split."""
        contents = {name: report.content(settings) for name, report in reports.items()}
        for name, content in contents.items():
            del content["classes"]  # equal in all splits, so stored once
            content["shards"] = self._writers[name].shards
        class_names = reports["train"].manifest.class_names
        dataset = {
            "format": "webdataset",
            "format_version": 1,
            "num_images": sum(content["num_images"] for content in contents.values()),
            "num_classes": len(class_names),
            "classes": class_names,
            "splits": contents,
        }
        write_text(work / "shards" / DATASET, json.dumps(dataset, indent=1) + "\n", overwrite=True)
        write_text(work / "shards" / self.page.name, page, overwrite=True)
        self.check([*reports])
        moves = [(work / "shards", self._out)]
        if self._out.exists():
            moves.insert(0, (self._out, work / "replaced"))  # removed with the work folder
        move_together(moves)
        return dict.fromkeys(reports, self._out)
