"""What is known of the stored images of a split, in at most 25 bytes for each of them.

An image is a duplicate of another if all bytes of their JPEGs are equal; the CRC-32 only finds the
candidates. Images that conversion encodes again are equal afterwards if they were before.
"""

from array import array
from collections.abc import Callable

import numpy as np

from pipelines.convert.jpeg import Prepared

DECODED, BLANK, GREY = 1, 2, 4  # bits of `flags`
ROW = np.dtype(
    [("checksum", "<u4"), ("height", "<u2"), ("width", "<u2"), ("label", "<i4"), ("flags", "u1")]
)


class ImageTable:
    """A row for each of at most `capacity` images, which `read(index)` returns as stored.

    Attributes: `duplicates`, pairs (index, index of the first identical image) one after another.
    """

    def __init__(self, capacity: int, read: Callable[[int], bytes]):
        self.read = read
        self.duplicates = array("I")
        self._num_images = 0
        self._rows = np.zeros(capacity, ROW)
        # A hash table: 1 + index of the first of identical images at its checksum or after it.
        self._slots = np.zeros(1 << (3 * capacity // 2).bit_length(), np.uint32)

    def __len__(self) -> int:
        return self._num_images

    @property
    def rows(self) -> np.ndarray:
        """The rows of all images, ROW [N]."""
        return self._rows[: len(self)]

    def find(self, jpeg: bytes, checksum: int) -> int:
        """Index of the first image with these bytes, whose CRC-32 is `checksum`; -1 for none."""
        return int(self._slots[self._slot(jpeg, checksum)]) - 1

    def add(self, image: Prepared, checksum: int, label: int) -> None:
        """Append an image, which has been stored."""
        index, slot = len(self), self._slot(image.jpeg, checksum)
        if self._slots[slot]:
            self.duplicates.extend((index, int(self._slots[slot]) - 1))
        else:
            self._slots[slot] = index + 1
        flags = DECODED * (image.is_blank is not None)
        flags |= BLANK * bool(image.is_blank) | GREY * bool(image.is_grey)
        self._rows[index] = checksum, image.height, image.width, label, flags
        self._num_images += 1

    def _slot(self, jpeg: bytes, checksum: int) -> int:
        """The slot of the image with these bytes, else the empty one in which it belongs."""
        mask = len(self._slots) - 1
        slot = checksum & mask
        while number := int(self._slots[slot]):
            if self._rows["checksum"][number - 1] == checksum and self.read(number - 1) == jpeg:
                break
            slot = (slot + 1) & mask
        return slot
