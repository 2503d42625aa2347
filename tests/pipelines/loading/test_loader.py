"""What every loader does with a .beton: order, crops, slices of ranks, resuming, damaged data."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import write_beton

from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.crop import RandomResizedCrop, crop_and_resize, random_boxes
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader
from pipelines.order import epoch_order, view_keys

CROP = RandomResizedCrop(size=24)
INSTALLED = {
    "native": True,
    "dali": bool(find_spec("nvidia") and find_spec("nvidia.dali")),
    "ffcv": find_spec("ffcv") is not None,
}
LOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(not installed, reason=f"{name} is not installed"))
    for name, installed in INSTALLED.items()
]


def loader_of(reader, name: str = "native", crop=CROP, **changes) -> Loader:
    settings = {"batch_size": 12, "seed": 7, "num_threads": 1, **changes}
    return open_loader(name, reader, crop, **settings)


def require_same(batches, others) -> None:
    for a, b in zip(batches, others, strict=True):
        assert a.request.step == b.request.step
        assert np.array_equal(a.request.samples, b.request.samples)
        assert all(map(np.array_equal, a.request.keys, b.request.keys))
        assert torch.equal(a.views, b.views)


@pytest.mark.parametrize("name", LOADERS)
def test_batches_follow_the_epoch_orders_and_drop_the_tail(reader, name):
    loader = loader_of(reader, name)
    assert loader.steps_per_epoch == len(loader) == 64 // 12
    batches = [*loader, *loader]  # every iteration is the next epoch
    assert [batch.request.step for batch in batches] == list(range(10))
    for epoch, part in enumerate((batches[:5], batches[5:])):
        samples = np.concatenate([batch.request.samples for batch in part])
        assert np.array_equal(samples, epoch_order(64, 7, epoch)[:60])
        for view in (0, 1):
            keys = view_keys(samples, seed=7, epoch=epoch, view=view)
            assert np.array_equal(np.concatenate([b.request.keys[view] for b in part]), keys)
            boxes = np.concatenate([batch.request.boxes[:, view] for batch in part])
            assert np.array_equal(boxes, random_boxes(CROP, keys, *reader.sizes[samples].T))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("first", [4, 8])
def test_starting_later_gives_the_same_next_20_batches(reader, name, first):
    whole = list(loader_of(reader, name, num_threads=2).batches(0, first + 20))[first:]
    resumed = loader_of(reader, name, prefetch=1).batches(first, first + 20)
    require_same(resumed, whole)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(reader, name, world_size):
    (whole,) = loader_of(reader, name).batches(3, 4)
    parts = [
        next(loader_of(reader, name, rank=rank, world_size=world_size).batches(3, 4))
        for rank in range(world_size)
    ]
    samples = np.concatenate([part.request.samples for part in parts])
    assert np.array_equal(samples, whole.request.samples)
    assert torch.equal(torch.cat([part.views for part in parts], 1), whole.views)


@pytest.mark.parametrize("name", LOADERS)
def test_views_grow_by_epoch_and_boxes_stay(reader, name):
    growing = loader_of(reader, name, sizes=[16, 24, 32])
    fixed = loader_of(reader, name).batches(3, 12)
    for batch, other in zip(growing.batches(3, 12), fixed, strict=True):
        side = 16 + 8 * (batch.request.step // 5)
        assert batch.views.shape == (2, 12, side, side, 3)
        assert np.array_equal(batch.request.boxes, other.request.boxes)
        assert torch.equal(batch.views, other.views) == (side == 24)


@pytest.mark.parametrize("name", LOADERS)
def test_a_loop_left_early_can_be_started_again(reader, name):
    loader = loader_of(reader, name)
    first = next(loader.batches(0, 1000))
    assert torch.equal(first.views, next(loader.batches(0, 1000)).views)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"batch_size": 65}, "--batch-size 65 is more than the 64 images"),
        ({"world_size": 5}, "does not divide by 5 ranks"),
    ],
)
def test_what_cannot_be_loaded_is_refused(reader, changes, message):
    with pytest.raises(ValueError, match=message):
        loader_of(reader, **changes)


# Damage


def damaged(path, copy, sample: int, position: float = 0.5) -> BetonReader:
    """A copy of a .beton with zeros at a share of one record's length."""
    shutil.copy(path, copy)
    start, num_bytes, _ = BetonReader(path).location(sample)
    with open(copy, "r+b") as file:
        file.seek(start + int(num_bytes * position))
        file.write(bytes(40))
    return BetonReader(copy)


def without_checksums(reader: BetonReader) -> BetonReader:
    """As a file that FFCV's writer made."""
    reader.checksum_ok = lambda index: True
    reader.location = lambda index: (0, 0, None)
    return reader


def stopped_by(loader: Loader) -> str:
    with pytest.raises(ValueError) as caught:
        list(loader.batches(0, 6))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_record_stops_the_run_by_index_and_name(small_beton, tmp_path, name):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    message = stopped_by(loader_of(reader, name))
    assert "image 21 (class-1/021.jpg)" in message and "checksum" in message
    due = int(np.flatnonzero(epoch_order(64, 7, 0) == 21)[0]) // 12
    assert len(list(loader_of(reader, name).batches(0, due))) == due


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("position", [0, 0.5])  # the header; the pixels
def test_a_jpeg_that_does_not_decode_stops_the_run_even_without_checksums(
    small_beton, tmp_path, name, position
):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21, position)
    message = stopped_by(loader_of(without_checksums(reader), name))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("recorded", [(30, 50), (400, 600)])
def test_a_jpeg_of_another_size_than_recorded_is_named(tmp_path, name, recorded):
    reader = BetonReader(write_beton(tmp_path / "good.beton", 12))
    with BetonWriter(tmp_path / "bad.beton", num_samples=12, class_names=["a"]) as writer:
        for index in range(12):
            height, width = recorded if index == 5 else reader.size(index)
            writer.add(reader.image(index).tobytes(), height, width, 0, f"a/{index}.jpg")
    message = stopped_by(loader_of(BetonReader(tmp_path / "bad.beton"), name))
    assert "image 5 (a/5.jpg)" in message and f"{recorded[1]}x{recorded[0]}" in message


# The native loader


def test_views_are_the_two_crops_of_the_decoded_image(reader):
    (batch,) = loader_of(reader).batches(6, 7)  # second epoch
    for row, sample in enumerate(batch.request.samples):
        pixels = simplejpeg.decode_jpeg(reader.image(sample), fastdct=False, fastupsample=False)
        for view in (0, 1):
            expected = np.empty((24, 24, 3), np.uint8)
            crop_and_resize(pixels, batch.request.boxes[row, view], out=expected)
            assert np.array_equal(batch.views[view][row], expected)
    assert batch.views.dtype == torch.uint8
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("cache_bytes", [100_000, 10_000_000])
def test_a_cache_changes_nothing_but_the_number_of_decodes(reader, monkeypatch, cache_bytes):
    plain = list(loader_of(reader).batches(0, 20))
    loader = loader_of(reader, cache_bytes=cache_bytes)
    decodes = []
    real = loader.backend.decoder.decode
    monkeypatch.setattr(loader.backend.decoder, "decode", lambda s: decodes.append(s) or real(s))
    require_same(loader.batches(0, 20), plain)
    held = sum(image.nbytes for image in loader.backend.cache.values())
    assert 0 < held <= cache_bytes
    if cache_bytes > 1_000_000:
        assert set(decodes) == set(loader.backend.cache)
        assert len(decodes) <= 2 * 64  # 240 views; two threads may meet at one image
    else:
        assert len(decodes) > 2 * 64


def test_decoding_threads_do_not_change_the_main_threads_parallelism(reader):
    before = torch.get_num_threads()
    list(loader_of(reader, num_threads=2).batches(0, 2))
    assert torch.get_num_threads() == before
