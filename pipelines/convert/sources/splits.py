"""Which files or folders of a source are for training and which are held out.

A name states its split by a word in the name of the file or of a folder: `val2017/000.tar`,
`train-00000-of-00014.parquet`. What the names leave open is an error, and flags settle it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pipelines.convert.manifest import SourceError, Split
from pipelines.convert.sources.files import PACKED, UNFINISHED_DOWNLOADS, files_below, find_files
from pipelines.convert.sources.labels import TABLES

WORDS = {
    "train": {"train", "training", "trn"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}
FOR_TESTING, UNMATCHED = "of a test split", "matched neither by --train nor by --val"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Flags of bt-convert that state what a source leaves open; see `command.Convert`."""

    train: str | None = None
    val: str | None = None
    all_train: bool = False
    image_key: str | None = None
    label_key: str | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Paths, sorted, relative to the source: of each split, and by reason those left out."""

    splits: dict[str, list[str]]
    left_out: dict[str, list[str]]


def splits_of_folder(name: str) -> set[str]:
    """The splits that the words of a name state: {"train"} for train2017, trainA and Train_Set."""
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return {split for split in WORDS if words & WORDS[split]}


def splits_of_file(path: str) -> set[str]:
    """The splits that the words of a file's folders and of its name state."""
    *folders, name = path.split("/")
    return set().union(*map(splits_of_folder, [*folders, name.rpartition(".")[0]]))


def place(
    root: Path,
    paths: Sequence[str],
    options: SourceOptions,
    splits_of: Callable[[str], set[str]] = splits_of_file,
) -> Placement:
    """Place the paths, which are relative to `root`. Validation images alone are trained on.

    Names count only if all have one, or none but "train" occurs: `bus.tar car.tar train.tar` is one
    split. Raises SourceError, which lists what cannot be placed.
    """
    paths = sorted(paths)
    if options.train is not None or options.val is not None:
        return _place_by_pattern(root, paths, options)
    found = {path: splits_of(path) for path in paths}
    if options.all_train or not any(splits - {"train"} for splits in found.values()):
        return Placement({"train": paths}, {})
    if unplaced := [path for path, splits in found.items() if len(splits) != 1]:
        raise SourceError(
            f"{root} has names of splits, but not of one split in {some(unplaced)}: state both"
            " with --train GLOB and --val GLOB, or take all names as they are with --all-train"
        )
    train, val, test = ([path for path in paths if split in found[path]] for split in WORDS)
    if not train and not val:
        raise SourceError(
            f"{root} has only a test split, {some(test)}; train on it with --train {test[0]}"
        )
    splits = {"train": train, "val": val} if train and val else {"train": train or val}
    return Placement(splits, {FOR_TESTING: test} if test else {})


def splits_of_files(
    source: Path,
    suffix: str,
    options: SourceOptions,
    split_of: Callable[[list[Path]], Split],
    count: Callable[[Path], int],
) -> dict[str, Split]:
    """The splits of the files below a folder, by their names; or of the given file.

    `count` is the number of images in a file that is left out.
    """
    if source.is_file():
        return {"train": split_of([source])}
    notable = find_files(source, (suffix, *PACKED, *UNFINISHED_DOWNLOADS, *TABLES))
    found = [path for path in notable if path.lower().endswith(suffix)]
    num_others = sum(1 for _ in files_below(source)) - len(found)
    placement = place(source, found, options)
    if options.train is None:
        _refuse_configurations(source, placement)
        _refuse_unread(source, suffix, notable)
    splits = {
        name: split_of([source / path for path in paths])
        for name, paths in placement.splits.items()
    }
    ignored, unused = splits["train"].ignored, splits["train"].unused
    ignored[f"not named {suffix}"] += num_others
    if tables := [path for path in notable if path.lower().endswith(TABLES)]:
        unused[f"{some(tables)}: labels have to be in the {suffix} files"] = None
    if options.train is None:
        splits["train"].warnings |= dict.fromkeys(_incomplete_sets(found))
    for reason, paths in placement.left_out.items():
        for path in paths:
            try:
                ignored[reason] += count(source / path)
            except SourceError:  # it need not be readable
                ignored[reason] += 1
    return splits


def _refuse_unread(root: Path, suffix: str, paths: Sequence[str]) -> None:
    """Raise SourceError for files that may contain images but are packed or incomplete."""
    for endings, advice in (
        (PACKED, "unpack them"),
        (UNFINISHED_DOWNLOADS, "finish their download"),
    ):
        if found := [path for path in paths if path.lower().endswith(endings)]:
            raise SourceError(
                f"{root} has {some(found)} beside its {suffix} files: {advice}, or state the files"
                " to read with --train GLOB"
            )


def _incomplete_sets(paths: Sequence[str]) -> list[str]:
    """A line for each set of files, `train-00000-of-00014`, of which some are missing."""
    numbers: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        if match := re.match(r"(.*)-(\d+)-of-(\d+)", path):
            numbers.setdefault((match[1], match[3]), set()).add(match[2])
    return [
        f"{len(found)} of the {int(total)} files {start}-...-of-{total} are there"
        for (start, total), found in numbers.items()
        if len(found) < int(total)
    ]


def check_split_column(split: Split, table: Path, name: str, values: Iterable[object]) -> None:
    """Raise SourceError if the values of a table's column state a test split, or several splits.

    Other values, if there are several, are a warning: the column is not used.
    """
    found = sorted({str(value).strip() for value in values if value is not None} - {""})
    stated = set().union(*map(splits_of_folder, found))
    is_numbered = len(found) > 1 and all(value.isdigit() for value in found)
    if "test" in stated or (len(found) > 1 and "val" in stated) or is_numbered:
        raise SourceError(
            f"{table} has a column {name} with {some(found)}, which is not used: put each split"
            " into a folder or file of its own, or train on all with --all-train"
        )
    if len(found) > 1:
        split.warnings[f"column {name} of {table.name} is not used: {some(found)}"] = None


def _refuse_configurations(root: Path, placement: Placement) -> None:
    """Raise SourceError if several folders have splits of their own: which one is meant?"""

    def prefix(path: str) -> str:
        folders = path.split("/")[:-1]
        named = [index for index, name in enumerate(folders) if splits_of_folder(name)]
        return "/".join(folders[: named[0]] if named else folders)

    files = (*placement.splits.values(), *placement.left_out.values())
    prefixes = sorted({prefix(path) for paths in files for path in paths})
    if len(prefixes) > 1 and any(map(splits_of_file, placement.splits["train"])):
        raise SourceError(
            f"{root} has splits in several folders ({some(prefixes)}): name one of them as SOURCE,"
            " or state the files with --train GLOB and --val GLOB"
        )


def _place_by_pattern(root: Path, paths: list[str], options: SourceOptions) -> Placement:
    matched: dict[str, list[str]] = {}
    for split, pattern in (("train", options.train), ("val", options.val)):
        if pattern is not None:
            matched[split] = [path for path in paths if _matches(path, pattern)]
            if not matched[split]:
                raise SourceError(f"--{split} {pattern} matches nothing of {root}: {some(paths)}")
    if options.all_train or options.train is None:
        raise SourceError("--val requires --train; --all-train excludes both")
    if both := sorted(set(matched["train"]).intersection(matched.get("val", ()))):
        raise SourceError(f"--train and --val match both {some(both)}")
    rest = sorted(set(paths).difference(*matched.values()))
    return Placement(matched, {UNMATCHED: rest} if rest else {})


def _matches(path: str, pattern: str) -> bool:
    """Whether a shell pattern matches the path, its last part or one of its folders."""
    parts = path.split("/")
    folders = ("/".join(parts[:count]) for count in range(1, len(parts)))
    return any(fnmatchcase(name, pattern) for name in (path, parts[-1], *folders))


def some(names: Sequence[str]) -> str:
    """The first of the names, and the number of the others."""
    shown = ", ".join(name or "." for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
