"""Transfer data sets in their published layouts.

places205   train_places205.csv and val_places205.csv ("a/abbey/x.jpg 0" per line), in the folder
            or in trainvalsplit_places205/; images below the folder, images256/ or the archive's
            data/vision/torralba/deeplearning/images256/
inat18      train2018.json and val2018.json; images at the paths in them (train_val2018/...)
voc07       VOCdevkit/VOC2007: ImageSets/Main/*_trainval.txt, *_test.txt and JPEGImages/
"""

import json
import operator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from bt_fast.evaluate.subset import Subset
from pipelines.convert.manifest import numbered_names
from pipelines.loading.image_files import ImageFiles

_Labelled = tuple[list[str], list[int]]  # paths and labels


def places205(root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of Places-205. Raises ValueError."""
    splits = []
    for split in ("train", "val"):
        name = f"{split}_places205.csv"
        file = _first_existing(root, [name, f"trainvalsplit_places205/{name}"], "Places-205")
        splits.append(_read_pairs(file))
    first = splits[0][0][0]  # path of the first training image
    folders = ["", "images256", "data/vision/torralba/deeplearning/images256"]
    candidates = [f"{folder}/{first}".lstrip("/") for folder in folders]
    image = _first_existing(root, candidates, "Places-205")
    images = image.parents[len(Path(first).parts) - 1]
    return _train_and_val(images, splits)


def inat18(root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of iNaturalist 2018. Raises ValueError."""
    splits = []
    for split in ("train", "val"):
        file = _first_existing(root, [f"{split}2018.json"], "iNaturalist 2018")
        try:
            content = json.loads(file.read_text())
            classes = {
                entry["image_id"]: operator.index(entry["category_id"])
                for entry in content["annotations"]
            }
            paths = [str(PurePosixPath(image["file_name"])) for image in content["images"]]
            labels = [classes[image["id"]] for image in content["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not in iNaturalist's format: {error!r}") from None
        if not paths:
            raise ValueError(f"{file} is empty")
        splits.append((paths, labels))
    return _train_and_val(root, splits)


def _train_and_val(root: Path, splits: list[_Labelled]) -> tuple[ImageFiles, ImageFiles]:
    """Images of both splits; the classes are named "0", "1" and so on."""
    names = numbered_names(1 + max(label for _, labels in splits for label in labels))
    train, val = (ImageFiles(root, paths, labels, names) for paths, labels in splits)
    return train, val


@dataclass(frozen=True, kw_only=True, slots=True)
class VocSplit:
    """One split of VOC07: its images, and the classes present in each."""

    subset: Subset
    present: np.ndarray  # int8 [n, classes]: 1 present, -1 absent, 0 difficult (ignored)


def voc07(root: Path) -> tuple[list[str], VocSplit, VocSplit]:
    """(class names, trainval, test) of VOC 2007. Raises ValueError."""
    candidates = [f"{p}ImageSets/Main" for p in ("", "VOC2007/", "VOCdevkit/VOC2007/")]
    main = _first_existing(root, candidates, "VOC07")
    names = sorted(file.name.removesuffix("_trainval.txt") for file in main.glob("*_trainval.txt"))
    if not names:
        raise ValueError(f"{main} has no class lists (aeroplane_trainval.txt, ...)")
    folder = main.parents[1]
    splits = []
    for split in ("trainval", "test"):
        files = [_first_existing(main, [f"{name}_{split}.txt"], "VOC07") for name in names]
        columns = [_read_pairs(file) for file in files]
        identifiers = columns[0][0]
        for name, (listed, numbers) in zip(names, columns, strict=True):
            if listed != identifiers:
                raise ValueError(f"{main}: {name}_{split}.txt lists other images than {names[0]}'s")
            if not set(numbers) <= {-1, 0, 1}:
                raise ValueError(f"{main}: {name}_{split}.txt has numbers other than -1, 0 and 1")
        paths = [f"JPEGImages/{identifier}.jpg" for identifier in identifiers]
        images = ImageFiles(folder, paths, [-1] * len(paths), names)
        subset = Subset(images, np.arange(len(paths)))
        present = np.array([labels for _, labels in columns], np.int8).T
        splits.append(VocSplit(subset=subset, present=present))
    return names, splits[0], splits[1]


def _first_existing(root: Path, candidates: list[str], dataset: str) -> Path:
    """The first candidate that exists below `root`. Raises ValueError if none does."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise ValueError(f"--data {root} does not hold {dataset}: {' or '.join(candidates)} is missing")


def _read_pairs(file: Path) -> _Labelled:
    """Names and numbers of a file with lines "name number". Raises ValueError."""
    names, numbers = [], []
    for line_number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            name, _, number = line.strip().rpartition(" ")
            try:
                numbers.append(int(number))
            except ValueError:
                raise ValueError(f"{file}, line {line_number}: not a name and a number") from None
            names.append(name.strip())
    if not names:
        raise ValueError(f"{file} is empty")
    return names, numbers
