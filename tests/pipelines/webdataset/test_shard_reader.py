"""ShardReader and BetonReader agree on the same images."""

import os
import re
import shutil
import tarfile

import numpy as np
import pytest

from pipelines.beton import BetonReader
from pipelines.convert.manifest import SourceError
from pipelines.webdataset.reader import ShardReader


def test_it_equals_the_reader_of_a_beton(small_beton, small_shards):
    beton, reader = BetonReader(small_beton), ShardReader(small_shards)
    assert len(reader) == len(beton) and reader.class_names == beton.class_names
    assert np.array_equal(reader.labels, beton.labels)
    assert np.array_equal(reader.sizes[np.arange(64)], beton.sizes)
    for index in range(64):
        assert np.array_equal(reader.image(index), beton.image(index))
        assert reader.location(index)[2] == beton.location(index)[2] and reader.checksum_ok(index)
    assert reader.name(7) == "000000007.jpg in train-000000.tar"


def test_labels_are_read_of_a_random_sample(small_beton, small_shards, monkeypatch):
    monkeypatch.setattr("pipelines.webdataset.reader.MAX_LABELS", 20)
    labels = ShardReader(small_shards).labels
    known = np.flatnonzero(labels >= 0)
    assert len(known) == 20 and known.max() - known.min() > 32
    assert np.array_equal(labels[known], BetonReader(small_beton).labels[known])


def test_a_flipped_bit_is_detected(small_shards, tmp_path):
    folder = shutil.copytree(small_shards, tmp_path / "flipped")
    position = ShardReader(folder).location(9)[0]
    with open(folder / "train-000000.tar", "r+b") as file:
        file.seek(position + 400)
        byte = file.read(1)
        file.seek(position + 400)
        file.write(bytes([byte[0] ^ 1]))
    reader = ShardReader(folder)
    assert [index for index in range(64) if not reader.checksum_ok(index)] == [9]


def test_shards_without_checksums_are_refused(small_shards, tmp_path):
    folder = shutil.copytree(small_shards, tmp_path / "old")
    content = (folder / "train-000000.tar").read_bytes()
    start = content.index(b".crc32")
    header = tarfile.TarInfo.frombuf(content[start : start + 512], "utf-8", "strict")
    header.name = ".other"
    content = content[:start] + header.tobuf(tarfile.USTAR_FORMAT) + content[start + 512 :]
    (folder / "train-000000.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a list of checksums is missing"):
        ShardReader(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text.replace("v1.2", "v9.9"),
        lambda text: text.replace(" 000000009.jpg", ""),
        lambda text: text.replace("jpg 512 ", "jpg 512000000000 "),
        lambda text: text.rpartition("jpg")[0],
        lambda text: text.replace("jpg 512 ", "jpg -512 "),
        lambda text: re.sub("jpg 512 [0-9]+", f"jpg {2**63 - 1} 1", text),  # the sum overflows
    ],
)
def test_a_damaged_index_is_refused(small_shards, tmp_path, damage):
    folder = shutil.copytree(small_shards, tmp_path / "damaged")
    index = folder / "train-000000.idx"
    index.write_text(damage(index.read_text()))
    with pytest.raises(ValueError, match=r"train-000000.idx is missing or damaged") as caught:
        ShardReader(folder)
    assert "\n" not in str(caught.value)


def test_other_or_incomplete_folders_are_refused(small_shards, tmp_path):
    with pytest.raises(ValueError, match="bt-convert"):
        ShardReader(tmp_path)
    with pytest.raises(ValueError, match="has no val images"):
        ShardReader(small_shards, "val")
    folder = shutil.copytree(small_shards, tmp_path / "short")
    os.truncate(folder / "train-000000.tar", 5000)
    with pytest.raises(SourceError, match=r"has 5000 bytes, but .* get it again"):
        ShardReader(folder)
    (folder / "train-000000.tar").unlink()
    with pytest.raises(SourceError, match=r"has 0 bytes, but .* get it again"):
        ShardReader(folder)
    for content in ("[1]", '{"format": "webdataset"}', "{"):
        (folder / "dataset.json").write_text(content)
        with pytest.raises(SourceError, match=r"dataset\.json is damaged"):
            ShardReader(folder)
