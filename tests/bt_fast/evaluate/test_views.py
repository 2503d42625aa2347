"""Views for evaluations whose batches become larger."""

import numpy as np
import torch

from bt_fast.evaluate import views as module
from bt_fast.evaluate.views import Views
from bt_fast.runtime import Runtime
from pipelines.loading.processes import DecodeProcesses


def test_a_larger_batch_gets_another_backend(reader, monkeypatch):
    """As on a GPU, where decoding processes share memory of the size of a batch."""
    runtime = Runtime(device=torch.device("cpu"), precision="fp32", compile="off")
    options = {"size": 24, "num_threads": 2}
    samples, sizes, opened = np.arange(20), (4, 9, 5, 20), []

    def random_views(views: Views, batch_size: int) -> torch.Tensor:
        batches = views.random(samples, min_scale=0.2, seed=0, epoch=0, batch_size=batch_size)
        return torch.cat(list(batches))

    expected = random_views(Views(reader, runtime, **options), 20)

    def processes(dataset, device, *, num_threads, batch_bytes, cache_bytes):
        opened.append(batch_bytes // (24**2 * 3))
        return DecodeProcesses(dataset, device=device, batch_bytes=batch_bytes)

    monkeypatch.setattr(module, "native_backend", processes)
    views = Views(reader, runtime, **options)
    assert all(torch.equal(random_views(views, size), expected) for size in sizes)
    assert opened == [4, 9, 20]
