"""Web shards: those of bt-convert, read by webdataset, DALI and tar, and those of other tools."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import make_folder, saved
from PIL import Image

from pipelines.beton import BetonReader
from pipelines.convert.command import main

FILES = {"cat": 14, "dog": 21, "eel": 6}


def convert(*arguments) -> int:
    return main([str(argument) for argument in arguments] + ["--workers", "1"])


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> BetonReader:
    """The reference: 41 images of 3 classes, converted from a folder."""
    root = tmp_path_factory.mktemp("reference")
    folder = make_folder(root / "images", FILES)
    assert convert(folder, root / "out.beton") == 0
    return BetonReader(root / "out.beton")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, beton) -> Path:
    """The same images in shards of the smallest --shard-size."""
    root = tmp_path_factory.mktemp("shards") / "shards"
    assert convert(beton.path, root, "--format", "webdataset", "--shard-size", 1) == 0
    return root


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


def test_tar_reads_keys_images_and_labels(shards, beton):
    assert [path.name for path in archives(shards)] == ["train-000000.tar"]
    with tarfile.open(archives(shards)[0]) as archive:
        names = archive.getnames()
        contents = {name: archive.extractfile(name).read() for name in names}
    for index in range(len(beton)):
        assert contents.pop(f"{index:09}.jpg") == beton.image(index).tobytes()
        assert int(contents.pop(f"{index:09}.cls")) == beton.label(index)
    assert contents.pop(".names").split(b"\0")[0] == b"cat/000.jpg"
    checksums = [zlib.crc32(beton.image(index)) for index in range(len(beton))]
    assert contents.pop(".crc32") == np.array(checksums, "<u4").tobytes()
    assert not contents and len(names) == 2 * 41 + 2


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


def index_of(path: Path) -> str:
    """The index of an archive in DALI's format, from the members that tarfile lists."""
    samples: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            if key:
                entry = f" {extension} {member.offset_data} {member.size} {member.name}"
                samples[key] = samples.get(key, "") + entry
    lines = [f"v1.2 {len(samples)}", *(sample.strip() for sample in samples.values())]
    return "\n".join(lines) + "\n"


def test_index_files(shards, many, tmp_path):
    for path in [*archives(shards), *archives(many[1])]:
        assert path.with_suffix(".idx").read_text() == index_of(path)


def test_dalis_tool_writes_the_same_index(many, tmp_path, capsys):
    wds2idx = pytest.importorskip("wds2idx", reason="DALI is not installed")
    for path in archives(many[1]):
        with wds2idx.IndexCreator(str(path), str(tmp_path / "idx")) as creator:
            creator.create_index()
        assert (tmp_path / "idx").read_text() == path.with_suffix(".idx").read_text()


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
        jpegs, classes = dali.fn.readers.webdataset(
            paths=[str(path) for path in archives(shards)],
            ext=["jpg", "cls"],
            missing_component_behavior="error",
            name="reader",
            **(indices if indexed else {}),
        )
        return jpegs, classes

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


def test_an_image_larger_than_a_shard(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    for index in range(2):
        path = tmp_path / "images" / "a" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(Image.fromarray(noise), quality=100))
        assert path.stat().st_size > 1_000_000
    flags = ["--format", "webdataset", "--shard-size", 1, "--max-side", 0]
    assert convert(tmp_path / "images", tmp_path / "shards", *flags) == 0
    assert len(archives(tmp_path / "shards")) == 2


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


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_of_other_tools(tmp_path):
    pictures = [drawn_picture(index) for index in range(5)]
    jpegs = [jpeg_bytes(picture) for picture in pictures]
    long_name = "x" * 150 + "/é"
    source = tmp_path / "source"
    source.mkdir()
    files = {"a.b/k1.cls": b"10", "a.b/k1.jpg": jpegs[0], "a.b/k1.json": b"{}"}
    files |= {"a.b/k2.jpeg": jpegs[1], "a.b/k2.cls": b"2\n", "a.b/k3.txt": b"no image"}
    write_archive(source / "imagenet-train-000000.tar", files)
    files = {f"{long_name}.jpg": jpegs[2], f"{long_name}.cls": b"0"}
    write_archive(source / "imagenet-train-000001.tar", files)
    files = {"1.png": saved(pictures[3], "PNG"), "1.cls": b"11", "__meta__": b""}
    write_archive(source / "imagenet-val-000000.tar", files)
    assert convert(source, tmp_path / "out.beton") == 0
    train, val = BetonReader(tmp_path / "out.beton"), BetonReader(tmp_path / "out.val.beton")
    assert [train.image(index).tobytes() for index in range(3)] == jpegs[:3]
    assert train.labels.tolist() == [10, 2, 0] and val.labels.tolist() == [11]
    assert train.class_names == val.class_names == [str(label) for label in range(12)]
    assert train.name(0) == "a.b/k1.jpg"


def rename_shard(shards: Path, name: str) -> None:
    text = (shards / "dataset.json").read_text()
    (shards / "dataset.json").write_text(text.replace("train-000000.tar", name))


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda shards: archives(shards)[1].unlink(), "get it again"),
        (lambda shards: archives(shards)[0].write_bytes(b"x"), "get it again"),
        (lambda shards: (shards / "dataset.json").write_text("{"), "dataset.json is damaged"),
        (lambda shards: (shards / "dataset.json").write_text("[1]"), "dataset.json is damaged"),
        (lambda shards: rename_shard(shards, "../../x.tar"), "dataset.json is damaged"),
    ],
)
def test_damaged_shards_print_one_line(many, tmp_path, capsys, damage, message):
    shutil.copytree(many[1], tmp_path / "shards")
    damage(tmp_path / "shards")
    assert convert(tmp_path / "shards", tmp_path / "out.beton") == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_a_shard_outside_the_folder_is_refused_without_asserts(many, tmp_path):
    """`python -O` removes asserts. The archive outside exists, with the size in dataset.json."""
    shutil.copytree(many[1], tmp_path / "shards")
    shutil.copy(archives(tmp_path / "shards")[0], tmp_path / "outside.tar")
    rename_shard(tmp_path / "shards", "../outside.tar")
    command = [sys.executable, "-O", "-m", "pipelines.convert.command"]
    command += [str(tmp_path / "shards"), str(tmp_path / "out.beton"), "--workers=1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out.beton").exists()
    assert "dataset.json is damaged" in done.stderr and done.stderr.count("\n") == 1


def test_damage_inside_shards_of_other_tools(tmp_path, capsys):
    jpeg = jpeg_bytes(drawn_picture(0))
    write_archive(tmp_path / "a.tar", {"1.jpg": jpeg, "1.cls": b"cat"})
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 2
    assert "1.cls is not a number" in capsys.readouterr().err
    for label, message in ((b"9" * 12, "is out of range"), (b"1" * 200, "has 200 bytes")):
        write_archive(tmp_path / "a.tar", {"1.jpg": jpeg, "1.cls": label})
        assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 2
        assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    write_archive(tmp_path / "a.tar", {"1.jpg": jpeg, "1.cls": b"1", "2.jpg": jpeg})
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 2
    assert "2.jpg has no class, unlike other images" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: len(jpeg) // 2])
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 2
    assert "not a complete tar archive" in capsys.readouterr().err
    (tmp_path / "a.tar").write_bytes(b"<html>404</html>" * 99)
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 2
    assert "not a complete tar archive" in capsys.readouterr().err


# The output folder


def test_only_a_folder_of_shards_is_replaced(shards, beton, tmp_path, capsys):
    flags = ["--format", "webdataset"]
    out = tmp_path / "shards"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    assert convert(beton.path, out, *flags) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert(beton.path, out, *flags, "--overwrite") == 2
    assert "has no dataset.json" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]

    (out / "thesis.tex").unlink()
    assert convert(beton.path, out, *flags) == 0  # an empty folder may be replaced
    assert convert(beton.path, out, *flags, "--subset", 3, "--overwrite") == 0
    assert json.loads((out / "dataset.json").read_text())["num_images"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for other in (archives(out)[0], tmp_path / "pipe", tmp_path / "dangling"):
        assert convert(beton.path, other, *flags, "--overwrite") == 2
        assert "name a new folder for the shards" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "dangling").is_symlink()


def test_a_link_to_a_folder_is_followed(beton, tmp_path):
    (tmp_path / "large disk" / "shards").mkdir(parents=True)
    (tmp_path / "link").symlink_to("large disk/shards")
    assert convert(beton.path, tmp_path / "link", "--format", "webdataset") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "large disk" / "shards" / "dataset.json").exists()
