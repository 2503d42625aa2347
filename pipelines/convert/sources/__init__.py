"""Sources of images. Each is described by a `Split` for train and, where it has one, for val.

| SOURCE | read by |
|---|---|
| folder of class folders, of images, or with `train/` and `val/` | `folder.py` |
| `.txt` with a path and a label in each line | `image_list.py` |
| `ILSVRC2012_img_train.tar` and `..._val.tar`, or their folder | `ilsvrc.py` |
| `.tar` web shards, or their folder | `shards.py` |
| `.parquet` of the Hugging Face hub, or their folder | `parquet.py` |
| `.beton` | `beton_file.py` |
| folder of the outputs of `--shard 1/4`, `2/4` and so on | `parts.py` |

Labels are those of an image folder: indices of the sorted class names. A source with numbered
classes keeps its numbers.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.convert.manifest import SourceError, Split
from pipelines.convert.sources import beton_file, folder, ilsvrc, image_list, parquet, parts, shards

Finder = Callable[[Path], dict[str, Split]]


def find_splits(source: Path, labels: Path | None = None) -> dict[str, Split]:
    """Returns {"train": ...} or {"train": ..., "val": ...}, whatever the format of `source`.

    `val` has the classes of `train`, so a label means the same in both. `labels` is a file with the
    classes of ILSVRC2012's validation images. Raises SourceError.
    """
    try:
        find = _finder(source)
        if labels is not None and find is not ilsvrc.find_splits:
            raise SourceError(f"--labels {labels}: only ILSVRC2012_img_val.tar needs it")
        return ilsvrc.find_splits(source, labels) if labels else find(source)
    except OSError as error:
        raise SourceError(f"SOURCE {source} cannot be read: {error}") from None


def _finder(source: Path) -> Finder:
    if source.is_dir():
        return _finder_of_folder(source)
    if not source.exists():
        raise SourceError(f"SOURCE {source} does not exist")
    if source.suffix == ".tar":
        return ilsvrc.find_splits if ilsvrc.is_archive(source) else shards.find_splits
    finders: dict[str, Finder] = {
        ".beton": beton_file.find_splits,
        ".parquet": parquet.find_splits,
        ".txt": image_list.find_splits,
    }
    if source.suffix not in finders:
        known = " ".join([".tar", *finders])
        raise SourceError(f"SOURCE {source} is neither a folder nor one of {known}")
    return finders[source.suffix]


def _finder_of_folder(source: Path) -> Finder:
    if shards.has_dataset(source):
        return shards.find_splits
    if parts.has_parts(source):
        return parts.find_splits
    archives = [s for s in (".tar", ".parquet") if any(_find_files(source, s))]
    if folder.contains_images(source):
        if archives and not (source / "train").is_dir():
            raise SourceError(
                f"SOURCE {source} has both images and {archives[0]} files: name the folder or "
                f"the file to convert"
            )
        return folder.find_splits
    if ilsvrc.has_archive(source):
        return ilsvrc.find_splits
    if any(source.rglob("*.parquet")):
        return parquet.find_splits
    return shards.find_splits if any(source.rglob("*.tar")) else folder.find_splits


def _find_files(source: Path, suffix: str) -> Iterator[str]:
    """Files with this ending in the folder or in data/, where the hub stores them."""
    for folder_path in (source, source / "data"):
        if folder_path.is_dir():
            with os.scandir(folder_path) as entries:
                yield from (entry.name for entry in entries if entry.name.endswith(suffix))
