"""What can be converted. Whatever it is, it becomes a `Split` for train, and one for val or none.

| SOURCE | read by |
|---|---|
| folder of class folders, of images, or with `train/` and `val/` | `folder.py` |
| `.txt` with a path and a label in each line | `image_list.py` |
| `ILSVRC2012_img_train.tar` and `..._val.tar`, or their folder | `ilsvrc.py` |
| `.tar` web shards, or their folder | `shards.py` |
| `.parquet` of the Hugging Face hub, or their folder | `parquet.py` |
| `.beton` | `beton_file.py` |
| folder of what `--shard 1/4`, `2/4` and so on wrote | `parts.py` |

Labels are those of an image folder: numbers of the class names in sorted order. A source that
numbers its classes itself keeps its numbers.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.convert.manifest import SourceError, Split
from pipelines.convert.sources import beton_file, folder, ilsvrc, image_list, parquet, parts, shards


def find_splits(source: Path, labels: Path | None = None) -> dict[str, Split]:
    """{"train": ...} or {"train": ..., "val": ...} of whatever `source` is.

    `val` has the classes of `train`, so a label means the same in both. `labels` says the classes
    of ILSVRC2012's validation images. Raises SourceError.
    """
    try:
        find = _finder(source)
        if labels is not None and find is not ilsvrc.find_splits:
            raise SourceError(f"--labels {labels}: only ILSVRC2012_img_val.tar needs it")
        return ilsvrc.find_splits(source, labels) if labels else find(source)
    except OSError as error:
        raise SourceError(f"SOURCE {source} cannot be read: {error}") from None


def _finder(source: Path):
    if source.is_dir():
        return _finder_of_folder(source)
    if not source.exists():
        raise SourceError(f"SOURCE {source} does not exist")
    if source.suffix == ".tar":
        return ilsvrc.find_splits if ilsvrc.is_archive(source) else shards.find_splits
    finders_of_files = {
        ".beton": beton_file.find_splits,
        ".parquet": parquet.find_splits,
        ".txt": image_list.find_splits,
    }
    if source.suffix not in finders_of_files:
        known = " ".join([".tar", *finders_of_files])
        raise SourceError(f"SOURCE {source} is neither a folder nor one of {known}")
    return finders_of_files[source.suffix]


def _finder_of_folder(source: Path):
    if shards.is_ours(source):
        return shards.find_splits
    if parts.is_here(source):
        return parts.find_splits
    packed = [s for s in (".tar", ".parquet") if any(_files_here(source, s))]
    if folder.holds_images(source):
        if packed and not (source / "train").is_dir():
            raise SourceError(
                f"SOURCE {source} has both images and {packed[0]} files: name the folder or the "
                f"file that you mean"
            )
        return folder.find_splits
    if ilsvrc.is_here(source):
        return ilsvrc.find_splits
    if any(source.rglob("*.parquet")):
        return parquet.find_splits
    return shards.find_splits if any(source.rglob("*.tar")) else folder.find_splits


def _files_here(source: Path, suffix: str) -> Iterator[str]:
    """Files with this ending in the folder or in data/, where the hub has them."""
    for place in (source, source / "data"):
        if place.is_dir():
            with os.scandir(place) as entries:
                yield from (entry.name for entry in entries if entry.name.endswith(suffix))
