"""Folders of images, listed as torchvision lists them.

Class folders sorted by name, files sorted within them, so labels and order are those of
`torchvision.datasets.ImageFolder`. What becomes of each file is `pipelines.convert.jpeg`' business.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.atomic import UNFINISHED
from pipelines.convert.jpeg import JPEG_EXTENSIONS
from pipelines.convert.manifest import Image, Place, SourceError, Split
from pipelines.convert.sources.sorting import sorted_names

EXTENSIONS = JPEG_EXTENSIONS | {".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
# What data sets call their parts, in any case; of several names for one, the first counts.
_NAMES_OF_PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def is_named_like_image(name: str) -> bool:
    """By its extension."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def holds_images(top: Path) -> bool:
    """Is there anything below that is named like an image? Looks no further than the first."""
    return any(
        is_named_like_image(entry.name) and entry.name[0] != "." and not is_folder(entry)
        for _, entry in _walk(top)
        if not isinstance(entry, str)
    )


def find_splits(source: Path) -> dict[str, Split]:
    """The splits of a folder with train/ and val/, else one of the folder itself."""
    folders = _folders(source)
    parts = _parts(folders)
    others = set(folders) - set(parts.values())
    # Beside val/, train/ is a split; alone or with test/ too; beside other folders, a class.
    if not parts or (others and not {"train", "val"} <= parts.keys()):
        return {"train": _split(source)}
    first = parts.get("train") or parts.get("val")  # given alone, val/ is what is wanted
    if first is None:
        raise SourceError(
            f"SOURCE {source} has {parts['test']}/ alone: name that folder, if you mean its images"
        )
    splits = {"train": _split(source / first)}
    if "val" in parts and parts["val"] != first:
        splits["val"] = _split(source / parts["val"], splits["train"].class_names)
    for name in sorted(set(folders) - {first, parts.get("val")}):
        splits["train"].ignored[f"{name}/ beside {first}/"] += 1
    return splits


def _parts(folders: list[str]) -> dict[str, str]:
    """{"train": ..., "val": ..., "test": ...}: the folders that are named like these."""
    found = {}
    for part, names in _NAMES_OF_PARTS.items():
        named = [folder for folder in folders if folder.lower() in names]
        if named:
            found[part] = min(named, key=lambda folder: (names.index(folder.lower()), folder))
    return found


def _split(root: Path, class_names: list[str] | None = None) -> Split:
    """Class folders, if any of them holds an image; else the folder's images, without classes."""
    folders = _folders(root)
    names = folders if class_names is None else class_names
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise SourceError(
            f"{root} has classes that train/ lacks: {', '.join(unknown[:5])} ({len(unknown)} in "
            f"all). Add them to train/, or convert the two folders one by one"
        )
    if not any(holds_images(root / name) for name in folders):
        if class_names and holds_images(root):
            raise SourceError(
                f"{root} has images but no class folders, unlike train/. Sort them into class "
                f"folders, or convert train/ alone"
            )
        names = []
    split = Split(root=root, class_names=names, images=())
    split.images = _images(split, set(folders))
    return split


def _images(split: Split, folders: set[str]) -> Iterator[Image]:
    if not split.class_names:
        image = None
        for image in _images_below(split, split.root, -1):
            yield image
        if image is None:
            split.problems.append(("", "no " + " ".join(sorted(EXTENSIONS))))
    for label, name in enumerate(split.class_names):
        if name in folders:
            yield from _images_below(split, split.root / name, label)
    for entry in os.scandir(split.root) if split.class_names else ():
        if entry.name.startswith("."):
            split.ignored["hidden"] += 1
        elif is_named_like_image(entry.name) and not is_folder(entry):
            split.ignored["images beside the class folders"] += 1


def _images_below(split: Split, top: Path, label: int) -> Iterator[Image]:
    """Image files below `top`, links followed, in torchvision's order: by folder, then by name."""
    prefix = len(os.fspath(split.root)) + 1
    for key in sorted_names(_sort_keys(split, top, prefix)):
        name = os.path.join(*key.split("\0"))
        yield Image(name, label, Place(os.path.join(split.root, name)))


def _sort_keys(split: Split, top: Path, prefix: int) -> Iterator[str]:
    """Folder, NUL and name of every image, from character `prefix` of the path on."""
    for folder, entry in _walk(top):
        if isinstance(entry, str):
            if entry:
                split.problems.append((folder[prefix:], entry))
            else:
                split.ignored["links to a folder listed already"] += 1
        elif entry.name.startswith("."):
            split.ignored["hidden"] += 1
        elif not is_folder(entry):
            if is_named_like_image(entry.name):
                yield f"{folder[prefix:]}\0{entry.name}"
            else:
                split.ignored["not named like an image"] += 1


def _walk(top: Path) -> Iterator[tuple[str, os.DirEntry | str]]:
    """(folder, entry in it) of `top` and all below; a text says why a folder was not entered.

    Links can form loops: a folder that contains `top`, or was entered already, is passed over with
    an empty text (torchvision goes round until the path is too long).
    """
    above = {*top.resolve().parents, *top.absolute().parents}
    seen = {_identity(folder) for folder in above}
    pending = [os.fspath(top)]
    while pending:
        folder = pending.pop()
        try:
            identity = _identity(folder)
            if identity in seen:
                yield folder, ""
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    yield folder, entry
                    if entry.name[0] != "." and is_folder(entry):
                        pending.append(entry.path)
        except OSError as error:
            yield folder, f"folder not readable: {error.strerror}"


def _folders(root: Path) -> list[str]:
    """Those that may be classes; OUT may lie beside them and be unfinished."""
    names = sorted(e.name for e in os.scandir(root) if is_folder(e) and e.name[0] != ".")
    return [name for name in names if not (root / name / UNFINISHED).exists()]


def is_folder(entry: os.DirEntry) -> bool:
    """Or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
