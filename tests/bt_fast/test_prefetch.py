"""From batches to views on the training device."""

import pytest
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


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-5), ("bf16", 2e-2)])
def test_views_are_those_of_the_definition_view_a_first(small_beton, precision, tolerance):
    runtime = choose_runtime("cpu", precision, "off")
    batches = list(loader(small_beton).batches(0, 3))
    for batch, views in zip(batches, prefetch(iter(batches), BRANCHES, runtime), strict=True):
        expected = [
            augment.apply(crops, augment.draw(branch, keys), dtype=torch.float32)
            for crops, branch, keys in zip(batch.views, BRANCHES, batch.request.keys, strict=True)
        ]
        assert views.shape == (32, 3, 32, 32)
        assert views.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert views.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(views.float(), torch.cat(expected), atol=tolerance)
