"""Transfer data sets in the layouts they are published in.

places205   train_places205.csv and val_places205.csv ("a/abbey/x.jpg 0" per line), in the folder
            or in trainvalsplit_places205/; images below the folder, images256/ or the archive's
            data/vision/torralba/deeplearning/images256/
inat18      train2018.json and val2018.json; images as they name them (train_val2018/...)
voc07       VOCdevkit/VOC2007: ImageSets/Main/*_trainval.txt, *_test.txt and JPEGImages/
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bt_fast.evaluate.options import Part
from pipelines.loading.image_files import ImageFiles


def places205(root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of Places-205. Raises ValueError."""
    listed = []
    for part in ("train", "val"):
        name = f"{part}_places205.csv"
        file = _first(root, [name, f"trainvalsplit_places205/{name}"], "Places-205")
        listed.append(_read_pairs(file))
    some = listed[0][0][0]
    places = ["", "images256", "data/vision/torralba/deeplearning/images256"]
    image = _first(root, [f"{place}/{some}".lstrip("/") for place in places], "Places-205")
    images = image.parents[len(Path(some).parts) - 1]
    names = [str(label) for label in range(1 + max(max(labels) for _, labels in listed))]
    train, val = (ImageFiles(images, paths, labels, names) for paths, labels in listed)
    return train, val


def inat18(root: Path) -> tuple[ImageFiles, ImageFiles]:
    """Training and validation images of iNaturalist 2018. Raises ValueError."""
    listed = []
    for part in ("train", "val"):
        file = _first(root, [f"{part}2018.json"], "iNaturalist 2018")
        try:
            content = json.loads(file.read_text())
            classes = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
            entries = [(image["file_name"], classes[image["id"]]) for image in content["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not as iNaturalist publishes it: {error!r}") from None
        listed.append(entries)
    names = [str(label) for label in range(1 + max(label for part in listed for _, label in part))]
    train, val = (
        ImageFiles(root, [path for path, _ in part], [label for _, label in part], names)
        for part in listed
    )
    return train, val


@dataclass(frozen=True, kw_only=True, slots=True)
class VocPart:
    """One part of VOC07: images, and what is in them."""

    images: ImageFiles
    present: np.ndarray  # int8 [n, classes]: 1 there, -1 not there, 0 difficult: not counted

    @property
    def whole(self) -> Part:
        """All images."""
        return Part(images=self.images, samples=np.arange(len(self.images)))


def voc07(root: Path) -> tuple[list[str], VocPart, VocPart]:
    """(class names, trainval, test) of VOC 2007. Raises ValueError."""
    main = _first(
        root, [f"{p}ImageSets/Main" for p in ("", "VOC2007/", "VOCdevkit/VOC2007/")], "VOC07"
    )
    names = sorted(file.name.removesuffix("_trainval.txt") for file in main.glob("*_trainval.txt"))
    if not names:
        raise ValueError(f"{main} has no lists of classes (aeroplane_trainval.txt, ...)")
    folder = main.parents[1]
    parts = []
    for part in ("trainval", "test"):
        columns = [_read_pairs(_first(main, [f"{n}_{part}.txt"], "VOC07")) for n in names]
        identifiers = columns[0][0]
        for name, (found, _) in zip(names, columns, strict=True):
            if found != identifiers:
                raise ValueError(f"{main}: {name}_{part}.txt lists other images than {names[0]}'s")
        paths = [f"JPEGImages/{identifier}.jpg" for identifier in identifiers]
        images = ImageFiles(folder, paths, [-1] * len(paths), names)
        present = np.array([labels for _, labels in columns], np.int8).T
        parts.append(VocPart(images=images, present=present))
    return names, parts[0], parts[1]


def _first(root: Path, candidates: list[str], what: str) -> Path:
    """The first that exists below `root`."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise ValueError(f"--data {root} does not hold {what}: {' or '.join(candidates)} is missing")


def _read_pairs(file: Path) -> tuple[list[str], list[int]]:
    """Lines of "name number"."""
    names, numbers = [], []
    for count, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            name, _, number = line.strip().rpartition(" ")
            try:
                numbers.append(int(number))
            except ValueError:
                raise ValueError(f"{file}, line {count}: not a name and a number") from None
            names.append(name.strip())
    if not names:
        raise ValueError(f"{file} is empty")
    return names, numbers
