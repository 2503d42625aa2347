"""From batches to views on the training device."""

import torch

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
