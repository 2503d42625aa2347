"""Web shards: tar archives in which `key.jpg` and `key.cls` are an image and its label.

Shards written by bt-convert have a `dataset.json` with the class names, and contain the names of
their images (see `pipelines.webdataset.writer`). In all others labels are kept as they are, and a
sample without `.cls` has no class.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tarfile import TarInfo

from pipelines.convert.manifest import Location, SourceError, SourceImage, Split, numbered_names
from pipelines.convert.sources.files import by_split, members
from pipelines.convert.sources.folder import is_named_like_image
from pipelines.webdataset.writer import DATASET, NAMES

MAX_NAMES = 1 << 28  # bytes of all names in a shard, at most


def has_dataset(folder: Path) -> bool:
    """Whether the folder has a `dataset.json`, that is, was written by bt-convert."""
    return (folder / DATASET).is_file()


def find_splits(source: Path) -> dict[str, Split]:
    """The splits of a `dataset.json`, else the archives of a folder by name, or the given one."""
    if source.is_dir() and has_dataset(source):
        return dataset_splits(source, read_dataset(source))
    files = {"train": [source]} if source.is_file() else by_split(list(source.rglob("*.tar")))
    class_names: list[str] = []  # shared, so that a label means the same in both
    return {name: _split(source, paths, class_names) for name, paths in files.items()}


def read_dataset(folder: Path) -> dict:
    """The contents of `dataset.json`. Raises SourceError."""
    try:
        dataset = json.loads((folder / DATASET).read_bytes())
        shards = [s for content in dataset["splits"].values() for s in content["shards"]]
        if (
            dataset["format"] == "webdataset"
            and dataset["splits"].keys() <= {"train", "val"}
            and all(isinstance(name, str) for name in dataset["classes"])
            and all(Path(s["name"]).name == s["name"] and s["num_bytes"] > 0 for s in shards)
        ):
            return dataset
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise SourceError(f"{folder / DATASET} is damaged or was not written by bt-convert")


def dataset_splits(folder: Path, dataset: dict) -> dict[str, Split]:
    """The splits of a `dataset.json`. Raises SourceError for a missing or truncated shard."""
    splits = {}
    for name in dataset["splits"]:
        splits[name] = _split(folder, shard_paths(folder, dataset, name), [*dataset["classes"]])
        splits[name].max_side = 0
    return splits


def shard_paths(folder: Path, dataset: dict, split: str) -> list[Path]:
    """The archives of a split. Raises SourceError for a missing or truncated one."""
    shards = dataset["splits"][split]["shards"]
    paths = [folder / shard["name"] for shard in shards]
    for path, shard in zip(paths, shards, strict=True):
        size = path.stat().st_size if path.exists() else 0
        if size != shard["num_bytes"]:
            raise SourceError(
                f"{path} has {size} bytes, but {shard['num_bytes']} in {DATASET}: get it again"
            )
    return paths


def _split(root: Path, paths: list[Path], class_names: list[str]) -> Split:
    split = Split(root=root, class_names=class_names, images=())
    split.images = (image for path in paths for image in _images(split, path))
    return split


def _images(split: Split, path: Path) -> Iterator[SourceImage]:
    """The samples of one shard; adds numbered classes for labels without a class name."""
    for name, label, location in _samples(split, path):
        if label >= len(split.class_names):
            split.class_names += numbered_names(label + 1)[len(split.class_names) :]
        yield SourceImage(name, label, location)


def _samples(split: Split, path: Path) -> list[tuple[str, int, Location]]:
    samples = []
    names = b""
    for key, group in groupby(members(path), key=lambda member: _key(member.name)):
        components = list(group)
        image = next((m for m in components if is_named_like_image(f"x.{_extension(m)}")), None)
        if image is not None:
            location = Location(str(path), image.offset_data, image.size)
            samples.append((image.name, _label(path, components), location))
        elif components[0].name == NAMES:
            names = _read(path, components[0], MAX_NAMES)
        else:
            split.ignored["samples without an image"] += bool(key)
    if names:
        stored = names.decode("utf-8", "surrogateescape").split("\0")[:-1]
        if len(stored) != len(samples):
            raise SourceError(f"{path}: {len(samples)} images but {len(stored)} names")
        samples = [(name, s[1], s[2]) for name, s in zip(stored, samples, strict=True)]
    return samples


def _key(name: str) -> str:
    """The key that the files of a sample share: the path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    key, dot, _ = file.partition(".")
    return folder + slash + key if key and dot else ""


def _extension(member: TarInfo) -> str:
    return member.name.rpartition("/")[2].partition(".")[2]


def _label(path: Path, components: list[TarInfo]) -> int:
    component = next((m for m in components if _extension(m) == "cls"), None)
    if component is None:
        return -1
    content = _read(path, component, 100)
    try:
        return max(int(content), -1)
    except ValueError:
        raise SourceError(f"{path}: {component.name} is not a number") from None


def _read(path: Path, member: TarInfo, limit: int) -> bytes:
    """Read a member. Raises SourceError if it has more than `limit` bytes."""
    if member.size > limit:
        raise SourceError(f"{path}: {member.name} has {member.size} bytes, more than {limit}")
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
