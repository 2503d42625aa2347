"""The ffcv loader: native's samples and boxes, FFCV's pixels; resuming, damage, ends."""

import shutil
import sys
import threading

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import IMAGENET_SAMPLE, drawn_picture, jpeg_bytes, photographs
from PIL import Image

pytest.importorskip("ffcv", reason="ffcv is not installed", exc_type=ImportError)
import cv2

from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.crop import RandomResizedCrop, random_boxes
from pipelines.loading.choose import open_loader
from pipelines.loading.ffcv_stream import RequestIterator
from pipelines.order import epoch_order, view_keys

CROP = RandomResizedCrop(size=24)


@pytest.fixture
def reader(small_beton) -> BetonReader:
    return BetonReader(small_beton)


def loader_of(reader, name="ffcv", crop=CROP, **changes):
    return open_loader(
        name, reader, crop, **{"batch_size": 12, "seed": 7, "num_threads": 1, **changes}
    )


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, RequestIterator)]


def write_photos(path, count: int) -> BetonReader:
    photos = photographs(count)
    with BetonWriter(path, num_samples=count, class_names=["photo"]) as writer:
        for index, photo in enumerate(photos):
            writer.add(jpeg_bytes(photo), photo.height, photo.width, 0, f"photo/{index}.jpg")
        writer.finalize()
    return BetonReader(path)


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


def expected_views(reader: BetonReader, samples, boxes: list[np.ndarray], size: int) -> np.ndarray:
    """uint8 [2, n, size, size, 3]: libjpeg-turbo's fast DCT and OpenCV's area filter."""
    views = np.empty((2, len(samples), size, size, 3), np.uint8)
    for row, sample in enumerate(samples):
        data = reader.image(sample)
        if reader.is_raw(sample):
            pixels = data.reshape(*reader.size(sample), 3)
        else:
            pixels = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=False)
        for view in (0, 1):
            top, left, height, width = boxes[view][row]
            box = np.ascontiguousarray(pixels[top : top + height, left : left + width])
            views[view, row] = cv2.resize(box, (size, size), interpolation=cv2.INTER_AREA)
    return views


def assert_close(views: torch.Tensor, expected: np.ndarray) -> None:
    """Another build of OpenCV or libjpeg-turbo may round otherwise."""
    assert np.abs(views.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_samples_and_keys_are_those_of_the_native_loader(reader):
    loader, native = loader_of(reader), loader_of(reader, "native")
    assert loader.steps_per_epoch == native.steps_per_epoch == 5
    for ours, theirs in zip(loader.batches(0, 10), native.batches(0, 10), strict=True):
        assert ours.request.step == theirs.request.step
        assert np.array_equal(ours.request.samples, theirs.request.samples)
        assert np.array_equal(ours.request.keys, theirs.request.keys)
        start = ours.request.step % 5 * 12
        expected = epoch_order(64, 7, ours.request.step // 5)[start : start + 12]
        assert np.array_equal(ours.request.samples, expected)


@pytest.mark.parametrize("size", [32, 224])
def test_views_are_the_boxes_through_ffcvs_filter(tmp_path, size):
    reader = write_photos(tmp_path / "photos.beton", 16)
    crop = RandomResizedCrop(size=size)
    (batch,) = loader_of(reader, crop=crop, batch_size=16).batches(3, 4)
    boxes = [
        random_boxes(
            crop,
            view_keys(batch.request.samples, seed=7, epoch=3, view=view),
            *reader.sizes[batch.request.samples].T,
        )
        for view in (0, 1)
    ]
    assert batch.views.shape == (2, 16, size, size, 3) and batch.views.dtype == torch.uint8
    assert batch.views.is_contiguous()
    assert_close(batch.views, expected_views(reader, batch.request.samples, boxes, size))


@pytest.mark.skipif(not IMAGENET_SAMPLE.exists(), reason="needs the ImageNet sample")
def test_pixels_differ_from_natives_by_about_two_grey_levels(tmp_path):
    """1.9 in the mean over the sample's 500 images as they are; these are encoded once more."""
    reader = write_photos(tmp_path / "photos.beton", 48)
    settings = {"crop": RandomResizedCrop(size=224), "batch_size": 48}
    (ours,) = loader_of(reader, **settings).batches(0, 1)
    (theirs,) = loader_of(reader, "native", **settings).batches(0, 1)
    difference = (ours.views.int() - theirs.views.int()).abs().float().mean().item()
    assert 0.5 < difference < 3  # other boxes would differ by 50


def test_a_view_half_as_large_as_its_box_is_the_mean_of_two_by_two(tmp_path):
    pictures = [drawn_picture(index, 48, 48) for index in range(6)]
    reader = write_with_ffcv(tmp_path / "raw.beton", pictures, "raw")
    assert all(reader.is_raw(index) for index in range(6))
    whole = RandomResizedCrop(size=24, scale=(1, 1), ratio=(1, 1))
    (batch,) = loader_of(reader, crop=whole, batch_size=6).batches(0, 1)
    for row, sample in enumerate(batch.request.samples):
        expected = torch.from_numpy(np.array(pictures[sample].reduce(2)))
        assert torch.equal(batch.views[0, row], expected)
        assert torch.equal(batch.views[1, row], expected)


def test_files_with_jpegs_and_raw_images(tmp_path):
    pictures = [drawn_picture(index, 50 + index, 40) for index in range(24)]
    reader = write_with_ffcv(tmp_path / "mixed.beton", pictures, "proportion")
    assert {reader.is_raw(index) for index in range(24)} == {True, False}
    loader = loader_of(reader, batch_size=24)
    (request,) = loader.sampler.requests(0, 1)
    (batch,) = loader.batches(0, 1)
    boxes = [request.boxes[:, view] for view in (0, 1)]
    assert_close(batch.views, expected_views(reader, batch.request.samples, boxes, 24))


@pytest.mark.parametrize("first", [4, 8])
def test_starting_later_gives_the_same_next_twenty_batches(reader, first):
    loader = loader_of(reader, num_threads=2)
    whole = list(loader.batches(0, first + 20))[first:]
    resumed = list(loader_of(reader, prefetch=1).batches(first, first + 20))
    for a, b in zip(whole, resumed, strict=True):
        assert a.request.step == b.request.step and np.array_equal(
            a.request.samples, b.request.samples
        )
        assert torch.equal(a.views, b.views)


def test_two_ranks_share_the_global_batch(reader):
    (whole,) = loader_of(reader).batches(3, 4)
    parts = [next(loader_of(reader, rank=r, world_size=2).batches(3, 4)) for r in (0, 1)]
    assert np.array_equal(
        np.concatenate([part.request.samples for part in parts]), whole.request.samples
    )
    assert torch.equal(torch.cat([part.views for part in parts], dim=1), whole.views)


def test_views_grow_by_epoch(reader):
    loader = loader_of(reader, sizes=[16, 24, 32, 40])
    fixed = loader_of(reader).batches(3, 8)
    for batch, other in zip(loader.batches(3, 8), fixed, strict=True):
        side = 16 + 8 * (batch.request.step // 5)
        assert batch.views.shape == (2, 12, side, side, 3)
        assert torch.equal(batch.views, other.views) == (side == 24)


def test_a_batch_is_the_consumers_to_keep(reader):
    loader = loader_of(reader, prefetch=1)
    kept, copies = [], []
    for batch in loader.batches(0, 12):  # FFCV would have used three batches' memory in turn
        kept.append(batch.views)
        copies.append(batch.views.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def damaged(reader: BetonReader, copy, sample: int, position: float, data: bytes) -> BetonReader:
    """A copy of a .beton with `data` written at a share of one record's length."""
    shutil.copy(reader.path, copy)
    start, num_bytes, _ = reader.location(sample)
    with open(copy, "r+b") as file:
        file.seek(start + int(num_bytes * position))
        file.write(data)
    return BetonReader(copy)


def test_a_damaged_record_stops_the_run_by_index_and_name(reader, tmp_path):
    reader = damaged(reader, tmp_path / "damaged.beton", 21, 0.5, bytes(40))
    due = int(np.flatnonzero(epoch_order(64, 7, 0) == 21)[0]) // 12
    seen = 0
    with pytest.raises(ValueError, match=r"image 21 \(class-1/021.jpg\).*checksum") as caught:
        for _ in loader_of(reader).batches(0, 6):
            seen += 1
    assert "\n" not in str(caught.value)
    assert seen == due  # the batches before it are whole
    assert not streams()


@pytest.mark.parametrize("position", [0, 0.5])  # the header; the pixels
def test_a_jpeg_that_does_not_decode_stops_the_run_even_without_checksums(
    reader, tmp_path, position
):
    reader = damaged(reader, tmp_path / "damaged.beton", 21, position, bytes(40))
    reader.checksum_ok = lambda index: True  # as in a file the stock writer made
    with pytest.raises(ValueError, match=r"image 21 \(class-1/021.jpg\).*does not decode"):
        list(loader_of(reader).batches(0, 6))
    assert not streams()


def test_a_jpeg_of_another_size_than_recorded_stops_the_run(tmp_path):
    path = tmp_path / "sizes.beton"
    with BetonWriter(path, num_samples=8, class_names=["one"]) as writer:
        for index in range(8):
            side = 80 if index == 5 else 40
            writer.add(jpeg_bytes(drawn_picture(index, side, side)), 40, 40, 0, f"{index}.jpg")
        writer.finalize()
    with pytest.raises(ValueError, match=r"image 5 \(5.jpg\).* is 80x80 but was recorded as 40x40"):
        list(loader_of(BetonReader(path), batch_size=8).batches(0, 1))


def test_what_only_ffcv_cannot_decode_is_not_trained_on(reader, tmp_path, monkeypatch):
    reader = damaged(reader, tmp_path / "damaged.beton", 21, 0.5, bytes(40))
    reader.checksum_ok = lambda index: True
    loader = loader_of(reader)
    monkeypatch.setattr(loader.backend.decoder, "decode", lambda sample: None)  # native takes it
    with pytest.raises(ValueError, match=r"image 21 .* with FFCV's libjpeg-turbo.*--loader native"):
        list(loader.batches(0, 6))


def test_a_loop_left_early_ends_the_thread_and_can_be_started_again(reader):
    loader = loader_of(reader)
    batches = loader.batches(0, 1000)
    first = next(batches)
    assert len(streams()) == 1
    batches.close()
    assert not streams()
    assert torch.equal(first.views, next(loader.batches(0, 1000)).views)
    assert not streams()


def test_two_loops_at_once(reader):
    loader = loader_of(reader, num_threads=2)
    one, other = loader.batches(0, 20), loader.batches(0, 20)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.views, b.views)


def test_a_thread_that_dies_ends_the_loop(reader, monkeypatch):
    loader = loader_of(reader)
    monkeypatch.setattr(RequestIterator, "run_pipeline", lambda *_: 1 / 0)  # FFCV would block
    with pytest.raises(ZeroDivisionError):
        next(loader.batches(0, 5))


def test_torch_keeps_its_threads(reader):
    torch.set_num_threads(3)
    list(loader_of(reader, num_threads=2).batches(0, 2))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"batch_size": 65}, r"--batch-size 65 is more than the 64 images"),
        ({"world_size": 5}, "does not divide by 5 ranks"),
        ({"cache_bytes": 1}, "--cache-gb needs --loader native"),
        ({"num_threads": 100_000}, "--workers 100000 is more than .* NUMBA_NUM_THREADS=100000"),
    ],
)
def test_what_it_cannot_do_is_refused(reader, changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(reader, **changes)


def test_without_ffcv_the_message_says_what_to_do(reader, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pipelines.loading.ffcv_stream")
    monkeypatch.delattr("pipelines.loading.ffcv_stream")
    with pytest.raises(ValueError, match=r"--loader ffcv needs FFCV .*or choose --loader native"):
        loader_of(reader)
