"""Train and validation files told apart by their names, where a data set comes in many files."""

import re
from pathlib import Path

from pipelines.convert.manifest import SourceError

_WORD = re.compile(r"(?:^|[^a-z])(train|val|validation|test)(?=[^a-z]|$)")


def by_split(files: list[Path]) -> dict[str, list[Path]]:
    """{"train": files, "val": files}, in the order of their names; without any such word, train.

    `data/train-00000-of-00294.parquet`, `imagenet-val-000003.tar`. Files for testing are left out.
    Raises SourceError if there is nothing to train on.
    """
    words = {}
    for path in sorted(files):
        found = _WORD.findall(path.stem.lower())
        words[path] = found[0] if found else ""
    if not any(words.values()):
        return {"train": list(words)}
    splits = {
        "train": [path for path, word in words.items() if word == "train"],
        "val": [path for path, word in words.items() if word.startswith("val")],
    }
    if not splits["train"]:  # given alone, the validation files are what is wanted
        splits = {"train": splits["val"]}
    if not splits["train"]:
        raise SourceError(f"{files[0].parent} has files named for testing alone")
    return {name: paths for name, paths in splits.items() if paths}
