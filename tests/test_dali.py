"""The DALI loader: native's samples, keys and boxes; resuming from its state; damaged data."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import jpeg_bytes, photographs, write_beton
from test_loader import damaged
from test_train import TINY, learned

from bt_fast import train
from bt_fast.cli import main, parse_pretrain
from bt_fast.job import build
from bt_fast.run_directory import RunDirectory
from pipelines.beton import BetonReader
from pipelines.beton_writer import BetonWriter
from pipelines.convert import main as convert
from pipelines.crop import RandomResizedCrop
from pipelines.loader import NativeLoader
from pipelines.order import view_keys
from pipelines.shard_reader import ShardReader

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from pipelines import dali_shards, loaders
from pipelines.dali_loader import CPU, DaliLoader
from pipelines.dali_shards import ShardLoader

CROP = RandomResizedCrop(size=24)


@pytest.fixture(scope="module")
def reader(small_beton):
    return BetonReader(small_beton)


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
    monkeypatch.setattr(dali_shards, "SHUFFLED", 12)
    monkeypatch.setattr(dali_shards, "MIN_BLOCK", 4)


def loader_of(data, **changes):
    settings = {"batch_size": 12, "seed": 7, **changes}
    if isinstance(data, ShardReader):
        return ShardLoader(data, CROP, **settings)
    return DaliLoader(data, CROP, **settings)


@pytest.fixture(params=["beton", "shards"])
def data(request, reader, shards):
    return reader if request.param == "beton" else ShardReader(shards)


def require_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert a.step == b.step and np.array_equal(a.samples, b.samples)
        assert all(map(np.array_equal, a.keys, b.keys))
        assert torch.equal(a.views, b.views)


# Against the native loader


def test_samples_keys_and_boxes_are_natives_and_so_are_pixels_nearly(tmp_path):
    pictures = photographs(24)
    path = tmp_path / "photos.beton"
    with BetonWriter(path, num_samples=len(pictures), class_names=["a"]) as writer:
        for index, picture in enumerate(pictures):
            writer.add(jpeg_bytes(picture), picture.height, picture.width, 0, f"a/{index}.jpg")
    crop, settings = RandomResizedCrop(), {"batch_size": 8, "seed": 3}
    native = NativeLoader(BetonReader(path), crop, **settings)
    dali = DaliLoader(BetonReader(path), crop, **settings)
    for a, b in zip(native.batches(0, 6), dali.batches(0, 6), strict=True):
        assert a.step == b.step and np.array_equal(a.samples, b.samples)
        assert all(map(np.array_equal, a.keys, b.keys))
        difference = (a.views.int() - b.views.int()).abs().float()
        assert difference.mean(dim=(2, 3, 4)).max() < 0.5  # of every single view
    for a, b in zip(native.steps.requests(0, 6), dali.steps.requests(0, 6), strict=True):
        assert np.array_equal(a.boxes, b.boxes)


def test_three_loaders_one_order(reader):
    pytest.importorskip("ffcv", reason="ffcv is not installed")
    from pipelines.ffcv_loader import FfcvLoader

    loaders = [
        kind(reader, CROP, batch_size=12, seed=7) for kind in (NativeLoader, DaliLoader, FfcvLoader)
    ]
    for native, dali, ffcv in zip(*(loader.batches(3, 8) for loader in loaders), strict=True):
        for other in (dali, ffcv):
            assert native.step == other.step and np.array_equal(native.samples, other.samples)
            assert all(map(np.array_equal, native.keys, other.keys))
    for native, dali, ffcv in zip(*(x.steps.requests(3, 8) for x in loaders), strict=True):
        assert np.array_equal(native.boxes, dali.boxes)
        assert np.array_equal(native.boxes, ffcv.boxes)


def test_views_grow_by_epoch(reader):
    growing = loader_of(reader, size_of=lambda epoch: 16 * (epoch + 1))
    native = NativeLoader(
        reader, CROP, batch_size=12, seed=7, size_of=lambda epoch: 16 * (epoch + 1)
    )
    for a, b in zip(growing.batches(3, 12), native.batches(3, 12), strict=True):
        assert a.views.shape == b.views.shape
        assert (a.views.int() - b.views.int()).abs().float().mean() < 0.5


class HalfRaw(BetonReader):
    """A file whose even records are RGB rows, as FFCV's writer can make it, without checksums."""

    def is_raw(self, index):
        return index % 2 == 0

    def image(self, index):
        data = super().image(index)
        return simplejpeg.decode_jpeg(data).reshape(-1) if self.is_raw(index) else data

    def checksum_ok(self, index):
        return True

    def place(self, index):
        return (*super().place(index)[:2], None)


def test_raw_records(small_beton):
    mixed = HalfRaw(small_beton)
    native = NativeLoader(mixed, CROP, batch_size=12, seed=7)
    for a, b in zip(loader_of(mixed).batches(0, 5), native.batches(0, 5), strict=True):
        assert (a.views.int() - b.views.int()).abs().float().mean(dim=(2, 3, 4)).max() < 0.5


# Web shards


def test_an_epoch_of_shards_has_every_image_once_in_an_order_of_its_own(shards):
    loader = loader_of(ShardReader(shards), batch_size=16)
    batches = list(loader.batches(0, 8))
    orders = [np.concatenate([b.samples for b in batches[4 * e : 4 * e + 4]]) for e in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(64))
    assert not np.array_equal(*orders)
    archive = np.searchsorted(loader.steps.reader.first, orders[0][:16], "right")
    assert len(set(archive)) > 2  # a batch mixes what lies apart
    other = loader_of(ShardReader(shards), batch_size=16, seed=8).batches(0, 4)
    assert not np.array_equal(np.concatenate([b.samples for b in other]), orders[0])


def test_views_of_shards_are_those_that_native_cuts_from_the_same_images(shards):
    reader = ShardReader(shards)
    batches = loader_of(reader).batches(4, 7)  # across the end of the first epoch
    native = NativeLoader(reader, CROP, batch_size=12, seed=7)
    for batch in batches:
        epoch = batch.step // 5
        for view in (0, 1):
            keys = view_keys(batch.samples, seed=7, epoch=epoch, view=view)
            assert np.array_equal(batch.keys[view], keys)
        native.steps.samples = lambda *_, b=batch: iter([(b.step, b.samples)])
        (expected,) = native.batches(batch.step, batch.step + 1)
        assert (batch.views.int() - expected.views.int()).abs().float().mean() < 0.5


def test_the_bytes_are_those_of_the_image_whose_number_is_given(shards):
    reader = ShardReader(shards)
    steps = loader_of(reader).steps
    numbers = [samples for _, samples in steps.samples(0, 10)]  # all held at once
    for samples, drawn in zip(numbers, steps.drawn, strict=True):
        for sample, data in zip(samples, drawn, strict=True):
            assert np.array_equal(data, reader.image(sample))


# Ranks and resuming


def test_ranks_share_an_epoch(data):
    parts = [loader_of(data, batch_size=16, rank=rank, world_size=2) for rank in (0, 1)]
    batches = [list(part.batches(0, 4)) for part in parts]
    assert all(len(batch.samples) == 8 for part in batches for batch in part)
    seen = np.concatenate([batch.samples for part in batches for batch in part])
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
    state = uninterrupted.steps.state(first)
    expected = list(loader_of(data).batches(0, first + 20))[first:]

    resumed = loader_of(data, num_threads=1, prefetch=1)
    if with_state:
        assert resumed.steps.restore([state]) == ""
    require_same(list(resumed.batches(first, first + 20)), expected)


def test_a_state_spares_reading_what_came_before(shards, monkeypatch):
    steps, reads = loader_of(ShardReader(shards)).steps, []
    for _ in steps.samples(0, 4):
        pass
    real = dali_shards.ShardSteps._read
    monkeypatch.setattr(
        dali_shards.ShardSteps, "_read", lambda self, p: reads.append(1) or real(self, p)
    )
    resumed = loader_of(ShardReader(shards)).steps
    assert not resumed.restore([steps.state(3)])
    assert next(resumed.samples(3, 4))[0] == 3 and len(reads) == 1
    for states in ([steps.state(3)], [steps.state(3)] * 2):  # of one rank, for two
        reads.clear()
        other = loader_of(ShardReader(shards), rank=1, world_size=2).steps
        assert "number of ranks" in other.restore(states)
        assert next(other.samples(3, 4))[0] == 3 and len(reads) == 4
    assert not loader_of(ShardReader(shards)).steps.restore([steps.state(5)])  # an epoch's end


def test_a_loop_left_early_can_be_started_again(data):
    loader = loader_of(data)
    first = next(loader.batches(0, 1000))
    again = next(loader.batches(0, 1000))
    assert torch.equal(first.views, again.views)


# Damage


def stopped_by(loader) -> str:
    with pytest.raises(ValueError) as caught:
        list(loader.batches(0, 6))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_record_is_named(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "checksum" in message


def test_damage_that_dali_would_take_for_good_is_found_without_checksums(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    reader.checksum_ok = lambda index: True  # as in a file the stock writer made
    reader.place = lambda index: (0, 0, None)
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message


def test_a_record_that_dali_cannot_decode_is_named(small_beton, tmp_path):
    reader = damaged(small_beton, tmp_path / "damaged.beton", 21)
    real = reader.image
    reader.image = lambda index: real(index)[: 300 if index == 21 else None]
    reader.checksum_ok = lambda index: True  # the file changed after it was checked
    message = stopped_by(loader_of(reader))
    assert "image 21 (class-1/021.jpg)" in message and "does not decode" in message


@pytest.mark.parametrize("recorded", [(30, 50), (400, 600)])
def test_a_jpeg_of_another_size_than_recorded_is_named(tmp_path, recorded):
    path = write_beton(tmp_path / "good.beton", 12)
    reader = BetonReader(path)
    with BetonWriter(tmp_path / "bad.beton", num_samples=12, class_names=["a"]) as writer:
        for index in range(12):
            height, width = recorded if index == 5 else reader.size(index)
            writer.add(reader.image(index).tobytes(), height, width, 0, f"a/{index}.jpg")
    message = stopped_by(loader_of(BetonReader(tmp_path / "bad.beton")))
    assert "image 5 (a/5.jpg)" in message and f"{recorded[1]}x{recorded[0]}" in message


def test_a_damaged_image_of_a_shard_is_named(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    reader = ShardReader(folder)
    archive = folder / reader.name(20).partition(" in ")[2]
    with open(archive, "r+b") as file:
        file.seek(reader.place(20)[0] + 500)
        file.write(b"\0" * 40)
    message = stopped_by(loader_of(ShardReader(folder)))
    assert "image 20 (000000020.jpg in train-" in message and "checksum" in message


# Runs


def test_auto_measures_both(reader, monkeypatch):
    monkeypatch.setattr(loaders, "SECONDS", 0.2)
    name, why = loaders.choose(
        "auto",
        reader,
        10**8,
        lambda name: loaders.open_loader(name, reader, CROP, device=CPU, batch_size=12),
        cache=False,
        device=torch.device("cuda", 0),
    )
    found = re.fullmatch(r"(\w+) \(one rank alone, images/s: native ([\d,]+), dali ([\d,]+)\)", why)
    native, dali = (int(found[place].replace(",", "")) for place in (2, 3))
    assert native > 0 and dali > 0
    assert name == found[1] == ("dali" if dali > 1.1 * native else "native")


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


def test_killed_and_resumed_the_next_20_batches_are_the_same(data, tmp_path):
    folder = tmp_path / "killed"
    flags = [*TINY, "--loader=dali", "--probe-every=0", "--save-every=3", "--epochs=9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bt_fast.cli", "pretrain", *flags]
        + ["--data", data.path, "--run-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step-00000006")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    arguments = [*TINY, "--loader=dali", "--epochs=9", "--data", data.path]
    uninterrupted = build(parse_pretrain(arguments)).loader.batches(0, 36)
    job = build(parse_pretrain(["--resume", str(folder)]))
    with RunDirectory(folder) as run:
        step = train.resume(job, run, train.Console(quiet=True))
    assert step >= 6 and job.config.loader == "dali"
    expected = list(uninterrupted)[step : step + 20]
    require_same(list(job.loader.batches(step, step + 20)), expected)
