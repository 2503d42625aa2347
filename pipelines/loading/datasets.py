"""Image data sets that are read by sample index, and opening the one that a flag names."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipelines.beton import BetonReader
from pipelines.convert.sources.shards import read_dataset
from pipelines.webdataset.reader import ShardReader


class ImageDataset(Protocol):
    """Encoded images with labels: what BetonReader, ShardReader and ImageFiles have in common."""

    path: str
    num_classes: int
    class_names: list[str] | None

    @property
    def labels(self) -> np.ndarray: ...  # int64 [N], -1 = no class
    @property
    def sizes(self) -> Any: ...  # indexed by samples int64 [n] -> int64 [n, 2]: heights, widths
    def __len__(self) -> int: ...
    def size(self, index: int) -> tuple[int, int]: ...  # height, width
    def image(self, index: int) -> np.ndarray: ...  # uint8 [bytes]: a JPEG, or raw pixels
    def is_raw(self, index: int) -> bool: ...
    def name(self, index: int) -> str: ...
    def checksum_ok(self, index: int) -> bool: ...
    def sha256(self) -> str: ...


def open_data(path: str | Path, flag: str = "--data") -> BetonReader | ShardReader:
    """The data set at `path`: a `.beton`, or the training images of a folder of web shards.

    `image(i)` is the JPEG file of an image, uint8 [bytes], `name(i)` its name; `labels` are int64
    [n], -1 without a class (of shards, those of a random sample are read).

    Raises ValueError, which names `flag`, if the data set is missing or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"{flag} {path} does not exist; pass its path, or create it:"
            f" bt-convert IMAGE_FOLDER {path}"
        )
    return ShardReader(path) if path.is_dir() else BetonReader(path)


def open_val(data: Path, val_data: Path | None) -> BetonReader | ShardReader | None:
    """The held-out images of --val-data, else those that bt-convert wrote beside --data."""
    if val_data is not None:
        return open_data(val_data, "--val-data")
    if data.is_dir():
        return ShardReader(data, "val") if "val" in read_dataset(data)["splits"] else None
    beside = data.with_suffix(f".val{data.suffix}")
    return BetonReader(beside) if beside.exists() else None


def require_equal_shares(batch_size: int, world_size: int) -> None:
    """Raise ValueError unless the ranks can divide a batch."""
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"--batch-size {batch_size} does not divide by {world_size} ranks")


def require_full_batches(
    batch_size: int, world_size: int, num_images: int, path: str | Path
) -> None:
    """Raise ValueError unless the ranks can divide a batch and there are images for one."""
    require_equal_shares(batch_size, world_size)
    if batch_size > num_images:
        raise ValueError(
            f"--batch-size {batch_size} is more than the {num_images} images of {path};"
            " a batch is always full, so choose a smaller one; recipes for few images are in"
            " docs/small-data.md"
        )
