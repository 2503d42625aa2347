"""Divides the files of a data set into training and validation files by their names."""

import re
from pathlib import Path

from pipelines.convert.manifest import SourceError

_SPLIT_NAME = re.compile(r"(?:^|[^a-z])(train|val|validation|test)(?=[^a-z]|$)")


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """Returns {"train": files, "val": files}, sorted by name; all for train if no name has a split.

    Examples of names: `data/train-00000-of-00294.parquet`, `imagenet-val-000003.tar`. Test files
    are left out. Raises SourceError if only test files are left.
    """
    matches = {path: _SPLIT_NAME.search(path.stem.lower()) for path in sorted(files)}
    names = {path: match[1] if match else "" for path, match in matches.items()}
    if not any(names.values()):
        return {"train": list(names)}
    splits = {
        "train": [path for path, name in names.items() if name == "train"],
        "val": [path for path, name in names.items() if name.startswith("val")],
    }
    if not splits["train"]:  # validation files alone are trained on
        splits = {"train": splits["val"]}
    if not splits["train"]:
        raise SourceError(f"{files[0].parent} has only files named for testing")
    return {name: paths for name, paths in splits.items() if paths}
