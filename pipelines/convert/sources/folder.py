"""Folders of images, sorted by name: labels and order of `torchvision.datasets.ImageFolder`."""

import os
from collections.abc import Iterator
from pathlib import Path

from pipelines.common.atomic import UNFINISHED
from pipelines.convert.jpeg import JPEG_EXTENSIONS
from pipelines.convert.manifest import Location, SourceError, SourceImage, Split
from pipelines.convert.sources.files import sorted_names

EXTENSIONS = JPEG_EXTENSIONS | {".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}
# Names of the splits in any case; of several folders for one split, the first name wins.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def is_named_like_image(name: str) -> bool:
    """Whether a file name has the extension of an image format."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def contains_images(top: Path) -> bool:
    """Whether any file below `top` is named like an image; stops at the first."""
    return any(
        is_named_like_image(entry.name) and entry.name[0] != "." and not is_folder(entry)
        for _, entry in _walk(top)
        if not isinstance(entry, str)
    )


def find_splits(source: Path) -> dict[str, Split]:
    """The splits of a folder with train/ and val/, else one split of the folder itself."""
    folders = _folders(source)
    named = _split_folders(folders)
    others = set(folders) - set(named.values())
    # train/ is a split beside val/, alone or beside only test/; beside other folders it is a class.
    if not named or (others and not {"train", "val"} <= named.keys()):
        return {"train": _split(source)}
    train = named.get("train") or named.get("val")  # val/ alone is trained on
    if train is None:
        raise SourceError(
            f"SOURCE {source} has only {named['test']}/: name that folder to convert its images"
        )
    splits = {"train": _split(source / train)}
    if "val" in named and named["val"] != train:
        splits["val"] = _split(source / named["val"], splits["train"].class_names)
    for name in sorted(set(folders) - {train, named.get("val")}):
        splits["train"].ignored[f"{name}/ beside {train}/"] += 1
    return splits


def _split_folders(folders: list[str]) -> dict[str, str]:
    """{"train": ..., "val": ..., "test": ...}: the folders that have names of splits."""
    found = {}
    for split, names in _SPLIT_NAMES.items():
        named = [folder for folder in folders if folder.lower() in names]
        if named:
            found[split] = min(named, key=lambda folder: (names.index(folder.lower()), folder))
    return found


def _split(root: Path, class_names: list[str] | None = None) -> Split:
    """The class folders if any contains an image, else the folder's images without classes."""
    folders = _folders(root)
    names = folders if class_names is None else class_names
    unknown = sorted(set(folders) - set(names))
    if unknown:
        raise SourceError(
            f"{root} has classes that train/ lacks: {', '.join(unknown[:5])} ({len(unknown)} in "
            f"all). Add them to train/, or convert the two folders one by one"
        )
    if not any(contains_images(root / name) for name in folders):
        if class_names and contains_images(root):
            raise SourceError(
                f"{root} has images but no class folders, unlike train/. Sort them into class "
                f"folders, or convert train/ alone"
            )
        names = []
    split = Split(root=root, class_names=names, images=())
    split.images = _images(split, set(folders))
    return split


def _images(split: Split, folders: set[str]) -> Iterator[SourceImage]:
    if not split.class_names:
        is_empty = True
        for image in _images_below(split, split.root, -1):
            is_empty = False
            yield image
        if is_empty:
            split.problems.append(("", "no " + " ".join(sorted(EXTENSIONS))))
    for label, name in enumerate(split.class_names):
        if name in folders:
            yield from _images_below(split, split.root / name, label)
    for entry in os.scandir(split.root) if split.class_names else ():
        if entry.name.startswith("."):
            split.ignored["hidden"] += 1
        elif is_named_like_image(entry.name) and not is_folder(entry):
            split.ignored["images beside the class folders"] += 1


def _images_below(split: Split, top: Path, label: int) -> Iterator[SourceImage]:
    """Image files below `top`, following links, sorted as in torchvision: by folder, then name."""
    prefix = len(os.fspath(split.root)) + 1
    for key in sorted_names(_sort_keys(split, top, prefix)):
        name = os.path.join(*key.split("\0"))
        yield SourceImage(name, label, Location(os.path.join(split.root, name)))


def _sort_keys(split: Split, top: Path, prefix: int) -> Iterator[str]:
    """Folder, NUL and name of every image, without the first `prefix` characters of the path."""
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
    """(folder, entry) of `top` and all folders below; for an unread folder, the reason."""
    parents = {*top.resolve().parents, *top.absolute().parents}
    seen = {_identity(folder) for folder in parents}
    pending = [os.fspath(top)]
    while pending:
        folder = pending.pop()
        try:
            identity = _identity(folder)
            if identity in seen:  # a link, perhaps a loop, which torchvision follows for long
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
    """Folders that may be classes; excludes the work folder of an OUT inside the source."""
    names = sorted(e.name for e in os.scandir(root) if is_folder(e) and e.name[0] != ".")
    return [name for name in names if not (root / name / UNFINISHED).exists()]


def is_folder(entry: os.DirEntry) -> bool:
    """Whether the entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
