"""A text file that lists images: each line is a path and, after white space, a label.

Paths are absolute or relative to the list's folder and may contain spaces. Labels are class names,
numbered in sorted order, or numbers from 0 in all lines, which are kept. A list without labels has
only paths. Images keep the order of the list.
"""

from collections.abc import Iterator
from pathlib import Path

from pipelines.convert.manifest import Location, SourceError, SourceImage, Split, numbered_names
from pipelines.convert.sources.folder import is_named_like_image


def find_splits(source: Path) -> dict[str, Split]:
    """One split. The list is read twice, since its classes are needed before its images."""
    labels = {label for _, _, label in _lines(source)}
    if None in labels and len(labels) > 1:
        first = next(number for number, _, label in _lines(source) if label is None)
        raise SourceError(f"{source}, line {first}: no label, unlike other lines")
    names = {label for label in labels if label is not None}
    if names and all(name.isdecimal() for name in names):
        class_names = numbered_names(max(map(int, names)) + 1)
        label_of = {name: int(name) for name in names}  # not the index: 7 and 007 are equal
    else:
        class_names = sorted(names)
        label_of = {name: label for label, name in enumerate(class_names)}

    def images() -> Iterator[SourceImage]:
        for _, path, name in _lines(source):
            yield SourceImage(path, -1 if name is None else label_of[name], Location(path))

    return {"train": Split(root=source.parent, class_names=class_names, images=images())}


def _lines(source: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line number, path, label) of every line that is not empty."""
    with open(source, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            words = line.strip().rsplit(None, 1)
            if len(words) == 2 and not is_named_like_image(words[1]):
                yield number, words[0], words[1]
            elif words:
                yield number, line.strip(), None
