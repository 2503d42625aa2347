"""Parts converted with --shard join to the output of a single conversion."""

from pathlib import Path

import pytest
from sample_imagenet import convert, same_as


@pytest.fixture
def parts(imagenet_folder, tmp_path) -> Path:
    root = tmp_path / "parts"
    root.mkdir()
    for number in (1, 2, 3):
        assert convert(imagenet_folder, root / f"p{number}.beton", "--shard", f"{number}/3") == 0
    return root


def test_parts_are_joined(imagenet_folder, parts, imagenet_beton, tmp_path):
    assert convert(parts, tmp_path / "out.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton")

    flags = ["--format", "webdataset"]
    (tmp_path / "folders").mkdir()
    for number in (2, 1):
        out = tmp_path / "folders" / str(number)
        assert convert(imagenet_folder, out, *flags, "--shard", f"{number}/2") == 0
    assert convert(tmp_path / "folders", tmp_path / "merged.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "merged.beton")


def test_parts_that_do_not_belong_together(imagenet_folder, parts, tmp_path, capsys):
    out = tmp_path / "out.beton"
    saved = {path: path.read_bytes() for path in parts.iterdir()}

    def is_refused(message: str) -> bool:
        code, error = convert(parts, out), capsys.readouterr().err
        for path, content in saved.items():
            path.write_bytes(content)
        return code == 2 and message in error and error.count("\n") == 1 and not out.exists()

    (parts / "p2.beton").unlink()
    assert is_refused("has parts 1, 3 of 3")
    (parts / "p2.beton").write_bytes(saved[parts / "p1.beton"])
    assert is_refused("is not the file that p2.beton.json describes")
    flags = ["--shard", "2/3", "--overwrite", "--max-side", 90, "--bits", 12]
    assert convert(imagenet_folder, parts / "p2.beton", *flags) == 0
    capsys.readouterr()
    assert is_refused("they differ in max_side, bits")
    (parts / "p2.beton.json").write_text("{")
    assert is_refused("is not JSON")
    (parts / "p2.beton.json").write_text("[]")
    assert is_refused("has parts 1, 3 of 3")
    (parts / "p3.val.beton").unlink()
    assert is_refused("has parts 1, 2 of 3")
