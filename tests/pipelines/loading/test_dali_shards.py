"""Web shards in the order of DALI's reader; ranks and resuming."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import write_beton
from test_loader import CROP, loader_of, require_same, stopped_by
from tiny_runs import TINY, learned

from bt_fast.cli import main
from pipelines.convert.command import main as convert
from pipelines.loading import dali_shards
from pipelines.loading.loader import Loader, Sampler
from pipelines.loading.native import NativeBackend
from pipelines.order import view_keys
from pipelines.webdataset.reader import ShardReader

pytest.importorskip("nvidia.dali", reason="DALI is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """64 pictures in several archives, whose blocks and buffers are small in these tests."""
    root = tmp_path_factory.mktemp("dali")
    beton = write_beton(root / "large.beton", 64, sizes=((400, 560), (640, 480)))
    flags = ["--format=webdataset", "--shard-size=1", "--workers=1"]
    assert convert([str(beton), str(root / "shards"), *flags]) == 0
    assert len(list((root / "shards").glob("*.tar"))) > 2
    return root / "shards"


@pytest.fixture
def data(shards) -> ShardReader:
    return ShardReader(shards)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(dali_shards, "SHUFFLE_BUFFER_SIZE", 12)
    monkeypatch.setattr(dali_shards, "MIN_BLOCK", 4)


def test_an_epoch_of_shards_has_every_image_once_in_an_order_of_its_own(data):
    loader = loader_of(data, "dali", batch_size=16)
    batches = list(loader.batches(0, 8))
    orders = [
        np.concatenate([b.request.samples for b in batches[4 * e : 4 * e + 4]]) for e in (0, 1)
    ]
    for order in orders:
        assert sorted(order) == list(range(64))
    assert not np.array_equal(*orders)
    archive = np.searchsorted(loader.sampler.shards.first, orders[0][:16], "right")
    assert len(set(archive)) > 2  # a batch mixes what lies apart
    other = loader_of(data, "dali", batch_size=16, seed=8).batches(0, 4)
    assert not np.array_equal(np.concatenate([b.request.samples for b in other]), orders[0])


def test_views_of_shards_are_those_that_native_cuts_from_the_same_images(data):
    batches = loader_of(data, "dali").batches(4, 7)  # across the end of the first epoch
    native = Loader(Sampler(data, CROP, batch_size=12, seed=7), NativeBackend(data))
    for batch in batches:
        epoch = batch.request.step // 5
        for view in (0, 1):
            keys = view_keys(batch.request.samples, seed=7, epoch=epoch, view=view)
            assert np.array_equal(batch.request.keys[view], keys)
        native.sampler.samples = lambda *_, b=batch.request: iter([(b.step, b.samples, None)])
        (expected,) = native.batches(batch.request.step, batch.request.step + 1)
        assert (batch.views.int() - expected.views.int()).abs().float().mean() < 0.5


def test_a_damaged_image_of_a_shard_is_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    reader = ShardReader(folder)
    archive = folder / reader.name(20).partition(" in ")[2]
    with open(archive, "r+b") as file:
        file.seek(reader.location(20)[0] + 500)
        file.write(b"\0" * 40)
    message = stopped_by(loader_of(ShardReader(folder), "dali"))
    assert "image 20 (000000020.jpg in train-" in message and "checksum" in message


# Ranks and resuming


def test_ranks_share_an_epoch(data):
    batches = [loader_of(data, "dali", rank=rank, world_size=2).batches(0, 5) for rank in (0, 1)]
    seen = np.concatenate([batch.request.samples for part in batches for batch in part])
    assert len(seen) == len(set(seen)) == 60


@pytest.mark.parametrize("first", [3, 5, 11])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_next_20_batches_after_a_resume(data, first, with_state):
    uninterrupted = loader_of(data, "dali")
    for _ in islice(uninterrupted.batches(0, first + 25), first + 1):
        pass  # the reader is ahead of the step that is saved
    state = uninterrupted.sampler.state(first)
    expected = list(loader_of(data, "dali").batches(0, first + 20))[first:]

    resumed = loader_of(data, "dali", num_threads=1, prefetch=1)
    if with_state:
        assert resumed.sampler.restore([state]) == ""
    require_same(list(resumed.batches(first, first + 20)), expected)


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
