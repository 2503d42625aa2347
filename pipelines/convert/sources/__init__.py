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

Labels are numbers, which are kept, or names, which are numbered in sorted order as in an image
folder. `splits.py` states how files and folders are placed into the splits.
"""

import difflib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from pipelines.convert.manifest import SourceError, Split
from pipelines.convert.sources import beton_file, folder, ilsvrc, image_list, parquet, parts, shards
from pipelines.convert.sources.files import PACKED, find_files, refuse_compressed
from pipelines.convert.sources.splits import SourceOptions

Finder = Callable[[Path, SourceOptions], dict[str, Split]]

_PLACING = {"train", "val", "all_train"}
_OPTIONS: dict[Finder, set[str]] = {  # those that a source uses
    folder.find_splits: {*_PLACING, "label_key"},
    ilsvrc.find_splits: {"labels"},
    parquet.find_splits: {*_PLACING, "image_key", "label_key"},
    shards.find_splits: {*_PLACING, "image_key", "label_key"},
}
_FINDERS: dict[str, Finder] = {
    ".tar": shards.find_splits,
    ".beton": beton_file.find_splits,
    ".parquet": parquet.find_splits,
    ".txt": image_list.find_splits,
}


def find_splits(source: Path, options: SourceOptions | None = None) -> dict[str, Split]:
    """Returns {"train": ...} or {"train": ..., "val": ...}, whatever the format of `source`.

    Raises SourceError, also for an option that the source does not use.
    """
    options = options or SourceOptions()
    try:
        source = _snapshot(source)
        find = _finder(source)
        used = _OPTIONS.get(find, set()) - (set() if source.is_dir() else {"train", "val"})
        for field in fields(options):
            if getattr(options, field.name) != field.default and field.name not in used:
                flag = f"--{field.name.replace('_', '-')}"
                raise SourceError(f"{flag} does not apply to SOURCE {source}; leave it out")
        return find(source, options)
    except OSError as error:
        raise SourceError(f"SOURCE {source} cannot be read: {error}") from None


def _snapshot(source: Path) -> Path:
    """The one revision in a folder of the Hugging Face hub's cache; any other source itself."""
    snapshots = source / "snapshots"
    if not (snapshots.is_dir() and (source / "blobs").is_dir()):
        return source
    revisions = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(revisions) != 1:
        names = ", ".join(path.name for path in revisions)
        raise SourceError(f"SOURCE {source} has {len(revisions)} revisions ({names}): name one")
    return revisions[0]


def _finder(source: Path) -> Finder:
    if source.is_dir():
        return _finder_of_folder(source)
    if not source.exists():
        names = [path.name for path in source.parent.glob("*")]
        near = difflib.get_close_matches(source.name, names, n=1)
        advice = f"; perhaps you meant {source.with_name(near[0])}" if near else ""
        raise SourceError(f"SOURCE {source} does not exist{advice}")
    if source.suffix not in _FINDERS:
        refuse_compressed(source)
        known = " ".join(_FINDERS)
        advice = "; of an image, give the folder" if folder.is_named_like_image(source.name) else ""
        raise SourceError(f"SOURCE {source} is neither a folder nor one of {known}{advice}")
    if source.suffix == ".tar" and ilsvrc.is_archive(source):
        return ilsvrc.find_splits
    return _FINDERS[source.suffix]


def _finder_of_folder(source: Path) -> Finder:
    if shards.has_dataset(source):
        return shards.find_splits
    if parts.has_parts(source):
        return parts.find_splits
    has_images = folder.contains_images(source)
    if ilsvrc.has_archive(source) and not has_images:
        return ilsvrc.find_splits
    archives = find_files(source, (".parquet", ".tar", *PACKED))
    kinds = [
        kind for kind in (".parquet", ".tar") if any(a.lower().endswith(kind) for a in archives)
    ]
    if has_images:
        if kinds and not folder.contains_images(source / "train"):
            raise SourceError(
                f"SOURCE {source} has both images and {kinds[0]} files: name a folder or file of"
                " one kind, or move the others away"
            )
        return folder.find_splits
    if len(kinds) > 1:
        raise SourceError(f"SOURCE {source} has both .parquet and .tar files: name one to convert")
    if kinds:
        return _FINDERS[kinds[0]]
    for packed in archives:
        refuse_compressed(source / packed)
    return folder.find_splits
