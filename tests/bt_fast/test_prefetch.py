"""From batches to views on the training device."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

import bt_fast.prefetch
from bt_fast.prefetch import prefetch
from bt_fast.runtime import choose_runtime
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader

BRANCHES = (augment.VIEW_A, augment.VIEW_B)


def loader(path, **settings) -> Loader:
    crop = RandomResizedCrop(size=32)
    return open_loader("native", BetonReader(path), crop, batch_size=16, **settings)


def test_views_are_those_of_the_definition_view_a_first(small_beton):
    runtime = choose_runtime("cpu", "fp32", "off")
    batches = list(loader(small_beton).batches(0, 3))
    for batch, views in zip(batches, prefetch(iter(batches), BRANCHES, runtime), strict=True):
        expected = [
            augment.apply(crops, augment.draw(branch, keys), dtype=torch.float32)
            for crops, branch, keys in zip(batch.views, BRANCHES, batch.request.keys, strict=True)
        ]
        assert views.shape == (32, 3, 32, 32)
        assert views.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(views, torch.cat(expected), atol=1e-5)


def test_the_views_dtype_is_the_precisions(small_beton):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        runtime = choose_runtime("cpu", precision, "off")
        (views,) = prefetch(loader(small_beton).batches(0, 1), BRANCHES, runtime)
        assert views.dtype == dtype


def test_views_grow_by_epoch_and_boxes_stay(small_beton):
    growing = loader(small_beton, sizes=[16, 32, 48])
    fixed = loader(small_beton)
    for batch, other in zip(growing.batches(2, 10), fixed.batches(2, 10), strict=True):
        epoch = batch.request.step // 4
        assert batch.views.shape == (2, 16, 16 * (epoch + 1), 16 * (epoch + 1), 3)
        assert np.array_equal(batch.request.samples, other.request.samples)
        if epoch == 1:
            assert torch.equal(batch.views, other.views)


def test_beside_a_gpu_the_host_computes_in_one_thread(monkeypatch):
    """Decoding threads hold the cores; a small operation spread over them takes 100 ms, not 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    torch.set_num_threads(2)
    choose_runtime("cpu", "fp32", "off")
    assert torch.get_num_threads() == 2
    choose_runtime("cuda", "fp32", "off")
    assert torch.get_num_threads() == 1


class Device:
    """A GPU that completes a step only when it is synchronised: how far ahead may the host be?"""

    def __init__(self) -> None:
        self.made, self.recorded, self.done, self.most = 0, 0, 0, 0

    def record_event(self, event=None):
        self.recorded += 1
        return SimpleNamespace(synchronize=lambda step=self.recorded: self.finish(step))

    def finish(self, step: int) -> None:
        self.done = step

    def wait_event(self, event) -> None:
        pass

    def views(self, *_):
        self.made += 1
        self.most = max(self.most, self.made - self.done)
        return SimpleNamespace(record_stream=lambda stream: None)


def test_the_host_makes_no_more_views_than_a_rehearsal_allocates(monkeypatch):
    device, side = Device(), Device()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr("bt_fast.prefetch._augmented", device.views)
    runtime = replace(choose_runtime("cpu", "fp32", "off"), device=torch.device("cuda", 0))
    assert len(list(prefetch(range(10), BRANCHES, runtime))) == device.made == 10
    assert device.most == bt_fast.prefetch.NUM_BATCHES_IN_MEMORY
