"""The DALI loader against native: samples, keys, boxes, pixels; damaged data."""

import re

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import jpeg_bytes, photographs, write_beton
from test_loader import damaged

from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.crop import RandomResizedCrop

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from pipelines.loading import choose
from pipelines.loading.choose import open_loader
from pipelines.loading.dali import CPU

CROP = RandomResizedCrop(size=24)


@pytest.fixture(scope="module")
def reader(small_beton):
    return BetonReader(small_beton)


def loader_of(data, **changes):
    return open_loader("dali", data, CROP, **{"batch_size": 12, "seed": 7, **changes})


def test_samples_keys_and_boxes_are_natives_and_so_are_pixels_nearly(tmp_path):
    pictures = photographs(24)
    path = tmp_path / "photos.beton"
    with BetonWriter(path, num_samples=len(pictures), class_names=["a"]) as writer:
        for index, picture in enumerate(pictures):
            writer.add(jpeg_bytes(picture), picture.height, picture.width, 0, f"a/{index}.jpg")
    crop, settings = RandomResizedCrop(), {"batch_size": 8, "seed": 3}
    native = open_loader("native", BetonReader(path), crop, **settings)
    dali = open_loader("dali", BetonReader(path), crop, **settings)
    for a, b in zip(native.batches(0, 6), dali.batches(0, 6), strict=True):
        assert a.request.step == b.request.step and np.array_equal(
            a.request.samples, b.request.samples
        )
        assert all(map(np.array_equal, a.request.keys, b.request.keys))
        difference = (a.views.int() - b.views.int()).abs().float()
        assert difference.mean(dim=(2, 3, 4)).max() < 0.5  # of every single view
    for a, b in zip(native.sampler.requests(0, 6), dali.sampler.requests(0, 6), strict=True):
        assert np.array_equal(a.boxes, b.boxes)


def test_three_loaders_one_order(reader):
    pytest.importorskip("ffcv", reason="ffcv is not installed")

    loaders = [
        open_loader(name, reader, CROP, batch_size=12, seed=7)
        for name in ("native", "dali", "ffcv")
    ]
    for native, dali, ffcv in zip(*(loader.batches(3, 8) for loader in loaders), strict=True):
        for other in (dali, ffcv):
            assert native.request.step == other.request.step and np.array_equal(
                native.request.samples, other.request.samples
            )
            assert all(map(np.array_equal, native.request.keys, other.request.keys))
    for native, dali, ffcv in zip(*(x.sampler.requests(3, 8) for x in loaders), strict=True):
        assert np.array_equal(native.boxes, dali.boxes)
        assert np.array_equal(native.boxes, ffcv.boxes)


def test_views_grow_by_epoch(reader):
    growing = loader_of(reader, sizes=[16, 32, 48])
    native = open_loader("native", reader, CROP, batch_size=12, seed=7, sizes=[16, 32, 48])
    for a, b in zip(growing.batches(3, 12), native.batches(3, 12), strict=True):
        assert a.views.shape == b.views.shape
        assert (a.views.int() - b.views.int()).abs().float().mean() < 0.5


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
    mixed = HalfRaw(small_beton)
    native = open_loader("native", mixed, CROP, batch_size=12, seed=7)
    for a, b in zip(loader_of(mixed).batches(0, 5), native.batches(0, 5), strict=True):
        assert (a.views.int() - b.views.int()).abs().float().mean(dim=(2, 3, 4)).max() < 0.5


def test_auto_measures_both(reader, monkeypatch):
    monkeypatch.setattr(choose, "MEASURE_SECONDS", 0.2)
    name, why = choose.choose_loader(
        "auto",
        reader,
        10**8,
        lambda name: choose.open_loader(name, reader, CROP, device=CPU, batch_size=12),
        cache=False,
        device=torch.device("cuda", 0),
    )
    found = re.fullmatch(
        r"(\w+) \(measured on one rank, images/s: native ([\d,]+), dali ([\d,]+)\)", why
    )
    native, dali = (int(found[place].replace(",", "")) for place in (2, 3))
    assert native > 0 and dali > 0
    assert name == found[1] == ("dali" if dali > 1.1 * native else "native")


# Damage


def stopped_by(loader) -> str:
    with pytest.raises(ValueError) as caught:
        list(loader.batches(0, 6))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_record_is_named(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "checksum" in message


def test_damage_that_dali_would_take_for_good_is_found_without_checksums(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    reader.checksum_ok = lambda index: True  # as in a file the stock writer made
    reader.location = lambda index: (0, 0, None)
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message


def test_a_record_that_dali_cannot_decode_is_named(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    real = reader.image
    reader.image = lambda index: real(index)[: 300 if index == 21 else None]
    reader.checksum_ok = lambda index: True  # the file changed after it was checked
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message


@pytest.mark.parametrize("recorded", [(30, 50), (400, 600)])
def test_a_jpeg_of_another_size_than_recorded_is_named(tmp_path, recorded):
    path = write_beton(tmp_path / "good.beton", 12)
    reader = BetonReader(path)
    with BetonWriter(tmp_path / "bad.beton", num_samples=12, class_names=["a"]) as writer:
        for index in range(12):
            height, width = recorded if index == 5 else reader.size(index)
            writer.add(reader.image(index).tobytes(), height, width, 0, f"a/{index}.jpg")
    message = stopped_by(loader_of(BetonReader(tmp_path / "bad.beton")))
    assert "image 5 (a/5.jpg)" in message and f"{recorded[1]}x{recorded[0]}" in message
