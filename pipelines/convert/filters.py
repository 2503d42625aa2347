"""Which images are converted: by lists of names and classes, and by their bytes and pixels.

Lists apply while a source is listed, `--drop` while images are written; both count what they leave
out, by reason. All but `--classes` apply to the training images alone: validation images are the
measure of every experiment, so none of them is left out by a rule made for training.

A list of names has one on each line, as the report and `BetonReader.name` state them, relative to
the folder of the training images. Empty lines and lines that begin with # are ignored.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.convert.manifest import FoundImage, Label, SourceError, Split

NOT_INCLUDED, EXCLUDED = "not in --include", "in --exclude"
OTHER_CLASS = "of a class not in --classes"
NOT_SELECTED = "not selected"  # by --subset or --shard
DROPPED = {  # values of --drop: reason
    "overlap": "identical to a validation image",
    "exact": "identical to an earlier image",
    "blank": "blank",
}


def read_list(path: Path, flag: str) -> list[str]:
    """The names in a file, one a line. Raises SourceError, which names the flag."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise SourceError(f"{flag} {path} cannot be read: {error.strerror}") from None
    names = list(dict.fromkeys(line for line in lines if line and line[0] != "#"))
    if not names and flag != "--exclude":  # nothing need be excluded
        raise SourceError(f"{flag} {path} has no names, which are one on each line")
    return names


def list_text(names: Iterable[str]) -> str:
    """The contents of a file that `read_list` reads."""
    return "".join(f"{name}\n" for name in names)


def select_listed(
    splits: dict[str, Split], include: Path | None, exclude: Path | None, classes: Path | None
) -> None:
    """Filter the images of the splits by lists of names and classes, while they are listed.

    Raises SourceError; when images are listed, for a name that no training image has, or several.
    """
    paths = {"include": include, "exclude": exclude, "classes": classes}
    lists = {
        name: set(read_list(path, f"--{name}") if path is not None else ())
        for name, path in paths.items()
    }
    if both := lists["include"] & lists["exclude"]:
        raise SourceError(f"--include and --exclude both name {_some(both)}: remove it from one")
    train = splits["train"]
    if lists["classes"]:
        for split in splits.values():
            split.images = _of_classes(split, split.images, lists["classes"], split is train)
    if lists["include"] or lists["exclude"]:
        train.images = _named(train, train.images, **lists)


def _named(
    split: Split,
    images: Iterable[FoundImage],
    include: set[str],
    exclude: set[str],
    classes: set[str],
) -> Iterator[FoundImage]:
    """The images that the lists of names leave."""
    found: Counter[str] = Counter()
    num_left = 0
    for image in images:
        if image.name in include or image.name in exclude:
            found[image.name] += 1
        if image.name not in exclude and (not include or image.name in include):
            num_left += 1
            yield image
        else:
            split.ignored[EXCLUDED if image.name in exclude else NOT_INCLUDED] += 1
            split.other_labels.add(image.label)
    for flag, listed in {"--include": include, "--exclude": exclude}.items():
        if names := listed - found.keys():
            where = " of its classes" if classes else ""
            raise SourceError(
                f"{flag}: no training image of {split.root}{where} is named {_some(names)}"
                f" ({len(names)} in all); names are as in the report"
            )
    if repeated := [name for name, count in found.items() if count > 1]:
        raise SourceError(
            f"--include or --exclude: several training images of {split.root} are named "
            f"{_some(repeated)}; convert all of them to .beton, and exclude none by name"
        )
    if not num_left:
        raise SourceError(f"--exclude leaves no training image of {split.root}")


def _of_classes(
    split: Split, images: Iterable[FoundImage], wanted: set[str], is_train: bool
) -> Iterator[FoundImage]:
    """The images of the listed classes, with the names of their classes as labels."""
    found: dict[str, Label] = {}
    for image in images:
        name = _class_name(image.label, split)
        if name in wanted:
            found[name] = image.label
            yield image._replace(label=name)
        else:
            split.ignored[OTHER_CLASS] += 1
    if split.class_names is not None:
        split.class_names = [name for name in split.class_names if name in wanted]
    elif all(isinstance(label, int) for label in found.values()):
        split.class_names = sorted(found, key=int)
    missing = wanted - found.keys() - set(split.class_names or ())
    if is_train and missing:
        raise SourceError(
            f"--classes: no training image of {split.root} is of class {_some(missing)}"
            f" ({len(missing)} in all)"
        )
    if not found:
        raise SourceError(f"--classes leaves no image of {split.root}")


def _class_name(label: Label, split: Split) -> str | None:
    if isinstance(label, str) or label is None:
        return label
    if label < 0:
        return None
    names = split.class_names
    return str(label) if names is None or label >= len(names) else names[label]


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
