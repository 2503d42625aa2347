"""What can be converted: folders of images, listed as torchvision lists them.

Class folders sorted by name, files sorted within them, so labels and order are those of
`torchvision.datasets.ImageFolder`. What becomes of each file is `pipelines.images`' business.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

JPEG_EXTENSIONS = {".jpg", ".jpeg"}
EXTENSIONS = JPEG_EXTENSIONS | {".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}


class SourceError(ValueError):
    """The folder cannot be converted as it is; the message says what to do."""


@dataclass(kw_only=True, slots=True)
class Split:
    """One folder that becomes one file: `paths[i]`, relative to `root`, has class `labels[i]`."""

    root: Path
    class_names: list[str]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # -1: no class
    ignored: Counter[str] = field(default_factory=Counter)  # reason -> number of entries
    problems: list[tuple[str, str]] = field(default_factory=list)  # (folder, why it was not read)

    def keep(self, count: int) -> None:
        """Keep `count` images, the first ones of every class, evenly over the classes."""
        seen: Counter[int] = Counter()
        turns = []  # (how many of its class come before it, index)
        for index, label in enumerate(self.labels):
            turns.append((seen[label], index))
            seen[label] += 1
        kept = sorted(index for _, index in sorted(turns)[:count])
        self.paths = [self.paths[index] for index in kept]
        self.labels = [self.labels[index] for index in kept]


def find_splits(source: Path) -> dict[str, Split]:
    """{"train": ..., "val": ...} of a folder with such folders, else {"train": the folder itself}.

    `val` has the classes of `train`, so a label means the same in both.
    Raises SourceError.
    """
    if not source.is_dir():
        state = "is not a folder" if source.exists() else "does not exist"
        raise SourceError(f"SOURCE {source} {state}: give the folder that holds the images")
    try:
        folders = set(_folders(source))
        others = folders - {"train", "val"}
        # Beside val/, train/ is a split; alone or with test/ too; beside other folders, a class.
        if "train" not in folders or ("val" not in folders and others - {"test"}):
            return {"train": _list_split(source)}
        splits = {"train": _list_split(source / "train")}
        if "val" in folders:
            splits["val"] = _list_split(source / "val", splits["train"].class_names)
        for name in sorted(others):
            splits["train"].ignored[f"{name}/ beside train/"] += 1
    except OSError as error:
        raise SourceError(f"SOURCE {source} cannot be listed: {error}") from None
    return splits


def _list_split(root: Path, class_names: list[str] | None = None) -> Split:
    """Class folders, if any of them holds an image; else the folder's images, without classes."""
    folders = _folders(root)
    split = Split(root=root, class_names=folders if class_names is None else class_names)
    unknown = sorted(set(folders) - set(split.class_names))
    if unknown:
        raise SourceError(
            f"{root} has classes that train/ lacks: {', '.join(unknown[:5])} ({len(unknown)} in "
            f"all). Add them to train/, or convert the two folders one by one"
        )
    for label, name in enumerate(split.class_names):
        if name in folders:
            _add_images(split, root / name, label)
    if not split.paths:
        split.class_names = []
        _add_images(split, root, -1)
    if not split.paths:
        reason = split.problems[0][1] if split.problems else "no " + " ".join(sorted(EXTENSIONS))
        raise SourceError(f"{root} has no images that can be read ({reason})")
    if split.class_names:
        loose = [e for e in os.scandir(root) if _is_named_like_image(e) and not _is_folder(e)]
        split.ignored["images beside the class folders"] += len(loose)
    if class_names and not split.class_names:
        raise SourceError(
            f"{root} has images but no class folders, unlike train/. Sort them into class folders, "
            f"or convert train/ alone"
        )
    return split


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(root) if _is_folder(e) and e.name[0] != ".")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_named_like_image(entry: os.DirEntry) -> bool:
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS


def _add_images(split: Split, top: Path, label: int) -> None:
    """Image files below `top`, links followed, in torchvision's order: by folder, then by name.

    Links can form loops: a folder that contains `top`, or was listed below it already, is not
    entered (torchvision goes round until the path is too long).
    """
    above = {*top.resolve().parents, *top.absolute().parents}
    seen = {_identity(folder) for folder in above}
    files: dict[str, list[str]] = {}
    pending = [os.fspath(top)]
    while pending:
        folder = pending.pop()
        try:
            identity = _identity(folder)
            entries = [] if identity in seen else list(os.scandir(folder))
        except OSError as error:
            reason = f"folder not readable: {error.strerror}"
            split.problems.append((os.path.relpath(folder, split.root), reason))
            continue
        split.ignored["links to a folder listed already"] += identity in seen
        seen.add(identity)
        files[folder] = []
        for entry in entries:
            if entry.name.startswith("."):
                split.ignored["hidden"] += 1
            elif _is_folder(entry):
                pending.append(entry.path)
            elif _is_named_like_image(entry):
                files[folder].append(entry.name)
            else:
                split.ignored["not named like an image"] += 1
    prefix = len(os.fspath(split.root)) + 1
    for folder in sorted(files):
        paths = [os.path.join(folder, name)[prefix:] for name in sorted(files[folder])]
        split.paths += paths
        split.labels += [label] * len(paths)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
