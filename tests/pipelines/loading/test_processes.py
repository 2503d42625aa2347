"""The native backend in other processes. Here its batches are copied to CPU memory."""

import contextlib
import dataclasses
import gc
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_loader import damaged
from tiny_runs import is_running, wait_until

from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader
from pipelines.loading.processes import DecodeProcesses


@pytest.fixture(scope="module")
def native(small_beton) -> Loader:
    crop = RandomResizedCrop(size=24)
    return open_loader("native", BetonReader(small_beton), crop, batch_size=12, sizes=(16, 24))


def processes(dataset, **options) -> DecodeProcesses:
    cpu = torch.device("cpu")
    return DecodeProcesses(dataset, batch_bytes=2 * 12 * 24**2 * 3, device=cpu, **options)


@pytest.fixture
def loader(native) -> Loader:
    return Loader(native.sampler, processes(native.sampler.dataset, num_workers=3))


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


def test_an_iterator_that_was_left_does_not_mix_with_the_next_one(loader, native):
    """As after an error in a notebook, whose traceback keeps the iterator."""
    for _ in range(20):
        left = loader.batches(0, 100)
        next(left)
        require_natives_batches(loader, native, 30, 33)
    with pytest.raises(RuntimeError, match="another of its loader began"):
        next(left)
    require_natives_batches(loader, native, 2, 4)


def workers_of(loader: Loader) -> list[int]:
    """Process IDs of the workers, which are there once a batch is."""
    next(loader.batches(0, 1))
    pid = loader.backend._process.pid
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_signals_that_stop_a_run_leave_the_processes_working(loader, native):
    for pid in (loader.backend._process.pid, *workers_of(loader)):
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, stop)
    require_natives_batches(loader, native, 0, 2)


def test_an_error_arrives_here_and_the_process_goes_on(loader, native, small_beton, tmp_path):
    backend = processes(damaged(small_beton, tmp_path / "damaged.beton", 5))
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


class Missing:
    """A data set that was there when it was opened here."""

    def __reduce__(self):
        return open, ("/missing/data",)


def test_a_data_set_that_cannot_be_opened_there_ends_all(native, capfd):
    backend = processes(Missing(), num_workers=3)
    with pytest.raises(ChildProcessError, match=r"ended unexpectedly \(exit status 1\)"):
        list(backend.crops(native.sampler.requests(0, 9)))
    assert "/missing/data" in capfd.readouterr().err


@pytest.mark.parametrize("killed", ["parent", "worker"])
def test_a_killed_process_ends_all_and_is_named(loader, killed):
    workers = workers_of(loader)
    os.kill(loader.backend._process.pid if killed == "parent" else workers[1], signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"ended unexpectedly \(signal 9\)"):
        list(loader.batches(0, 100))
    wait_until(lambda: not any(map(is_running, workers)), timeout=10)


@pytest.mark.parametrize("where", ["poll", "recv"])
def test_after_an_interrupt_no_batch_is_wrong(loader, native, where):
    """Ctrl-C costs nothing while an answer is awaited; within one, the loader is refused."""
    connection = loader.backend._connections[1]

    class Interrupted:
        def __getattr__(self, name):
            return getattr(connection, name)

    def interrupt(*arguments):
        getattr(connection, where)(*arguments)
        raise KeyboardInterrupt

    loader.backend._connections[1] = Interrupted()
    setattr(loader.backend._connections[1], where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(loader.batches(0, 3))
    loader.backend._connections[1] = connection
    if where == "poll":
        require_natives_batches(loader, native, 3, 6)
    else:
        with pytest.raises(RuntimeError, match="interrupted within a message"):
            next(loader.batches(3, 6))


def test_memory_that_cannot_be_locked_is_released(native, monkeypatch):
    """As where CUDA may lock no more pages."""
    cudart = mock.Mock(**{"cudaHostRegister.return_value": 2})
    monkeypatch.setattr("torch.cuda.cudart", lambda: cudart)
    monkeypatch.setattr("torch.cuda.device", contextlib.nullcontext)
    monkeypatch.setattr("torch.cuda.check_error", mock.Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        DecodeProcesses(native.sampler.dataset, batch_bytes=99, device=torch.device("cuda"))
    gc.collect()
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not any("bt-fast batches" in file for file in files)


def test_the_processes_end_with_the_backend(loader):
    workers = workers_of(loader)
    assert len(workers) == 3
    process = loader.backend._process
    del loader.backend
    assert process.poll() == 0 and not any(map(is_running, workers))
