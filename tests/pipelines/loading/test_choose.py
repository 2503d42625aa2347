"""Which loader reads the images: the requested one, or the chosen one."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import TINY

from bt_fast.cli import main
from bt_fast.evaluate.eval_setup import open_images
from pipelines.beton import BetonReader
from pipelines.convert.command import main as convert
from pipelines.crop import RandomResizedCrop
from pipelines.loading import choose, dali
from pipelines.loading.choose import choose_loader, open_loader, rate
from pipelines.loading.datasets import open_data

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def reader(small_beton):
    return BetonReader(small_beton)


@pytest.fixture(scope="module")
def shards(small_beton, tmp_path_factory):
    folder = tmp_path_factory.mktemp("of-small") / "shards"
    assert convert([str(small_beton), str(folder), "--format=webdataset", "--workers=1"]) == 0
    return folder


def chosen(data, rates, monkeypatch, *, requested="auto", images=10**8, cache=False, device=GPU):
    """(chosen loader, reason, measured loaders), for loaders of these rates."""
    measured = []

    def measure(name):
        measured.append(name)
        if isinstance(rates[name], Exception):
            raise rates[name]
        return rates[name]

    monkeypatch.setattr(choose, "rate", lambda loader: loader)
    monkeypatch.setattr(dali, "is_installed", lambda: "dali" in rates)
    monkeypatch.setattr(dali, "release_memory", lambda: None)
    name, why = choose_loader(requested, data, images, measure, cache=cache, device=device)
    return name, why, measured


def test_auto_chooses_the_faster_one_and_gives_the_rates(reader, monkeypatch):
    name, why, measured = chosen(reader, {"native": 2000.0, "dali": 5000.0}, monkeypatch)
    assert name == "dali" and sorted(measured) == ["dali", "native"]
    assert "native 2,000" in why and "dali 5,000" in why
    assert chosen(reader, {"native": 2000.0, "dali": 2100.0}, monkeypatch)[0] == "native"


def test_auto_measures_nothing_where_there_is_nothing_to_choose(reader, shards, monkeypatch):
    both = {"native": 1.0, "dali": 9.0}
    assert chosen(reader, {"native": 1.0}, monkeypatch)[::2] == ("native", [])
    assert chosen(reader, both, monkeypatch, device=CPU)[::2] == ("native", [])
    assert chosen(reader, both, monkeypatch, cache=True)[::2] == ("native", [])
    assert chosen(reader, both, monkeypatch, images=10_000)[::2] == ("native", [])
    assert chosen(reader, both, monkeypatch, requested="ffcv")[::2] == ("ffcv", [])
    assert chosen(open_data(shards, "--data"), both, monkeypatch)[::2] == ("dali", [])


def test_a_dali_that_fails_is_not_chosen(reader, monkeypatch):
    failing = {"native": 1.0, "dali": RuntimeError("in:\n\nencountered:\n\nno decoder\nmore")}
    name, why, _ = chosen(reader, failing, monkeypatch)
    assert name == "native" and why == "native (dali fails: no decoder)"


def test_the_rate_is_that_of_the_loader(monkeypatch):
    now = [0.0]  # a clock of which only the loader takes time
    monkeypatch.setattr(choose.time, "perf_counter", lambda: now[0])

    def batches(first, last):
        for _ in range(first, last):
            now[0] += 0.01
            yield SimpleNamespace(request=SimpleNamespace(samples=np.zeros(8)))

    found = rate(SimpleNamespace(batches=batches))
    assert found == pytest.approx(800)


def test_missing_packages_are_named_with_the_way_out(reader, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)

    def opened(name, data):
        open_loader(name, data, RandomResizedCrop(size=16), device=CPU, batch_size=16)

    with pytest.raises(ValueError, match=r"pip install 'bt-fast\[dali\]', or --loader native"):
        opened("dali", reader)
    for name in ("native", "dali"):
        with pytest.raises(ValueError, match=r"bt-fast\[dali\].*bt-convert .*shards out.beton"):
            opened(name, open_data(shards, "--data"))


def test_the_cache_is_natives(reader):
    with pytest.raises(ValueError, match="--cache-gb"):
        crop = RandomResizedCrop(size=16)
        open_loader("dali", reader, crop, batch_size=16, cache_bytes=9)


def test_the_choice_is_in_the_table_and_in_the_runs_configuration(small_beton, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*TINY, "--data", str(small_beton), "--run-dir", str(run), "--max-steps", "1"]
    assert main(["pretrain", *flags, "--probe-every", "0"]) == 0
    assert json.loads((run / "config.json").read_text())["loader"] == "native"
    row = next(line for line in capsys.readouterr().out.splitlines() if "loader" in line)
    assert "native" in row


def test_evaluations_say_that_they_do_not_read_shards(shards):
    with pytest.raises(ValueError, match=r"bt-convert .*shards out.beton"):
        open_images(shards, "--data")
