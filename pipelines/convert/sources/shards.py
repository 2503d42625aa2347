"""Web shards: tar archives in which `key.jpg` and `key.cls` are an image and its class.

Ours come with a `dataset.json`, which has the names of the classes, and hold the names of their
images (see `pipelines.webdataset.writer`). In others labels are taken as they are, and the images
of a sample without `.cls` have no class.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tarfile import TarInfo

from pipelines.convert.manifest import Image, Place, SourceError, Split, number_names
from pipelines.convert.sources.by_split import by_split
from pipelines.convert.sources.folder import is_named_like_image
from pipelines.convert.sources.tars import members
from pipelines.webdataset.writer import DATASET, NAMES

MAX_NAMES = 1 << 28  # bytes of all names in a shard


def is_ours(folder: Path) -> bool:
    """Is it a folder that bt-convert wrote?"""
    return (folder / DATASET).is_file()


def find_splits(source: Path) -> dict[str, Split]:
    """Those of a `dataset.json`; else the archives of a folder by their names; or the one given."""
    if source.is_dir() and is_ours(source):
        return our_splits(source, read_dataset(source))
    files = {"train": [source]} if source.is_file() else by_split(list(source.rglob("*.tar")))
    class_names: list[str] = []  # shared: a label means the same in both
    return {name: _split(source, paths, class_names) for name, paths in files.items()}


def read_dataset(folder: Path) -> dict:
    """The contents of `dataset.json`. Raises SourceError."""
    try:
        dataset = json.loads((folder / DATASET).read_bytes())
        assert dataset["format"] == "webdataset" and {*dataset["splits"]} <= {"train", "val"}
        assert all(isinstance(name, str) for name in dataset["classes"])
        for content in dataset["splits"].values():
            for shard in content["shards"]:
                assert Path(shard["name"]).name == shard["name"] and shard["num_bytes"] > 0
        return dataset
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise SourceError(f"{folder / DATASET} is damaged, or not of bt-fast") from None


def our_splits(folder: Path, dataset: dict) -> dict[str, Split]:
    """The splits of a `dataset.json`, whose shards must all be there in full length."""
    splits = {}
    for name in dataset["splits"]:
        splits[name] = _split(folder, our_archives(folder, dataset, name), [*dataset["classes"]])
        splits[name].max_side = 0
    return splits


def our_archives(folder: Path, dataset: dict, split: str) -> list[Path]:
    """The shards of a split. Raises SourceError for one that is missing or cut off."""
    shards = dataset["splits"][split]["shards"]
    paths = [folder / shard["name"] for shard in shards]
    for path, shard in zip(paths, shards, strict=True):
        size = path.stat().st_size if path.exists() else 0
        if size != shard["num_bytes"]:
            raise SourceError(
                f"{path} has {size} bytes, and {shard['num_bytes']} in {DATASET}: get it again"
            )
    return paths


def _split(root: Path, paths: list[Path], class_names: list[str]) -> Split:
    split = Split(root=root, class_names=class_names, images=())
    split.images = (image for path in paths for image in _images(split, path))
    return split


def _images(split: Split, path: Path) -> Iterator[Image]:
    """The samples of one shard; a label without a name makes its number a class."""
    for name, label, place in _samples(split, path):
        if label >= len(split.class_names):
            split.class_names += number_names(label + 1)[len(split.class_names) :]
        yield Image(name, label, place)


def _samples(split: Split, path: Path) -> list[tuple[str, int, Place]]:
    samples = []
    names = b""
    for key, group in groupby(members(path), key=lambda member: _key(member.name)):
        components = list(group)
        image = next((m for m in components if is_named_like_image(f"x.{_extension(m)}")), None)
        if image is not None:
            place = Place(str(path), image.offset_data, image.size)
            samples.append((image.name, _label(path, components), place))
        elif components[0].name == NAMES:
            names = _read(path, components[0], MAX_NAMES)
        else:
            split.ignored["samples without an image"] += bool(key)
    if names:
        given = names.decode("utf-8", "surrogateescape").split("\0")[:-1]
        if len(given) != len(samples):
            raise SourceError(f"{path}: {len(samples)} images with {len(given)} names")
        samples = [(name, s[1], s[2]) for name, s in zip(given, samples, strict=True)]
    return samples


def _key(name: str) -> str:
    """All before the first dot of the last part: the components of a sample have it in common."""
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
    """A small member. Raises SourceError for one of more bytes than such a file has."""
    if member.size > limit:
        raise SourceError(f"{path}: {member.name} has {member.size} bytes, more than {limit}")
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)
