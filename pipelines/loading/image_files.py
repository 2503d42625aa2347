"""Reads image files without conversion, with a BetonReader's interface: for evaluation data sets.

On access a file is converted to the JPEG that bt-convert would store (`jpeg.prepare`).
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipelines.convert.jpeg import Prepared, UnreadableImage, prepare, read_image
from pipelines.convert.manifest import Manifest, SourceError
from pipelines.convert.sources.folder import find_splits
from pipelines.convert.sources.splits import SourceOptions


class ImageFiles:
    """Files `root / paths[i]` with labels `labels[i]`; attributes as of BetonReader.

    Reading raises ValueError, with the file's name, for a file that is not an image.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Sequence[int], class_names: list[str]
    ) -> None:
        self.path = os.fspath(root)
        self._paths = list(paths)
        self.labels = np.asarray(labels, np.int64)
        self.class_names: list[str] | None = class_names
        self.num_classes = len(class_names)
        self.sizes = Sizes(self._read_size, len(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.sizes[index].tolist()
        return height, width

    def image(self, index: int) -> np.ndarray:
        """uint8 [bytes]: a plain JPEG."""
        return np.frombuffer(self._prepared(index).jpeg, np.uint8)

    def is_raw(self, index: int) -> bool:
        """False: every image is returned as a JPEG."""
        return False

    def checksum_ok(self, index: int) -> bool:
        """True: image files have no checksums."""
        return True

    def name(self, index: int) -> str:
        """Path relative to the root."""
        return self._paths[index]

    def sha256(self) -> str:
        """SHA-256 (hex) of names, labels and sizes of the files, whose contents are not read."""
        digest = hashlib.sha256()
        for path, label in zip(self._paths, self.labels.tolist(), strict=True):
            try:
                size = os.stat(os.path.join(self.path, path)).st_size
            except OSError:
                size = -1
            digest.update(f"{path}\0{label}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _read_size(self, index: int) -> tuple[int, int]:
        prepared = self._prepared(index)
        return prepared.height, prepared.width

    def _prepared(self, index: int) -> Prepared:
        path = os.path.join(self.path, self._paths[index])
        try:
            return prepare(read_image(path), max_side=0, check="quick")
        except UnreadableImage as error:
            raise ValueError(f"{path} cannot be read: {error}") from None


class Sizes:
    """sizes[samples] -> int64 [n, 2]: heights and widths, each read on its first access."""

    def __init__(self, read: Callable[[int], tuple[int, int]], num_images: int) -> None:
        self._read = read
        self._table = np.zeros((num_images, 2), np.int64)  # 0: not read yet

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, samples: np.ndarray | int) -> np.ndarray:
        for index in np.atleast_1d(samples).tolist():
            if not self._table[index, 0]:
                self._table[index] = self._read(index)
        return self._table[samples]


def open_folder(folder: Path) -> dict[str, ImageFiles]:
    """{"train": ..., "val": ...}, as bt-convert orders and labels them. Raises SourceError."""
    opened: dict[str, ImageFiles] = {}
    for name, split in find_splits(folder, SourceOptions()).items():
        manifest = Manifest(split, class_names=opened["train"].class_names if opened else None)
        for path, reason in split.problems:
            raise SourceError(f"{split.root / path}: {reason}")
        names, labels = zip(*((image.name, image.label) for image in manifest), strict=True)
        opened[name] = ImageFiles(split.root, names, labels, manifest.class_names)
    return opened
