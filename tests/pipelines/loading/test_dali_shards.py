"""Web shards in the order of DALI's reader; ranks and resuming, also of a .beton with DALI."""

import json
import shutil
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import write_beton
from test_dali import CROP, stopped_by
from tiny_runs import TINY, learned, start, wait_for_step

from bt_fast import train
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.run.directory import RunDirectory
from pipelines.beton import BetonReader
from pipelines.convert.command import main as convert
from pipelines.loading import dali_shards
from pipelines.loading.choose import open_loader
from pipelines.loading.loader import Loader, Sampler
from pipelines.loading.native import NativeBackend
from pipelines.order import view_keys
from pipelines.webdataset.reader import ShardReader


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """64 pictures in several archives, whose blocks and buffers are small in these tests."""
    root = tmp_path_factory.mktemp("dali")
    beton = write_beton(root / "large.beton", 64, sizes=((400, 560), (640, 480)))
    flags = ["--format=webdataset", "--shard-size=1", "--workers=1"]
    assert convert([str(beton), str(root / "shards"), *flags]) == 0
    assert len(list((root / "shards").glob("*.tar"))) > 2
    return root / "shards"


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(dali_shards, "SHUFFLE_BUFFER_SIZE", 12)
    monkeypatch.setattr(dali_shards, "MIN_BLOCK", 4)


def loader_of(data, **changes):
    settings = {"batch_size": 12, "seed": 7, **changes}
    return open_loader("dali", data, CROP, **settings)


@pytest.fixture(params=["beton", "shards"])
def data(request, small_beton, shards):
    return BetonReader(small_beton) if request.param == "beton" else ShardReader(shards)


def require_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert a.request.step == b.request.step and np.array_equal(
            a.request.samples, b.request.samples
        )
        assert all(map(np.array_equal, a.request.keys, b.request.keys))
        assert torch.equal(a.views, b.views)


def test_an_epoch_of_shards_has_every_image_once_in_an_order_of_its_own(shards):
    loader = loader_of(ShardReader(shards), batch_size=16)
    batches = list(loader.batches(0, 8))
    orders = [
        np.concatenate([b.request.samples for b in batches[4 * e : 4 * e + 4]]) for e in (0, 1)
    ]
    for order in orders:
        assert sorted(order) == list(range(64))
    assert not np.array_equal(*orders)
    archive = np.searchsorted(loader.sampler.shards.first, orders[0][:16], "right")
    assert len(set(archive)) > 2  # a batch mixes what lies apart
    other = loader_of(ShardReader(shards), batch_size=16, seed=8).batches(0, 4)
    assert not np.array_equal(np.concatenate([b.request.samples for b in other]), orders[0])


def test_views_of_shards_are_those_that_native_cuts_from_the_same_images(shards):
    reader = ShardReader(shards)
    batches = loader_of(reader).batches(4, 7)  # across the end of the first epoch
    native = Loader(Sampler(reader, CROP, batch_size=12, seed=7), NativeBackend(reader))
    for batch in batches:
        epoch = batch.request.step // 5
        for view in (0, 1):
            keys = view_keys(batch.request.samples, seed=7, epoch=epoch, view=view)
            assert np.array_equal(batch.request.keys[view], keys)
        native.sampler.samples = lambda *_, b=batch.request: iter([(b.step, b.samples, None)])
        (expected,) = native.batches(batch.request.step, batch.request.step + 1)
        assert (batch.views.int() - expected.views.int()).abs().float().mean() < 0.5


def test_the_bytes_are_those_of_the_image_whose_number_is_given(shards):
    reader = ShardReader(shards)
    steps = list(loader_of(reader).sampler.samples(0, 10))  # all held at once
    for _, samples, encoded in steps:
        for sample, data in zip(samples, encoded, strict=True):
            assert np.array_equal(data, reader.image(sample))


def test_a_damaged_image_of_a_shard_is_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    reader = ShardReader(folder)
    archive = folder / reader.name(20).partition(" in ")[2]
    with open(archive, "r+b") as file:
        file.seek(reader.location(20)[0] + 500)
        file.write(b"\0" * 40)
    message = stopped_by(loader_of(ShardReader(folder)))
    assert "image 20 (000000020.jpg in train-" in message and "checksum" in message


# Ranks and resuming, of either kind


def test_ranks_share_an_epoch(data):
    parts = [loader_of(data, batch_size=16, rank=rank, world_size=2) for rank in (0, 1)]
    batches = [list(part.batches(0, 4)) for part in parts]
    assert all(len(batch.request.samples) == 8 for part in batches for batch in part)
    seen = np.concatenate([batch.request.samples for part in batches for batch in part])
    assert sorted(seen) == list(range(64))
    if isinstance(data, BetonReader):
        whole = loader_of(data, batch_size=16).batches(0, 4)
        for alone, *shares in zip(whole, *batches, strict=True):
            assert torch.equal(torch.cat([share.views for share in shares], 1), alone.views)


@pytest.mark.parametrize("first", [3, 5, 11])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_next_20_batches_after_a_resume(data, first, with_state):
    uninterrupted = loader_of(data)
    batches = uninterrupted.batches(0, first + 25)
    for _ in islice(batches, first):
        pass
    next(batches)  # the reader is ahead of the step that is saved
    state = uninterrupted.sampler.state(first)
    expected = list(loader_of(data).batches(0, first + 20))[first:]

    resumed = loader_of(data, num_threads=1, prefetch=1)
    if with_state:
        assert resumed.sampler.restore([state]) == ""
    require_same(list(resumed.batches(first, first + 20)), expected)


def test_a_state_spares_reading_what_came_before(shards, monkeypatch):
    steps, reads = loader_of(ShardReader(shards)).sampler, []
    for _ in steps.samples(0, 4):
        pass
    real = dali_shards.ShardSampler._read
    monkeypatch.setattr(
        dali_shards.ShardSampler, "_read", lambda self, p: reads.append(1) or real(self, p)
    )
    resumed = loader_of(ShardReader(shards)).sampler
    assert not resumed.restore([steps.state(3)])
    assert next(resumed.samples(3, 4))[0] == 3 and len(reads) == 1
    for states in ([steps.state(3)], [steps.state(3)] * 2):  # of one rank, for two
        reads.clear()
        other = loader_of(ShardReader(shards), rank=1, world_size=2).sampler
        assert "number of ranks" in other.restore(states)
        assert next(other.samples(3, 4))[0] == 3 and len(reads) == 4
    assert not loader_of(ShardReader(shards)).sampler.restore([steps.state(5)])  # an epoch's end


def test_a_loop_left_early_can_be_started_again(data):
    loader = loader_of(data)
    first = next(loader.batches(0, 1000))
    again = next(loader.batches(0, 1000))
    assert torch.equal(first.views, again.views)


def test_a_run_over_shards_resumes_exactly(shards, tmp_path, capsys):
    def pretrain(name, steps) -> int:
        flags = [*TINY, "--probe-every=0", "--data", str(shards), "--max-steps", str(steps)]
        return main(["pretrain", *flags, "--run-dir", str(tmp_path / name)])

    assert pretrain("whole", 4) == 0
    assert "dali, which reads web shards" in capsys.readouterr().out
    assert pretrain("parts", 2) == 0
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["loader"] == "dali"
    assert main(["pretrain", "--resume", str(tmp_path / "parts"), "--max-steps", "4"]) == 0
    first, second = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_and_resumed_the_next_20_batches_are_the_same(data, tmp_path):
    folder = tmp_path / "killed"
    flags = ["--loader=dali", "--probe-every=0", "--save-every=3", "--epochs=9"]
    process = start(*flags, "--data", data.path, "--run-dir", folder)
    wait_for_step(process, folder, 6)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    arguments = [*TINY, "--loader=dali", "--epochs=9", "--data", data.path]
    uninterrupted = build(parse_pretrain(arguments)).loader.batches(0, 36)
    setup = build(parse_pretrain(["--resume", str(folder)]))
    with RunDirectory(folder) as run:
        step = train.resume(setup, run, train.Console(quiet=True))
    assert step >= 6 and setup.config.loader == "dali"
    expected = list(uninterrupted)[step : step + 20]
    require_same(list(setup.loader.batches(step, step + 20)), expected)
