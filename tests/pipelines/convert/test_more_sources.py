"""Parquet files, lists and `.beton` files convert like a folder of the same images."""

import io

import numpy as np
import pytest
from hostile import make_folder
from PIL import Image
from sample_imagenet import CLASSES, convert, same_as
from test_splits_and_labels import write_parquet

from pipelines.beton import BetonReader

# Parquet


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


def test_parquet_that_cannot_be_used(tmp_path, capsys):
    path = tmp_path / "x.parquet"
    write_parquet(path, {"image": [{"bytes": None, "path": "far/away.jpg"}], "label": [0]})
    assert convert(path, tmp_path / "out.beton") == 1
    assert "far/away.jpg: not in the file, only its path" in capsys.readouterr().err
    path.write_bytes(b"PAR1 not really")
    assert convert(path, tmp_path / "out.beton") == 2
    assert capsys.readouterr().err.count("\n") == 1


# Lists


def test_lists(imagenet_folder, imagenet_beton, tmp_path):
    files = sorted((imagenet_folder / "train").rglob("*.JPEG"))
    names = [path.parent.name for path in files]
    (tmp_path / "images").symlink_to(imagenet_folder / "train")
    relative = [f"images/{path.relative_to(imagenet_folder / 'train')}" for path in files]
    lines = [f"{path} {name}" for path, name in zip(relative, names, strict=True)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    assert convert(tmp_path / "list.txt", tmp_path / "out.beton") == 0
    converted, expected = BetonReader(tmp_path / "out.beton"), BetonReader(imagenet_beton)
    assert converted.labels.tolist() == expected.labels.tolist()
    assert converted.class_names == expected.class_names
    for index in range(len(expected)):
        assert converted.image(index).tobytes() == expected.image(index).tobytes()


# .beton files


def test_images_of_files_written_by_ffcv(imagenet_folder, tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed", exc_type=ImportError)
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    for mode in ("jpg", "raw"):
        fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
        writer = DatasetWriter(str(tmp_path / f"{mode}.beton"), fields, num_workers=2)
        writer.from_indexed_dataset(ImageFolder(imagenet_folder / "train"))
        assert convert(tmp_path / f"{mode}.beton", tmp_path / f"converted {mode}.beton") == 0
        source = BetonReader(tmp_path / f"{mode}.beton")
        converted = BetonReader(tmp_path / f"converted {mode}.beton")
        assert converted.class_names == ["0", "1", "2"]
        assert converted.labels.tolist() == source.labels.tolist()
        for index in range(len(source)):
            image = converted.image(index).tobytes()
            if mode == "jpg":
                assert image == source.image(index).tobytes()
            else:
                pixels = source.image(index).reshape(*source.size(index), 3).astype(np.int16)
                assert np.abs(np.asarray(Image.open(io.BytesIO(image))) - pixels).mean() < 2


# Archives


def test_images_beside_archives_are_ambiguous(tmp_path, capsys):
    make_folder(tmp_path / "images", {"assets": 1})
    (tmp_path / "images" / "data").mkdir()
    (tmp_path / "images" / "data" / "train-0.tar").touch()
    assert convert(tmp_path / "images", tmp_path / "out.beton") == 2
    assert "has both images and .tar files" in capsys.readouterr().err
    make_folder(tmp_path / "images" / "train", {"cat": 2})
    assert convert(tmp_path / "images", tmp_path / "out.beton", "--train", "train") == 0
