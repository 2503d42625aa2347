"""The ffcv loader: FFCV's pixels, its thread, and damage that only FFCV meets."""

import sys
import threading

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import drawn_picture, write_photo_beton
from PIL import Image
from test_loader import damaged, loader_of, stopped_by, without_checksums

pytest.importorskip("ffcv", reason="ffcv is not installed", exc_type=ImportError)
import cv2

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.ffcv_stream import RequestIterator
from pipelines.loading.loader import Request


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, RequestIterator)]


def write_with_ffcv(path, pictures: list[Image.Image], mode: str) -> BetonReader:
    from ffcv.fields import FloatField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Pictures:
        def __len__(self):
            return len(pictures)

        def __getitem__(self, index):
            return float(index), pictures[index]

    fields = {"score": FloatField(), "picture": RGBImageField(write_mode=mode, jpeg_quality=95)}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Pictures())
    return BetonReader(path)


def expected_views(reader: BetonReader, request: Request, size: int) -> np.ndarray:
    """uint8 [2, n, size, size, 3]: libjpeg-turbo's fast DCT and OpenCV's area filter."""
    views = np.empty((2, len(request.samples), size, size, 3), np.uint8)
    for row, sample in enumerate(request.samples):
        data = reader.image(sample)
        if reader.is_raw(sample):
            pixels = data.reshape(*reader.size(sample), 3)
        else:
            pixels = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
        for view in (0, 1):
            top, left, height, width = request.boxes[row, view]
            box = np.ascontiguousarray(pixels[top : top + height, left : left + width])
            views[view, row] = cv2.resize(box, (size, size), interpolation=cv2.INTER_AREA)
    return views


def assert_close(views: torch.Tensor, expected: np.ndarray) -> None:
    """Another build of OpenCV or libjpeg-turbo may round otherwise."""
    assert np.abs(views.numpy().astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [32, 224])
def test_views_are_the_boxes_through_ffcvs_filter(tmp_path, size):
    reader = BetonReader(write_photo_beton(tmp_path / "photos.beton", 16, side=500))
    crop = RandomResizedCrop(size=size)
    (batch,) = loader_of(reader, "ffcv", crop=crop, batch_size=16).batches(3, 4)
    assert batch.views.dtype == torch.uint8 and batch.views.is_contiguous()
    assert_close(batch.views, expected_views(reader, batch.request, size))


def test_a_view_half_as_large_as_its_box_is_the_mean_of_two_by_two(tmp_path):
    pictures = [drawn_picture(index, 48, 48) for index in range(6)]
    reader = write_with_ffcv(tmp_path / "raw.beton", pictures, "raw")
    assert all(reader.is_raw(index) for index in range(6))
    whole = RandomResizedCrop(size=24, scale=(1, 1), ratio=(1, 1))
    (batch,) = loader_of(reader, "ffcv", crop=whole, batch_size=6).batches(0, 1)
    for row, sample in enumerate(batch.request.samples):
        expected = torch.from_numpy(np.array(pictures[sample].reduce(2)))
        assert torch.equal(batch.views[0, row], expected)
        assert torch.equal(batch.views[1, row], expected)


def test_files_with_jpegs_and_raw_images(tmp_path):
    pictures = [drawn_picture(index, 50 + index, 40) for index in range(24)]
    reader = write_with_ffcv(tmp_path / "mixed.beton", pictures, "proportion")
    assert {reader.is_raw(index) for index in range(24)} == {True, False}
    loader = loader_of(reader, "ffcv", batch_size=24)
    (batch,) = loader.batches(0, 1)
    assert_close(batch.views, expected_views(reader, batch.request, 24))


def test_a_batch_is_the_consumers_to_keep(reader):
    loader = loader_of(reader, "ffcv", prefetch=1)
    kept, copies = [], []
    for batch in loader.batches(0, 12):  # FFCV would have used three batches' memory in turn
        kept.append(batch.views)
        copies.append(batch.views.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_what_only_ffcv_cannot_decode_is_not_trained_on(small_beton, tmp_path, monkeypatch):
    reader = without_checksums(damaged(small_beton, tmp_path / "damaged.beton", 21))
    loader = loader_of(reader, "ffcv")
    monkeypatch.setattr(loader.backend.decoder, "decode", lambda sample: None)  # native takes it
    message = stopped_by(loader)
    assert "image 21 " in message and "--loader native" in message
    assert not streams()


def test_a_loop_left_early_ends_the_thread_and_can_be_started_again(reader):
    loader = loader_of(reader, "ffcv")
    batches = loader.batches(0, 1000)
    first = next(batches)
    assert len(streams()) == 1
    batches.close()
    assert not streams()
    assert torch.equal(first.views, next(loader.batches(0, 1000)).views)
    assert not streams()


def test_a_thread_that_dies_ends_the_loop(reader, monkeypatch):
    loader = loader_of(reader, "ffcv")
    monkeypatch.setattr(RequestIterator, "run_pipeline", lambda *_: 1 / 0)  # FFCV would block
    with pytest.raises(ZeroDivisionError):
        next(loader.batches(0, 5))


def test_torch_keeps_its_threads(reader):
    torch.set_num_threads(3)
    list(loader_of(reader, "ffcv", num_threads=2).batches(0, 2))
    assert torch.get_num_threads() == 3


def test_without_ffcv_the_message_says_what_to_do(reader, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pipelines.loading.ffcv_stream")
    monkeypatch.delattr("pipelines.loading.ffcv_stream")
    with pytest.raises(ValueError, match=r"--loader ffcv needs FFCV .*or choose --loader native"):
        loader_of(reader, "ffcv")


def test_more_threads_than_numba_has_are_refused(reader):
    with pytest.raises(ValueError, match="--workers 100000 is more than"):
        loader_of(reader, "ffcv", num_threads=100_000)
