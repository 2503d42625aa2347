"""Parquet files, lists and `.beton` files convert like a folder of the same images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hostile import make_folder
from PIL import Image
from sample_imagenet import CLASSES, convert, same_as

from pipelines.beton import BetonReader

# Parquet


def write_parquet(folder: Path, out: Path, *, names: bool, num_files: int = 2) -> None:
    """Files like those of `datasets`: image bytes and path, labels, class names in the schema."""
    pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    from pyarrow import parquet

    out.mkdir(parents=True)
    classes = sorted(CLASSES)
    for split, word in {"train": "train", "val": "validation"}.items():
        files = sorted((folder / split).rglob("*.JPEG"))
        paths = [str(path.relative_to(folder / split)) for path in files]
        image = [{"bytes": f.read_bytes(), "path": p} for f, p in zip(files, paths, strict=True)]
        label = [classes.index(path.parent.name) for path in files]
        labels = pa.array(label) if names else pa.array([classes[i] for i in label])
        table = pa.table({"image": image, "label": labels})
        features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
        if names:
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(metadata)
        for number in range(num_files):
            part = table.slice(number * 6, 6 if number + 1 < num_files else None)
            name = f"{word}-{number:05}-of-{num_files:05}.parquet"
            parquet.write_table(part, out / name, row_group_size=4)
    (out / "test-00000-of-00001.parquet").write_bytes(b"not read")


@pytest.mark.parametrize("names", [True, False])
def test_parquet(imagenet_folder, imagenet_beton, tmp_path, names):
    write_parquet(imagenet_folder, tmp_path / "hub" / "data", names=names)
    assert convert(tmp_path / "hub", tmp_path / "out.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton")


def test_parquet_that_cannot_be_used(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    from pyarrow import parquet

    (tmp_path / "text.parquet").write_bytes(b"PAR1 not really")
    assert convert(tmp_path / "text.parquet", tmp_path / "out.beton") == 2
    assert capsys.readouterr().err.count("\n") == 1
    row = {"bytes": None, "path": "far/away.jpg"}
    parquet.write_table(pa.table({"image": [row], "label": [0]}), tmp_path / "text.parquet")
    assert convert(tmp_path / "text.parquet", tmp_path / "out.beton") == 1
    assert "far/away.jpg: not in the file, only its path" in capsys.readouterr().err


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

    spaced = tmp_path / "a name.jpg"
    spaced.write_bytes(files[0].read_bytes())
    (tmp_path / "list.txt").write_text(f"{spaced}\t12\n{files[1]} 3\n{spaced} 03\n")
    assert convert(tmp_path / "list.txt", tmp_path / "numbers.beton") == 0
    numbers = BetonReader(tmp_path / "numbers.beton")
    assert numbers.labels.tolist() == [12, 3, 3] and numbers.num_classes == 13

    (tmp_path / "list.txt").write_text(f"{spaced}\n{files[1]}\n")
    assert convert(tmp_path / "list.txt", tmp_path / "without.beton") == 0
    assert BetonReader(tmp_path / "without.beton").labels.tolist() == [-1, -1]


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
    assert convert(tmp_path / "images", tmp_path / "out.beton") == 0
