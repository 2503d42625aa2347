"""Parquet files convert like a folder of the same images."""

import pytest
from sample_imagenet import CLASSES, convert, same_as
from test_splits_and_labels import write_parquet


@pytest.mark.parametrize("names", [True, False])
def test_parquet(imagenet_folder, imagenet_beton, tmp_path, names):
    """Files like those of `datasets`, two of a split, with names in the schema or as labels."""
    data, classes = tmp_path / "hub" / "data", sorted(CLASSES)
    for split, word in {"train": "train", "val": "validation"}.items():
        files = sorted((imagenet_folder / split).rglob("*.JPEG"))
        for number, part in enumerate((files[:6], files[6:])):
            paths = [str(path.relative_to(imagenet_folder / split)) for path in part]
            image = [{"bytes": f.read_bytes(), "path": p} for f, p in zip(part, paths, strict=True)]
            label = [classes.index(f.parent.name) if names else f.parent.name for f in part]
            path = data / f"{word}-{number:05}-of-00002.parquet"
            write_parquet(path, {"image": image, "label": label}, classes if names else None)
    (data / "test-00000-of-00001.parquet").write_bytes(b"not read")
    assert convert(tmp_path / "hub", tmp_path / "out.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton")


def test_parquet_that_cannot_be_used(tmp_path, capsys, refused):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"image": [{"bytes": None, "path": "far/away.jpg"}], "label": [0]})
    assert convert(path, tmp_path / "out.beton") == 1
    assert "far/away.jpg: not in the file, only its path" in capsys.readouterr().err
    path.write_bytes(b"PAR1 not really")
    refused(convert(path, tmp_path / "out.beton"))
