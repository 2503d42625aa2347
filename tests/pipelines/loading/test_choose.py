"""Which loader reads the images: the requested one, or the chosen one."""

import sys

import pytest
import torch
from test_loader import loader_of

from pipelines.convert.command import main as convert
from pipelines.loading import choose, dali
from pipelines.loading.choose import choose_loader
from pipelines.loading.datasets import open_data

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


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
    assert "2,000" in why and "5,000" in why
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
    assert name == "native" and "no decoder" in why and "\n" not in why


def test_missing_packages_are_named_with_the_way_out(reader, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)

    with pytest.raises(ValueError, match=r"pip install 'bt-fast\[dali\]'"):
        loader_of(reader, "dali")
    for name in ("native", "dali"):
        with pytest.raises(ValueError, match=r"bt-convert .*shards out.beton"):
            loader_of(open_data(shards, "--data"), name)
