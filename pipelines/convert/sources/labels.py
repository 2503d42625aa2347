"""Which field of a table, or of JSON beside an image, is its label."""

from collections.abc import Iterable
from pathlib import Path

from pipelines.convert.manifest import SourceError

TABLES = (".csv", ".tsv", ".jsonl", ".xlsx")  # endings of files that may contain labels
SPLIT_COLUMNS = ("split", "subset", "partition")
MAX_HINTS = 9  # on labels that are not used, for each split
LABEL_NAMES = ("label", "labels", "fine_label")  # the first one that exists is the label


def label_key(
    names: Iterable[str],
    requested: str | None,
    source: Path,
    unused: dict[str, None],
    *,
    candidates: Iterable[str],
) -> str | None:
    """The requested name, else the first of LABEL_NAMES; None if there is none of them.

    Adds to `unused` what else could be a label: the candidates among `names`. Raises SourceError if
    the requested one is missing.
    """
    names = list(names)
    if requested is not None and requested not in names:
        raise SourceError(f"--label-key {requested}: {source} has only {', '.join(names)}")
    key = requested or next((name for name in LABEL_NAMES if name in names), None)
    others = [name for name in candidates if name not in (key, *SPLIT_COLUMNS)]
    if others and len(unused) < MAX_HINTS:
        unused[f"{', '.join(others)} of {source.name}: --label-key {others[0]}"] = None
    return key


def add_hint(unused: dict[str, None], what: str, rest: str) -> None:
    """Add a hint on labels that are not used, unless there is one that begins with `what`."""
    if not any(hint.startswith(what) for hint in unused):
        unused[what + rest] = None
