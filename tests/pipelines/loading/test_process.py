"""The native backend in a process of its own. Here its batches are copied to CPU memory."""

import dataclasses
import os
import signal

import pytest
import torch
from test_loader import damaged

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader
from pipelines.loading.process import DecodeProcess


@pytest.fixture(scope="module")
def native(small_beton) -> Loader:
    crop = RandomResizedCrop(size=24)
    return open_loader("native", BetonReader(small_beton), crop, batch_size=12, sizes=(16, 24))


@pytest.fixture
def loader(native) -> Loader:
    backend = DecodeProcess(
        native.sampler.dataset, batch_bytes=2 * 12 * 24**2 * 3, device=torch.device("cpu")
    )
    return Loader(native.sampler, backend)


def require_natives_batches(loader, native, *steps: int) -> None:
    pairs = list(zip(loader.batches(*steps), native.batches(*steps), strict=True))
    assert len(pairs) == steps[1] - steps[0]
    assert all(torch.equal(ours.views, theirs.views) for ours, theirs in pairs)


def test_batches_are_natives_and_may_be_kept(loader, native):
    """More batches than there are slots, of two sizes, then of another iteration."""
    require_natives_batches(loader, native, 0, 12)
    unfinished = loader.batches(3, 100)
    next(unfinished)
    unfinished.close()
    require_natives_batches(loader, native, 7, 9)


def test_signals_that_stop_a_run_leave_the_process_working(loader, native):
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(loader.backend._process.pid, stop)
    require_natives_batches(loader, native, 0, 2)


def test_an_error_arrives_here_and_the_process_goes_on(loader, native, small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 5)
    backend = DecodeProcess(reader, batch_bytes=2 * 12 * 24**2 * 3, device=torch.device("cpu"))
    requests = list(native.sampler.requests(0, 5))
    bad = next(request for request in requests if 5 in request.samples)
    good = next(request for request in requests if 5 not in request.samples)
    with pytest.raises(ValueError, match=r"image 5 .* is not what was converted"):
        list(backend.crops([bad] * 9))
    (crops,) = backend.crops([good])
    (expected,) = native.backend.crops([good])
    assert torch.equal(crops, expected)
    wrong = dataclasses.replace(good, boxes=good.boxes * 10_000)
    with pytest.raises(RuntimeError, match="should be greater than 0"):
        list(backend.crops([wrong]))


def test_a_killed_process_is_named(loader):
    os.kill(loader.backend._process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"ended unexpectedly \(signal 9\)"):
        next(loader.batches(0, 1))


def test_the_process_ends_with_the_backend(native):
    backend = DecodeProcess(native.sampler.dataset, batch_bytes=4096, device=torch.device("cpu"))
    process = backend._process
    del backend
    assert process.poll() is not None
