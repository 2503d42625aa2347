"""Which images are converted: by lists of names and classes, and by their bytes and pixels.

Lists apply while a source is listed, `--drop` while images are written; both count what they leave
out, by reason. All but `--classes` apply to the training images alone: validation images are the
measure of every experiment, so none of them is left out by a rule made for training.

A list of names has one on each line, as the report and `BetonReader.name` state them, relative to
the folder of the training images. Empty lines and lines that begin with # are ignored.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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


def read_list(path: Path, flag: str = "") -> list[str]:
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


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of names and classes; an empty one selects all."""

    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, include: Path | None, exclude: Path | None, classes: Path | None) -> "Lists":
        """Read the files of the flags. Raises SourceError."""
        paths = {"include": include, "exclude": exclude, "classes": classes}
        lists = {name: read_list(p, f"--{name}") for name, p in paths.items() if p is not None}
        both = set(lists.get("include", ())) & set(lists.get("exclude", ()))
        if both:
            raise SourceError(
                f"--include and --exclude both name {_some(both)}: remove it from one"
            )
        return cls(**lists)

    def apply(self, splits: dict[str, Split]) -> None:
        """Filter the images of the splits while they are listed.

        Raises SourceError, when they are listed, for a name that no training image has, or several.
        """
        for name, split in splits.items():
            if self.classes:
                split.images = self._of_classes(split, split.images, name == "train")
        train = splits["train"]
        if self.include or self.exclude:
            train.images = self._named(train, train.images)

    def _named(self, split: Split, images: Iterable[FoundImage]) -> Iterator[FoundImage]:
        """The images that the lists of names leave."""
        include, exclude = set(self.include), set(self.exclude)
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
                where = " of its classes" if self.classes else ""
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
        self, split: Split, images: Iterable[FoundImage], is_train: bool
    ) -> Iterator[FoundImage]:
        """The images of the listed classes, with the names of their classes as labels."""
        wanted = set(self.classes)
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


def parse_drop(text: str | None) -> list[str]:
    """The values of --drop, in the order of DROPPED. Raises ValueError."""
    values = text.split(",") if text is not None else []
    if unknown := [value for value in values if value not in DROPPED]:
        known = ", ".join(sorted(DROPPED))
        raise ValueError(f"--drop {text}: {unknown[0]!r} is none of {known}")
    return [value for value in DROPPED if value in values]
