"""Web shards: tar archives in which `key.jpg` and `key.cls` are an image and its label.

A sample's key ends at the first dot of its files' names; with `--image-key EXT` it is what precedes
".EXT". Labels come from `.cls` or from a field of `.json`. A sample without a label has no class.

Shards written by bt-convert have a `dataset.json` with the class names, and contain the names of
their images (see `pipelines.webdataset.writer`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from pipelines.convert.manifest import FoundImage, Label, Location, SourceError, Split, parse_label
from pipelines.convert.sources.files import Member, members
from pipelines.convert.sources.folder import is_named_like_image
from pipelines.convert.sources.labels import MAX_HINTS, TABLES, add_hint, label_key
from pipelines.convert.sources.splits import SourceOptions, splits_of_files, splits_of_folder
from pipelines.webdataset.writer import CHECKSUMS, DATASET, NAMES

MAX_NAMES = 1 << 28  # bytes of all names in a shard, at most
MAX_LABEL = 1 << 16  # bytes of a file with a label
NO_LABEL = ".json without the number or name of one class"
BY_FOLDER, BY_ARCHIVE = "folder", "archive"  # values of --label-key

Sample = dict[str, Member]  # extension in lower case -> file


def has_dataset(folder: Path) -> bool:
    """Whether the folder has a `dataset.json`, that is, was written by bt-convert."""
    return (folder / DATASET).is_file()


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """The splits of a `dataset.json`, else the archives of a folder by name, or the given one."""
    if source.is_dir() and has_dataset(source):
        if options != SourceOptions():
            raise SourceError(f"SOURCE {source} has a {DATASET}, which flags cannot change")
        return dataset_splits(source, read_dataset(source))
    return splits_of_files(
        source,
        ".tar",
        options,
        lambda paths: _split(source, paths, options),
        lambda path: sum(is_named_like_image(member.name) for member in members(path)),
    )


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
        splits[name] = _split(folder, shard_paths(folder, dataset, name), SourceOptions())
        splits[name].class_names, splits[name].max_side = [*dataset["classes"]], 0
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


def _split(root: Path, paths: list[Path], options: SourceOptions) -> Split:
    split = Split(root=root)

    def images() -> Iterator[FoundImage]:
        splits: set[str] = set()  # of folders inside the archives
        folders: set[str] = set()  # of images without a label
        found_any = has_label = False
        named_like_archive = len(paths) > 1
        for path in paths:
            is_number = re.fullmatch(r"\w*[-_]\d+|\d+", path.stem) is not None
            for image in _images(split, path, options, splits):
                found_any = True
                has_label |= image.label is not None
                if image.label is None:
                    folder, _, name = image.name.rpartition("/")
                    folders |= {folder} if len(folders) < 2 else set()
                    named_like_archive &= name.startswith(path.stem) or not is_number
                yield image
        if len(splits) > 1 and not options.all_train:
            raise SourceError(
                f"{root} contains archives with folders of several splits: unpack them, or train on"
                " everything with --all-train"
            )
        if options.image_key is not None and not found_any:
            raise SourceError(
                f"--image-key {options.image_key}: no sample of {root} has such an image"
            )
        if options.label_key is not None and not has_label:
            raise SourceError(
                f"--label-key {options.label_key}: no sample of {root} has such a label"
            )
        if len(folders) > 1:
            split.unused[f"folders inside archives: --label-key {BY_FOLDER}"] = None
        elif folders and named_like_archive:
            split.unused[f"names of archives: --label-key {BY_ARCHIVE}"] = None

    split.images = images()
    return split


def _images(
    split: Split, path: Path, options: SourceOptions, splits: set[str]
) -> Iterator[FoundImage]:
    """The images of one shard, in the order in which their samples begin.

    splits: gets those that are names of folders.
    """
    if options.image_key is not None:
        options = replace(options, image_key=options.image_key.lstrip("."))
    samples = _samples(split, path, options.image_key)
    stored: Iterator[str] = iter(())
    names = samples.pop(NAMES, {}).get("")
    with open(path, "rb") as file:
        images = [(key, _image(path, key, sample, options)) for key, sample in samples.items()]
        num_images = sum(extension is not None for _, extension in images)
        if names is not None:
            text = _read(path, file, names, MAX_NAMES).decode("utf-8", "surrogateescape")
            listed = text.split("\0")[:-1]
            if len(listed) != num_images:
                raise SourceError(f"{path}: {num_images} images but {len(listed)} names")
            stored = iter(listed)
        for key, extension in images:
            if extension is None:
                split.ignored["samples without an image"] += 1
                for other, member in samples[key].items():
                    if f".{other}".endswith(TABLES):
                        rest = f", first {member.name} in {path.name}: labels have to be in samples"
                        add_hint(split.unused, f".{other} files", rest)
                continue
            member = samples[key][extension]
            name = next(stored, member.name)
            for part in member.name.split("/")[:-1]:
                splits |= splits_of_folder(part)
            if member.missing:
                split.problems.append((name, f"a link to {member.missing}, which is not there"))
                continue
            label = _label(split, path, file, samples[key], extension, options)
            yield FoundImage(name, label, Location(str(path), member.offset, member.size))


def _samples(split: Split, path: Path, image_key: str | None) -> dict[str, Sample]:
    """The files of a shard by key, then by extension."""
    files: dict[str, Member] = {}
    for member in members(path):
        split.ignored["replaced by a later file of the same name"] += member.name in files
        files[member.name] = member
    ending = f".{image_key}".lower()
    keys = {name[: -len(ending)] for name in files if name.lower().endswith(ending)}
    samples: dict[str, Sample] = {}
    for name, member in files.items():
        file = name.rpartition("/")[2]
        dots = [index for index, letter in enumerate(file) if letter == "."]
        start = len(name) - len(file)
        if image_key is not None:  # the longest key that is an image's
            dots = [dot for dot in reversed(dots) if name[: start + dot] in keys][:1]
        if name == NAMES:
            samples[NAMES] = {"": member}
        elif file.startswith("."):
            split.ignored["hidden"] += name != CHECKSUMS
        elif dots:
            key, extension = name[: start + dots[0]], file[dots[0] + 1 :].lower()
            sample = samples.setdefault(key, {})
            if extension in sample:
                raise SourceError(
                    f"{path}: {sample[extension].name} and {name} differ only in case; rename one"
                )
            sample[extension] = member
        else:
            split.ignored["files that belong to no sample"] += 1
            if file.lower().endswith((".cls", ".json")):
                split.unused[f"files that belong to no sample of --image-key {image_key}"] = None
    return samples


def _image(path: Path, key: str, sample: Sample, options: SourceOptions) -> str | None:
    """The extension of a sample's image. Raises SourceError if it has several."""
    if options.image_key is not None:
        extension = options.image_key.lower()
        return extension if extension in sample else None
    found = [extension for extension in sample if is_named_like_image(f"x.{extension}")]
    if len(found) > 1:
        names = ", ".join(sample[extension].name for extension in found[:3])
        # Beside a label, the key is right and one of the images is meant; else each may be one.
        has_label = any(ending in ("cls", "json", options.label_key) for ending in sample)
        endings = sorted(found if has_label else {e.rpartition(".")[2] for e in found})
        raise SourceError(
            f"{path}: {len(found)} images share the key {key} ({names}), which ends at the first"
            f" dot; state how the image of a sample ends: --image-key {' or '.join(endings)}"
        )
    return found[0] if found else None


def _label(
    split: Split, path: Path, file: BinaryIO, sample: Sample, extension: str, options: SourceOptions
) -> Label:
    requested = options.label_key
    if requested == BY_FOLDER:
        return Path(sample[extension].name).parent.name or None
    if requested == BY_ARCHIVE:
        return path.stem
    source = sample.get((requested or "cls").lower())
    try:
        if source is not None:
            if requested is None and "json" in sample:
                split.unused[".json of samples with .cls: --label-key and a key in it"] = None
            return parse_label(_read(path, file, source, MAX_LABEL).decode("utf-8-sig"))
        if (source := sample.get("json")) is not None:
            content = json.loads(_read(path, file, source, MAX_LABEL))
            fields = content if isinstance(content, dict) else {}
            scalars = [name for name, value in fields.items() if not isinstance(value, dict | list)]
            key = label_key(fields, requested, Path(".json"), split.unused, candidates=scalars)
            if key is not None:
                return parse_label(fields[key])
            if not scalars:
                add_hint(split.unused, NO_LABEL, f", first {source.name} in {path.name}")
            return None
    except (ValueError, TypeError) as error:
        if requested is None and source is not None and source is sample.get("json"):
            add_hint(split.unused, NO_LABEL, f", first {source.name} in {path.name}")
            return None
        raise SourceError(f"{path}: {source.name if source else ''}: {error}") from None
    for other in sample:
        if other.endswith((".cls", ".json")) and "." in extension:
            last = extension.rpartition(".")[2]
            split.unused[f".cls or .json whose names have further dots: --image-key {last}"] = None
        elif other != extension and len(split.unused) < MAX_HINTS:
            split.unused[f".{other} of samples: --label-key {other}"] = None
    return None


def _read(path: Path, file: BinaryIO, member: Member, limit: int) -> bytes:
    """Read a member. Raises SourceError if it has more than `limit` bytes."""
    if member.size > limit:
        raise SourceError(f"{path}: {member.name} has {member.size} bytes, more than {limit}")
    file.seek(member.offset)
    return file.read(member.size)
