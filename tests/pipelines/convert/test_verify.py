"""`bt-convert --verify` accepts intact outputs and detects every changed byte."""

import shutil
from pathlib import Path

import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import make_folder
from sample_imagenet import convert

from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, Path]:
    """The same 16 images as a .beton and as web shards."""
    root = tmp_path_factory.mktemp("results")
    folder = make_folder(root / "images", {"cat": 10, "dog é": 5, "eel": 1})
    assert convert(folder, root / "out.beton") == 0
    assert convert(folder, root / "shards", "--format", "webdataset") == 0
    return root / "out.beton", root / "shards"


@pytest.fixture
def copies(results, tmp_path) -> tuple[Path, Path]:
    shutil.copy(results[0], tmp_path / "out.beton")
    shutil.copytree(results[1], tmp_path / "shards")
    return tmp_path / "out.beton", tmp_path / "shards"


def test_every_changed_byte_of_an_image_is_found(copies, capsys):
    beton, shards = copies
    for path in copies:
        assert convert("--verify", path) == 0
        assert "16 of 16 images are intact plain JPEGs" in capsys.readouterr().out
    start, size, _ = BetonReader(beton).location(6)
    name = BetonReader(beton).name(6)
    (tar,) = shards.glob("*.tar")
    inside = tar.read_bytes().index(beton.read_bytes()[start : start + size])
    for offset in (0, size // 2, size - 1):
        for path, position in ((beton, start + offset), (tar, inside + offset)):
            before = path.read_bytes()
            changed = bytes([before[position] ^ 1])
            path.write_bytes(before[:position] + changed + before[position + 1 :])
            assert convert("--verify", beton if path == beton else shards) == 1
            error = capsys.readouterr().err
            assert "damaged (listed above)" in error
            assert (f"image 6 ({name})" if path == beton else "SHA-256") in error
            path.write_bytes(before)


def test_damage_with_valid_checksums(tmp_path, capsys):
    """Images of another size than recorded, or truncated before they were stored."""
    jpeg = jpeg_bytes(drawn_picture(0, 80, 60))
    with BetonWriter(tmp_path / "out.beton", num_samples=3) as writer:
        writer.add(jpeg, 60, 80, -1, "good.jpg")
        writer.add(jpeg, 80, 60, -1, "turned.jpg")
        writer.add(jpeg[:-100], 60, 80, -1, "cut.jpg")
    assert convert("--verify", tmp_path / "out.beton") == 1
    error = capsys.readouterr().err
    assert "(turned.jpg): is of (60, 80) pixels, but (80, 60) in the table" in error
    assert "(cut.jpg): Premature end" in error and "2 damaged" in error


def test_outputs_that_cannot_be_verified(tmp_path, copies, refused):
    refused(convert("--verify", tmp_path / "missing.beton"))
    refused(convert(copies[0]), "OUT is missing")
    copies[0].write_bytes(copies[0].read_bytes()[:-50])
    assert convert("--verify", copies[0]) == 2
