"""Folders of images, sorted by name: labels and order of `torchvision.datasets.ImageFolder`.

Images without class folders get their labels from `metadata.csv` or `metadata.jsonl`, as on the
Hugging Face hub: a row has the image's `file_name` and its `label`.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.convert.jpeg import IMAGE_EXTENSIONS
from pipelines.convert.manifest import FoundImage, Label, Location, SourceError, Split, parse_label
from pipelines.convert.sources.files import files_below, folders_in, is_folder, is_hidden, walk
from pipelines.convert.sources.labels import SPLIT_COLUMNS, TABLES, add_hint, label_key
from pipelines.convert.sources.splits import (
    SourceOptions,
    check_split_column,
    place,
    some,
    splits_of_folder,
)

METADATA = ("metadata.csv", "metadata.jsonl")
LABELS_OF_IMAGES = (".cls", ".json", ".mat", ".txt", ".xml")  # endings of files beside images


def is_named_like_image(name: str) -> bool:
    """Whether a file name has the extension of an image format."""
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def image_entries(top: Path) -> Iterator[os.DirEntry]:
    """The files below `top` that are named like images."""
    return (entry for entry in files_below(top) if is_named_like_image(entry.name))


def _holds_images(folder: Path) -> bool:
    """Whether images lie directly in the folder."""
    entries = [entry for entry in os.scandir(folder) if is_named_like_image(entry.name)]
    return any(entry.name[0] != "." and not is_folder(entry) for entry in entries)


def contains_images(top: Path) -> bool:
    """Whether any file below `top` is named like an image; stops at the first."""
    return any(True for _ in image_entries(top))


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """The splits of a folder with train/ and val/, else one split of the folder itself.

    train/ beside other folders, but neither val/ nor test/, is a class.
    """
    folders = folders_in(source)
    patterns = options.train is not None or options.val is not None
    if not patterns and (options.all_train or not any(map(splits_of_folder, folders))):
        return {"train": _split(source, [source], options)}
    with_images = [name for name in folders if contains_images(source / name)]
    placement = place(source, with_images, options, splits_of_folder)
    of_train = placement.splits["train"]
    only_train = not patterns and len(placement.splits) == 1 and not placement.left_out
    named = [name for name in of_train if splits_of_folder(name)]
    if only_train and len(named) < len(of_train):  # classes, one of them named train
        if others := [name for name in named if not _holds_images(source / name)]:
            raise SourceError(
                f"{source} has class folders in {others[0]}/, but other folders beside it: state"
                f" the split with --train {others[0]}, or take all as classes with --all-train"
            )
        return {"train": _split(source, [source], options)}
    if len(of_train) > 1 and any(_holds_images(source / name) for name in of_train):
        raise SourceError(
            f"{source} has images in several folders named like the training split"
            f" ({', '.join(of_train[:5])}): take all as classes with --all-train, or"
            f" name one with --train {of_train[0]}"
        )
    splits = {}
    for name, names in placement.splits.items():
        splits[name] = _split(source, [source / folder for folder in names], options)
        if len(names) > 1:
            splits[name].warnings[f"from several folders: {some(names)}"] = None
    train, val = splits["train"], splits.get("val")
    if val is not None and train.class_names and not val.class_names:
        raise SourceError(
            f"{val.root} has images but no class folders, unlike {train.root.name}/. Sort them"
            f" into class folders, or convert {train.root.name}/ alone"
        )
    for reason, names in placement.left_out.items():
        train.ignored[reason] += sum(1 for name in names for _ in image_entries(source / name))
    for entry in os.scandir(source):
        if entry.name in METADATA:
            hint = f"{entry.name} beside {of_train[0]}/: one is needed in each folder"
            train.unused[hint] = None
        if entry.name not in with_images and not is_hidden(entry.name):
            _name_table(train, entry)
            train.ignored[f"beside {of_train[0]}/"] += 1
    return splits


def _split(source: Path, tops: Sequence[Path], options: SourceOptions) -> Split:
    """The class folders of `tops` if any contains an image, else their images without classes."""
    root = tops[0] if len(tops) == 1 else source
    classes = sorted({name for top in tops for name in folders_in(top)})
    if options.label_key or not any(contains_images(top / c) for top in tops for c in classes):
        classes = []
    if len(classes) == 1 and len(tops) == 1 and tops[0] != source and splits_of_folder(classes[0]):
        inner = tops[0] / classes[0]
        raise SourceError(f"{tops[0]} contains only the split {classes[0]}/: name it, {inner}")
    split = Split(root=root, class_names=classes or None)
    if classes:
        split.images = _images_in_classes(split, tops, classes, options)
    else:
        is_unsplit = tops == [source] and not options.all_train  # no folder states the split
        split.images = _images_without_classes(split, tops, options.label_key, is_unsplit)
    return split


def _images_in_classes(
    split: Split, tops: Sequence[Path], classes: list[str], options: SourceOptions
) -> Iterator[FoundImage]:
    for folder in (top / name for name in classes for top in tops):
        if folder.is_dir():
            nested = set[str]()
            yield from _images_below(split, folder, folder.name, nested)
            if len(nested) > 1 and not options.all_train:
                raise SourceError(
                    f"{folder} has splits of its own: name it as SOURCE, or train on"
                    " everything with --all-train, which makes it a class"
                )
    for entry in (entry for top in tops for entry in os.scandir(top)):
        if is_hidden(entry.name):
            split.ignored["hidden"] += 1
        elif entry.name in METADATA:
            split.ignored["files beside the class folders"] += 1
            split.unused[f"{entry.name}, because class folders count: --label-key COLUMN"] = None
        elif not is_folder(entry):
            _name_table(split, entry)
            kind = "images" if is_named_like_image(entry.name) else "files"
            split.ignored[f"{kind} beside the class folders"] += 1
    if count := split.ignored["images beside the class folders"]:
        split.warnings[f"images beside the class folders, left out: {count:,}"] = None


def _images_without_classes(
    split: Split, tops: Sequence[Path], requested: str | None, is_unsplit: bool
) -> Iterator[FoundImage]:
    """All images, with the labels of the metadata. requested: value of --label-key."""
    stated: set[frozenset[str]] = set()  # the splits that the names of the images state
    for top in tops:
        labels = _metadata(split, top, requested, is_unsplit)
        for image in _images_below(split, top, None, set()):
            stated.add(frozenset(splits_of_folder(os.path.basename(image.name))))
            if labels:
                name = os.path.relpath(image.location.path, top)
                image = image._replace(label=labels.pop(name, None))
            yield image
        for name in labels:
            split.problems.append((name, f"in the metadata of {top.name}/, but no such image"))
    if is_unsplit and len(set().union(*stated)) > 1:
        if all(stated):
            raise SourceError(
                f"{split.root} has images whose names state different splits: sort them into"
                " folders, or train on all with --all-train"
            )
        split.warnings["names of some images state different splits, which is not used"] = None
    if not stated:
        split.problems.append(("", "no " + " ".join(sorted(IMAGE_EXTENSIONS))))


def _metadata(split: Split, top: Path, requested: str | None, is_unsplit: bool) -> dict[str, Label]:
    """{file name: label} of `top`; empty without metadata."""
    found = [top / name for name in METADATA if (top / name).is_file()]
    if len(found) > 1:
        raise SourceError(f"{top} has both {' and '.join(METADATA)}: move one away")
    if not found:
        if requested:
            raise SourceError(f"--label-key {requested}: {top} has no {METADATA[0]}")
        return {}
    path = found[0]
    labels: dict[str, Label] = {}
    number = 1
    try:
        names = dict.fromkeys(name for row in _rows(path) for name in row)
        if "file_name" not in names:
            raise KeyError("file_name")
        for name in SPLIT_COLUMNS if is_unsplit else ():
            check_split_column(split, path, name, (row.get(name) for row in _rows(path)))
        columns = [name for name in names if name != "file_name"]
        key = label_key(names, requested, path, split.unused, candidates=columns)
        for row in _rows(path) if key is not None else ():
            name, label = os.path.normpath(row["file_name"]), parse_label(row.get(key))
            if labels.setdefault(name, label) != label:
                raise ValueError(f"{name} has two labels, {labels[name]} and {label}")
            number += 1
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SourceError(f"{path}, image {number}: {what}") from None
    return labels


def _rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = csv.DictReader(file)
            for row in rows:
                if any(row.pop(None, ())):  # type: ignore[call-overload]
                    raise SourceError(f"{path}, line {rows.line_num}: more cells than the title")
                yield row
        else:
            yield from (json.loads(line) for line in file if line.strip())


def _images_below(split: Split, top: Path, label: Label, nested: set[str]) -> Iterator[FoundImage]:
    """Image files below `top`, following links, sorted as in torchvision: by folder, then name.

    nested: gets the splits that are names of folders below `top`.
    """
    prefix = len(os.path.join(split.root, ""))
    keys = []  # folder, NUL and name of every image
    for folder, entry in walk(top):
        if isinstance(entry, str):
            if entry:
                split.problems.append((folder[prefix:], entry))
            else:
                split.ignored["links to a folder listed already"] += 1
        elif is_hidden(entry.name):
            split.ignored["hidden"] += 1
        elif is_folder(entry):
            nested |= splits_of_folder(entry.name)
        elif is_named_like_image(entry.name):
            keys.append(f"{folder[prefix:]}\0{entry.name}")
        else:
            _name_table(split, entry)
            split.ignored["not named like an image"] += 1
    for key in sorted(keys):
        name = os.path.join(*key.split("\0"))
        yield FoundImage(name, label, Location(os.path.join(split.root, name)))


def _name_table(split: Split, entry: os.DirEntry) -> None:
    """Add a file that may contain labels, but is not METADATA, to the labels that are not used."""
    name, ending = entry.name, os.path.splitext(entry.name)[1].lower()
    endings = TABLES if split.class_names else (*TABLES, *LABELS_OF_IMAGES)
    if ending in endings and name not in METADATA:
        way = f"only {METADATA[0]} beside the images, with file_name and label, is read"
        flag = ", with --label-key" if split.class_names else ""
        add_hint(split.unused, f"{ending} files", f", first {name}: {way}{flag}")
