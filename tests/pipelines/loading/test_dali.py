"""The DALI loader: its pixels against native's, raw records, damage that only DALI meets."""

import numpy as np
import pytest
import simplejpeg
from conftest import write_photo_beton
from test_loader import damaged, loader_of, stopped_by

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed")


def require_nearly_natives(reader, **settings) -> None:
    """The same images and boxes; every view differs by less than half a grey level on average."""
    ours, theirs = (loader_of(reader, name, **settings) for name in ("dali", "native"))
    for a, b in zip(ours.batches(0, 6), theirs.batches(0, 6), strict=True):
        assert np.array_equal(a.request.samples, b.request.samples)
        assert np.array_equal(a.request.boxes, b.request.boxes)
        difference = (a.views.int() - b.views.int()).abs().float()
        assert difference.mean(dim=(2, 3, 4)).max() < 0.5


def test_pixels_are_nearly_natives(tmp_path):
    reader = BetonReader(write_photo_beton(tmp_path / "photos.beton", 24, side=500))
    require_nearly_natives(reader, crop=RandomResizedCrop(), batch_size=8)


class HalfRaw(BetonReader):
    """A file whose even records are RGB rows, as FFCV's writer can make it, without checksums."""

    def is_raw(self, index):
        return index % 2 == 0

    def image(self, index):
        data = super().image(index)
        return simplejpeg.decode_jpeg(data).reshape(-1) if self.is_raw(index) else data

    def checksum_ok(self, index):
        return True

    def location(self, index):
        return (*super().location(index)[:2], None)


def test_raw_records(small_beton):
    require_nearly_natives(HalfRaw(small_beton))


def test_a_record_that_dali_cannot_decode_is_named(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    real = reader.image
    reader.image = lambda index: real(index)[: 300 if index == 21 else None]
    reader.checksum_ok = lambda index: True  # the file changed after it was checked
    message = stopped_by(loader_of(reader, "dali"))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message
