"""Every loader reads what it is given, or names what it needs."""

import sys

import pytest
from test_loader import INSTALLED, loader_of, require_same

from pipelines.loading.datasets import open_data
from pipelines.webdataset.reader import ShardReader


@pytest.fixture(scope="module")
def shards(small_shards) -> ShardReader:
    return open_data(small_shards)


@pytest.mark.parametrize("name", ["auto", "native", "dali"])
def test_web_shards_give_the_batches_of_a_beton(reader, shards, name):
    if not INSTALLED.get(name, True):
        pytest.skip(f"{name} is not installed")
    require_same(loader_of(shards, name).batches(2, 7), loader_of(reader, name).batches(2, 7))


def test_what_a_loader_needs_is_named_with_the_way_out(reader, shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"pip install 'bt-fast\[dali\]'"):
        loader_of(reader, "dali")
    with pytest.raises(ValueError, match=r"--loader ffcv reads a .beton: bt-convert .*shards out"):
        loader_of(shards, "ffcv")
    with pytest.raises(ValueError, match="--cache-gb needs --loader native"):
        loader_of(reader, "ffcv", cache_bytes=1)
