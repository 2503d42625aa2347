"""The parts of one conversion, written with `--shard 1/4` to `--shard 4/4` and put into one folder.

They are joined in order if each exists once and all were converted from the same images with the
same settings: the result is what a single machine would have written.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from pipelines.convert.filters import DROPPED, NOT_SELECTED
from pipelines.convert.manifest import SourceError, Split
from pipelines.convert.pixels import PixelFlags
from pipelines.convert.sources import beton_file, shards
from pipelines.convert.sources.files import is_folder
from pipelines.convert.sources.splits import SourceOptions

# Equal in the reports of all parts.
COMMON_KEYS = ("listing", "max_side", "subset", "drop", "image_key", *asdict(PixelFlags()))
REQUIRED_KEYS = {*COMMON_KEYS, "part", "split", "checksum", "found"}


def has_parts(folder: Path) -> bool:
    """Whether the folder contains parts."""
    return any(True for _ in _parts(folder))


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """The joined splits. Raises SourceError, which names what is missing or different."""
    parts: dict[str, list[tuple[dict, Split]]] = {"train": [], "val": []}
    for report, split in _parts(source):
        parts[report["split"]].append((report, split))
    return {name: _join(source, found) for name, found in parts.items() if found}


def read_report(beton: Path) -> dict:
    """The report beside a `.beton`; empty without one. Raises SourceError."""
    path = beton.with_name(f"{beton.name}.json")
    try:
        report = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        raise SourceError(f"{path} is damaged: it is not JSON") from None
    return report if isinstance(report, dict) else {}


def _parts(folder: Path) -> Iterator[tuple[dict, Split]]:
    """Yield (report, images) of each split of every part in the folder."""
    with os.scandir(folder) as entries:  # iterdir would list millions of images in memory
        names = sorted(e.name for e in entries if e.name.endswith(".beton") or is_folder(e))
    for path in map(folder.joinpath, names):
        if path.suffix == ".beton":
            report = read_report(path)
            if _is_part(report):
                reader = beton_file.open_beton(path)
                if report["checksum"] != f"sha256:{reader.sha256()}":
                    raise SourceError(f"{path} is not the file that {path.name}.json describes")
                yield report, beton_file.read_split(reader)
        elif path.is_dir() and shards.has_dataset(path):
            dataset = shards.read_dataset(path)
            if all(map(_is_part, dataset["splits"].values())):
                splits = shards.dataset_splits(path, dataset)
                yield from ((report, splits[name]) for name, report in dataset["splits"].items())


def _is_part(report: dict) -> bool:
    return report.keys() >= REQUIRED_KEYS and report["part"][1] > 1


def _join(folder: Path, parts: list[tuple[dict, Split]]) -> Split:
    parts.sort(key=lambda part: part[0]["part"][0])
    report, split = parts[0]
    for other, other_split in parts[1:]:
        different = [key for key in COMMON_KEYS if other[key] != report[key]]
        if different or other_split.class_names != split.class_names:
            raise SourceError(
                f"{split.root} and {other_split.root} are not parts of one conversion: they differ "
                f"in {', '.join(different) or 'their classes'}"
            )
    numbers = [report["part"][0] for report, _ in parts]
    count = report["part"][1]
    if numbers != list(range(1, count + 1)) or any(r["part"][1] != count for r, _ in parts):
        raise SourceError(
            f"{folder} has parts {', '.join(map(str, numbers))} of {count}: each is needed once"
        )
    images = chain.from_iterable(part_split.images for _, part_split in parts)
    return Split(
        root=folder,
        class_names=split.class_names,
        images=images,
        max_side=0,
        ignored=_not_stored([report for report, _ in parts]),
    )


def _not_stored(reports: list[dict]) -> Counter[str]:
    """What the source of the parts had and none of them stored, by reason.

    Every part counts what was ignored while the source was listed, and the images of other parts as
    not selected.
    """
    ignored = Counter(reports[0]["ignored"])
    for report in reports:
        ignored |= Counter(report["ignored"])
    for reason in DROPPED.values():
        ignored[reason] = sum(report["ignored"].get(reason, 0) for report in reports)
    rejects = {reject["path"] for report in reports for reject in report["rejects"]}
    ignored["rejected in the parts, whose reports name them"] = len(rejects)
    num_stored = sum(report["num_images"] for report in reports)
    del ignored[NOT_SELECTED]
    ignored[NOT_SELECTED] = reports[0]["found"] - num_stored - ignored.total()
    return +ignored
