"""A text file that lists images: each line is a path and, after white space or a comma, a label.

Paths are absolute or relative to the list's folder and may contain spaces. Labels are numbers from
0, which are kept, with -1 for no class; or class names, numbered in sorted order. A list without
labels has only paths. Images keep the order of the list.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.convert.jpeg import IMAGE_EXTENSIONS
from pipelines.convert.manifest import FoundImage, Location, SourceError, Split, parse_label
from pipelines.convert.sources.folder import is_named_like_image
from pipelines.convert.sources.splits import SourceOptions

_ENDINGS = "|".join(re.escape(ending) for ending in sorted(IMAGE_EXTENSIONS))
_NAME_AND_LABEL = re.compile(rf"(.*(?:{_ENDINGS}))\s*([\s,])\s*(.+)", re.IGNORECASE)


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """One split."""
    return {"train": Split(root=source.parent, images=_images(source))}


def _images(source: Path) -> Iterator[FoundImage]:
    first: tuple[int, type] | None = None  # line and kind of the first label
    for number, path, label in _lines(source):
        try:
            value = parse_label(label)
        except ValueError as error:
            raise SourceError(f"{source}, line {number}: {error}") from None
        kind = type(None) if label is None else type(value)
        if number == 1 and not is_named_like_image(path) and not (source.parent / path).exists():
            raise SourceError(f"{source}, line 1: no file {path}; remove the line if it is a title")
        if first is not None and kind is not first[1]:
            kinds = {type(None): "no label", int: "a number", str: "a name"}
            raise SourceError(
                f"{source}, line {number}: {kinds[kind]} where line {first[0]} has"
                f" {kinds[first[1]]}; use one kind for all images (-1: no class)"
            )
        first = first or (number, kind)
        yield FoundImage(path, value, Location(str(source.parent / path)))


def _lines(source: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line number, path, label) of every line that is not empty."""
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not (line := line.strip()):
                continue
            path, label = line, None
            if match := _NAME_AND_LABEL.fullmatch(line):
                name, separator, rest = match.groups()
                if not is_named_like_image(rest):  # else one name, of two
                    path, label = name, rest
                    _require_one_label(source, number, separator, rest)
            elif not is_named_like_image(line):  # a file with another ending
                path, *words = line.rsplit(None, 1)
                label = words[0] if words else None
            yield number, path, label


def _require_one_label(source: Path, number: int, separator: str, rest: str) -> None:
    """Raise SourceError for further columns, and for words that may be some."""
    if re.search(r"[,\t]", rest) or (separator == " " and len(rest.split()) > 1):
        raise SourceError(
            f"{source}, line {number}: {rest} is not one label; separate a path and its label,"
            " which may have several words, by one tab or comma"
        )
