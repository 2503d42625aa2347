"""The ILSVRC2012 archives as downloaded, read without unpacking.

`ILSVRC2012_img_train.tar` contains a tar archive per class; `ILSVRC2012_img_val.tar` contains
images without classes, which the development kit lists: line i of
`ILSVRC2012_validation_ground_truth.txt` is the class number of image i, and `meta.mat` has the
names of the classes by number. Order, names and labels are those of the unpacked class folders.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.convert.jpeg import JPEG_EXTENSIONS
from pipelines.convert.manifest import FoundImage, Location, SourceError, Split
from pipelines.convert.sources.files import Member, members
from pipelines.convert.sources.splits import SourceOptions

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def has_archive(folder: Path) -> bool:
    """Whether the folder contains one of the two archives."""
    return (folder / TRAIN).exists() or (folder / VAL).exists()


def is_archive(path: Path) -> bool:
    """Whether the file is an archive of archives or has the name of the validation archive."""
    return path.name == VAL or _holds_archives(path)


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """Both archives of a folder, or the given one. --labels: a devkit or a text file for val."""
    labels = options.labels
    if source.is_dir():
        archives = {"train": source / TRAIN, "val": source / VAL}
    else:
        archives = {"train" if _holds_archives(source) else "val": source}
    archives = {name: path for name, path in archives.items() if path.exists()}
    if labels is not None and "val" not in archives:
        raise SourceError(f"--labels {labels}: {source} contains the classes of its images")
    splits = {}
    if "train" in archives:
        splits["train"] = _train(archives["train"])
    if "val" in archives:
        splits["val" if splits else "train"] = _val(archives["val"], labels)
    return splits


def _holds_archives(path: Path) -> bool:
    first = next(members(path), None)
    return first is not None and first.name.endswith(".tar")


def _train(path: Path) -> Split:
    archives = sorted(m for m in members(path) if m.name.endswith(".tar"))
    split = Split(root=path, class_names=[Path(m.name).stem for m in archives])

    def images() -> Iterator[FoundImage]:
        for archive in archives:
            files = members(path, archive.offset, archive.offset + archive.size)
            for member in _images(split, files):
                yield _found(path, member, Path(archive.name).stem)

    split.images = images()
    return split


def _val(path: Path, labels: Path | None) -> Split:
    split = Split(root=path)
    files = _images(split, members(path))
    classes = _classes(labels or _devkit_beside(path), [Path(file.name).name for file in files])
    # `sorted` keeps the order of the names within a class.
    labelled = sorted(zip(classes, files, strict=True), key=lambda image: image[0])
    split.images = (_found(path, member, name) for name, member in labelled)
    return split


def _images(split: Split, files: Iterable[Member]) -> list[Member]:
    """The files that are named like JPEGs, sorted by name; counts the others."""
    files = list(files)
    images = [file for file in files if Path(file.name).suffix.lower() in JPEG_EXTENSIONS]
    split.ignored["not named like a JPEG"] += len(files) - len(images)
    return sorted(images, key=lambda file: Path(file.name).name)


def _found(archive: Path, member: Member, class_name: str) -> FoundImage:
    location = Location(str(archive), member.offset, member.size)
    return FoundImage(f"{class_name}/{Path(member.name).name}", class_name, location)


def _devkit_beside(val: Path) -> Path:
    if not (devkit := val.parent / DEVKIT).exists():
        raise SourceError(
            f"{val} does not contain the classes of its images: put {DEVKIT} beside it, or give "
            f"that or a text file (a class such as n01440764 for each image) with --labels"
        )
    return devkit


def _classes(labels: Path, names: list[str]) -> list[str]:
    """The class of each image, from a devkit or from lines "class" or "image class"."""
    if labels.name.endswith(".tar.gz"):
        numbers, class_names = _read_devkit(labels)
        lines = [[class_names[number]] for number in numbers]
    else:
        text = labels.read_text(encoding="utf-8-sig").replace(",", " ")
        lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines and all(len(line) == 2 for line in lines):
        by_stem = {Path(image).stem: name for image, name in lines}
        missing = [name for name in names if Path(name).stem not in by_stem]
        if missing:
            raise SourceError(f"--labels {labels} has no line for {missing[0]}")
        return [by_stem[Path(name).stem] for name in names]
    if len(lines) != len(names) or not all(len(line) == 1 for line in lines):
        raise SourceError(
            f"--labels {labels}: {len(names)} lines of a class or of an image's name and its class "
            f"are needed, one for each image; it has {len(lines)}"
        )
    return [line[0] for line in lines]


def _read_devkit(path: Path) -> tuple[list[int], dict[int, str]]:
    """Returns (class number of every validation image, {class number: class name})."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(
            f"reading {path.name} requires SciPy: pip install scipy; or give --labels a text file "
            f"with the class of each image"
        ) from None
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
                    files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        numbers = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        if missing := set(numbers) - names.keys():
            raise KeyError(f"class {min(missing)}")
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise SourceError(f"{path} is not a valid development kit: {error}") from None
    return numbers, names
