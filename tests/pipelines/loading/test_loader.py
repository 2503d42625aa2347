"""The native loader: order, crops, rank slices, resuming, and damaged data."""

import shutil

import numpy as np
import pytest
import simplejpeg
import torch

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop, crop_and_resize, random_boxes
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader
from pipelines.order import epoch_order, view_keys

CROP = RandomResizedCrop(size=24)


@pytest.fixture
def reader(small_beton) -> BetonReader:
    return BetonReader(small_beton)


def loader_of(reader, **changes) -> Loader:
    return open_loader("native", reader, CROP, **{"batch_size": 12, "seed": 7, **changes})


def test_batches_follow_the_epoch_orders_and_drop_the_tail(reader):
    loader = loader_of(reader)
    assert loader.steps_per_epoch == 64 // 12
    batches = list(loader.batches(0, 2 * loader.steps_per_epoch))
    for epoch in (0, 1):
        part = batches[epoch * 5 : (epoch + 1) * 5]
        seen = np.concatenate([batch.request.samples for batch in part])
        assert np.array_equal(seen, epoch_order(64, 7, epoch)[:60])
    assert [batch.request.step for batch in batches] == list(range(10))


def test_every_iteration_is_the_next_epoch(reader):
    loader = loader_of(reader)
    assert len(loader) == 5
    batches = [*loader, *loader]
    assert [batch.request.step for batch in batches] == list(range(10))
    for ours, theirs in zip(batches, loader_of(reader).batches(0, 10), strict=True):
        assert torch.equal(ours.views, theirs.views)


def test_views_are_the_two_crops_of_the_decoded_image(reader):
    batch = next(loader_of(reader).batches(6, 7))  # second epoch
    for view in (0, 1):
        keys = view_keys(batch.request.samples, seed=7, epoch=1, view=view)
        assert np.array_equal(batch.request.keys[view], keys)
        boxes = random_boxes(CROP, keys, *reader.sizes[batch.request.samples].T)
        for row, sample in enumerate(batch.request.samples):
            pixels = simplejpeg.decode_jpeg(reader.image(sample), fastdct=False, fastupsample=False)
            expected = np.empty((24, 24, 3), np.uint8)
            crop_and_resize(pixels, boxes[row], out=expected)
            assert np.array_equal(batch.views[view][row], expected)
    assert batch.views[0].dtype == torch.uint8
    assert not torch.equal(batch.views[0], batch.views[1])


@pytest.mark.parametrize("first", [1, 4, 5, 8])
def test_starting_later_gives_the_same_batches(reader, first):
    whole = list(loader_of(reader).batches(0, 10))[first:]
    resumed = list(loader_of(reader, num_threads=3, prefetch=1).batches(first, 10))
    for a, b in zip(whole, resumed, strict=True):
        assert a.request.step == b.request.step and np.array_equal(
            a.request.samples, b.request.samples
        )
        assert torch.equal(a.views, b.views)


@pytest.mark.parametrize("cache_bytes", [100_000, 10_000_000])
def test_a_cache_changes_nothing_but_the_number_of_decodes(reader, monkeypatch, cache_bytes):
    plain = list(loader_of(reader).batches(0, 20))
    loader = loader_of(reader, cache_bytes=cache_bytes)
    decodes = []
    real = loader.backend.decoder.decode
    monkeypatch.setattr(loader.backend.decoder, "decode", lambda s: decodes.append(s) or real(s))
    for a, b in zip(plain, loader.batches(0, 20), strict=True):
        assert torch.equal(a.views, b.views)
    held = sum(image.nbytes for image in loader.backend.cache.values())
    assert 0 < held <= cache_bytes
    if cache_bytes > 1_000_000:
        assert set(decodes) == set(loader.backend.cache)
        assert len(decodes) <= 2 * 64  # 240 views; two threads may meet at one image
    else:
        assert len(decodes) > 2 * 64


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(reader, world_size):
    whole = next(loader_of(reader).batches(3, 4))
    parts = [
        next(loader_of(reader, rank=rank, world_size=world_size).batches(3, 4))
        for rank in range(world_size)
    ]
    assert np.array_equal(
        np.concatenate([part.request.samples for part in parts]), whole.request.samples
    )
    assert torch.equal(torch.cat([part.views[1] for part in parts]), whole.views[1])


def damaged(path, copy, sample: int):
    """A copy of a .beton with a few bytes in the middle of one JPEG overwritten."""
    shutil.copy(path, copy)
    reader = BetonReader(path)
    data = reader.image(sample)
    offset = reader._ptrs[sample] + len(data) // 2
    with open(copy, "r+b") as file:
        file.seek(int(offset))
        file.write(b"\0" * 40)
    return BetonReader(copy)


def test_a_damaged_record_stops_the_run_by_index_and_name(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    with pytest.raises(ValueError, match=r"image 21 \(class-1/021.jpg\).*checksum") as caught:
        list(loader_of(reader).batches(0, 6))
    assert "\n" not in str(caught.value)


def test_a_jpeg_that_does_not_decode_stops_the_run_even_without_checksums(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    reader.checksum_ok = lambda index: True  # as in a file the stock writer made
    with pytest.raises(ValueError, match=r"image 21 \(class-1/021.jpg\).*does not decode"):
        list(loader_of(reader).batches(0, 6))


def test_a_batch_larger_than_the_data_is_refused(reader):
    with pytest.raises(ValueError, match=r"--batch-size 65 is more than the 64 images"):
        loader_of(reader, batch_size=65)


def test_a_batch_the_ranks_cannot_share_is_refused(reader):
    with pytest.raises(ValueError, match="does not divide by 5 ranks"):
        loader_of(reader, world_size=5)


def test_a_loop_left_early_can_be_started_again(reader):
    loader = loader_of(reader)
    first = next(loader.batches(0, 1000))
    again = next(loader.batches(0, 1000))
    assert torch.equal(first.views[0], again.views[0])


def test_decoding_threads_do_not_change_the_main_threads_parallelism(reader):
    before = torch.get_num_threads()
    list(loader_of(reader, num_threads=2).batches(0, 2))
    assert torch.get_num_threads() == before


def test_ranks_that_change_in_number_see_every_sample_once(small_beton):
    """Two steps of an epoch on four ranks, the other two on two."""
    reader, seen = BetonReader(small_beton), []
    for world_size, steps in ((4, (0, 2)), (2, (2, 4))):
        for rank in range(world_size):
            loader = open_loader(
                "native",
                reader,
                RandomResizedCrop(size=16),
                batch_size=16,
                rank=rank,
                world_size=world_size,
            )
            seen += [batch.request.samples for batch in loader.batches(*steps)]
    assert sorted(np.concatenate(seen)) == list(range(64))
