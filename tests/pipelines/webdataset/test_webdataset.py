"""Web shards: those of bt-convert, read by webdataset, DALI and tar, and those of other tools."""

import hashlib
import json
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import make_folder, saved, write_tar
from sample_imagenet import convert

from pipelines.beton import BetonReader


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, Path]:
    """2.6 MB of images in three shards of 1 MB. Returns (.beton, shards)."""
    root = tmp_path_factory.mktemp("many")
    for index in range(9):
        path = root / "images" / "ab"[index % 2] / f"dots.in.name {index} é.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(drawn_picture(index, 900, 700), quality=97))
    flags = ["--max-side", 0]
    assert convert(root / "images", root / "out.beton", *flags) == 0
    flags += ["--format", "webdataset", "--shard-size", 1]
    assert convert(root / "images", root / "shards", *flags) == 0
    return root / "out.beton", root / "shards"


def archives(shards: Path) -> list[Path]:
    return sorted(shards.glob("*.tar"))


def test_tar_reads_keys_images_and_labels(many):
    beton, contents = BetonReader(many[0]), {}
    for path in archives(many[1]):
        with tarfile.open(path) as archive:
            found = {name: archive.extractfile(name).read() for name in archive.getnames()}
        assert found.pop(".names").split(b"\0")[0] == beton.name(len(contents) // 2).encode()
        checksums = [zlib.crc32(data) for name, data in found.items() if name.endswith(".jpg")]
        assert found.pop(".crc32") == np.array(checksums, "<u4").tobytes()
        contents |= found
    for index in range(len(beton)):
        assert contents.pop(f"{index:09}.jpg") == beton.image(index).tobytes()
        assert int(contents.pop(f"{index:09}.cls")) == beton.label(index)
    assert not contents


def test_size_and_description_of_shards(many):
    _, shards = many
    dataset = json.loads((shards / "dataset.json").read_text())
    assert (dataset["num_images"], dataset["classes"]) == (9, ["a", "b"])
    entries = dataset["splits"]["train"]["shards"]
    assert [shard["name"] for shard in entries] == [path.name for path in archives(shards)]
    assert len(entries) >= 3 and sum(shard["num_images"] for shard in entries) == 9
    for shard, path in zip(entries, archives(shards), strict=True):
        assert shard["num_bytes"] == path.stat().st_size <= 1_000_000
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_webdataset_library_reads_them(many):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    beton, shards = BetonReader(many[0]), many[1]
    samples = list(webdataset.WebDataset([str(p) for p in archives(shards)], shardshuffle=False))
    assert len(samples) == len(beton)
    for index, sample in enumerate(samples):
        assert sample["jpg"] == beton.image(index).tobytes()
        assert int(sample["cls"]) == beton.label(index)


@pytest.mark.parametrize("indexed", [True, False])
def test_dali_reads_them(many, indexed):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    beton, shards = BetonReader(many[0]), many[1]
    indices = {"index_paths": [str(path) for path in sorted(shards.glob("*.idx"))]}

    @dali.pipeline_def(batch_size=len(beton), num_threads=1, device_id=None)
    def pipeline():
        paths = [str(path) for path in archives(shards)]
        options = {"missing_component_behavior": "error", **(indices if indexed else {})}
        return tuple(
            dali.fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], name="reader", **options)
        )

    pipe = pipeline()
    pipe.build()
    assert pipe.epoch_size("reader") == len(beton)
    jpegs, classes = pipe.run()
    for index in range(len(beton)):
        assert np.array_equal(np.array(jpegs.at(index)), beton.image(index))
        assert int(np.array(classes.at(index)).tobytes()) == beton.label(index)


def test_conversion_between_formats_keeps_every_byte(many, tmp_path):
    """.beton to shards to .beton to shards, with images larger than the default --max-side."""
    beton, shards = many
    assert convert(shards, tmp_path / "back.beton") == 0
    assert (tmp_path / "back.beton").read_bytes() == beton.read_bytes()
    flags = ["--format", "webdataset", "--shard-size", 1]
    assert convert(tmp_path / "back.beton", tmp_path / "shards", *flags) == 0
    for path in [*archives(shards), *shards.glob("*.idx")]:
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()
    assert BetonReader(tmp_path / "back.beton").name(1) == "a/dots.in.name 2 é.jpg"


def test_train_and_val_without_classes(tmp_path):
    make_folder(tmp_path / "images" / "train", {"": 3})
    make_folder(tmp_path / "images" / "val", {"": 2}, seed=9)
    assert convert(tmp_path / "images", tmp_path / "shards", "--format", "webdataset") == 0
    names = [path.name for path in archives(tmp_path / "shards")]
    assert names == ["train-000000.tar", "val-000000.tar"]
    with tarfile.open(tmp_path / "shards" / "val-000000.tar") as archive:
        assert archive.getnames() == ["000000000.jpg", "000000001.jpg", ".names", ".crc32"]
    assert convert(tmp_path / "shards", tmp_path / "out.beton") == 0
    assert len(BetonReader(tmp_path / "out.val.beton")) == 2
    assert BetonReader(tmp_path / "out.beton").labels.tolist() == [-1, -1, -1]


# Shards of other tools


def test_shards_of_other_tools(tmp_path):
    pictures = [drawn_picture(index) for index in range(5)]
    jpegs = [jpeg_bytes(picture) for picture in pictures]
    long_name = "x" * 150 + "/é"
    source = tmp_path / "source"
    files = {"a.b/k1.cls": b"10", "a.b/k1.jpg": jpegs[0], "a.b/k1.json": b"{}"}
    files |= {"a.b/k2.jpeg": jpegs[1], "a.b/k2.cls": b"2\n", "a.b/k3.txt": b"no image"}
    write_tar(source / "imagenet-train-000000.tar", files)
    files = {f"{long_name}.jpg": jpegs[2], f"{long_name}.cls": b"0"}
    write_tar(source / "imagenet-train-000001.tar", files)
    files = {"1.png": saved(pictures[3], "PNG"), "1.cls": b"11", "__meta__": b""}
    write_tar(source / "imagenet-val-000000.tar", files)
    assert convert(source, tmp_path / "out.beton") == 0
    train, val = BetonReader(tmp_path / "out.beton"), BetonReader(tmp_path / "out.val.beton")
    assert [train.image(index).tobytes() for index in range(3)] == jpegs[:3]
    assert train.labels.tolist() == [10, 2, 0] and val.labels.tolist() == [11]
    assert train.class_names == val.class_names == [str(label) for label in range(12)]
    assert train.name(0) == "a.b/k1.jpg"


# The output folder


def test_only_a_folder_of_shards_is_replaced(many, tmp_path, capsys):
    flags = ["--format", "webdataset"]
    out = tmp_path / "shards"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert convert(many[0], out, *flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(many[0], out, *flags, "--overwrite") == 2
    assert "has no dataset.json" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    (out / "thesis.tex").unlink()
    assert convert(many[0], out, *flags) == 0  # an empty folder may be replaced
    assert convert(many[0], out, *flags, "--subset", 3, "--overwrite") == 0
    assert json.loads((out / "dataset.json").read_text())["num_images"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for other in (archives(out)[0], tmp_path / "pipe", tmp_path / "dangling"):
        assert convert(many[0], other, *flags, "--overwrite") == 2
        assert "name a new folder for the shards" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "dangling").is_symlink()


def test_a_link_to_a_folder_is_followed(many, tmp_path):
    (tmp_path / "large disk" / "shards").mkdir(parents=True)
    (tmp_path / "link").symlink_to("large disk/shards")
    assert convert(many[0], tmp_path / "link", "--format", "webdataset") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "large disk" / "shards" / "dataset.json").exists()
