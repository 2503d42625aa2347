"""Many images, large files and full disks: bounded memory, 64-bit offsets, one-line messages."""

import tracemalloc
from pathlib import Path

import pytest
from conftest import drawn_picture, jpeg_bytes, mounted

import pipelines.convert.write_split
import pipelines.webdataset.writer
from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.convert.command import main
from pipelines.convert.manifest import FoundImage, Location, Manifest, Split
from pipelines.webdataset.writer import ShardWriter

CLASSES = ["cat", "dog"]


def peak(work, *arguments) -> int:
    """Peak of the bytes that Python and NumPy allocate while `work` runs."""
    tracemalloc.start()
    try:
        work(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fill_manifest(count: int, folder: Path) -> None:
    paths = (f"{folder}/cat/{index}.jpg" for index in range(count))
    images = (FoundImage(f"cat/{i}.jpg", i % 2, Location(path)) for i, path in enumerate(paths))
    manifest = Manifest(Split(root=folder, class_names=CLASSES, images=images), folder)
    manifest.select_subset(count // 2)
    assert sum(1 for _ in manifest) == count // 2


def write_beton(count: int, folder: Path) -> None:
    with BetonWriter(folder / f"{count}.beton", num_samples=count, class_names=CLASSES) as writer:
        for index in range(count):
            writer.add(b"x", 1, 1, index % 2, f"cat/{index}.jpg", checksum=0)
        writer.finalize()
        writer.sha256()


def write_shards(count: int, folder: Path) -> None:
    out = folder / f"shards {count}"
    out.mkdir()
    with ShardWriter(out, "train", max_bytes=1 << 40, has_classes=True) as writer:
        for index in range(count):
            writer.add(b"x", 1, 1, index % 2, f"cat/{index}.jpg", checksum=0)
    assert len(writer.shards) == -(-count // 1000)


@pytest.mark.slow
@pytest.mark.parametrize("work", [fill_manifest, write_beton, write_shards])
def test_memory_does_not_grow_with_the_number_of_images(work, tmp_path, monkeypatch):
    """For five times the images; a table of one number per image would take 8 B more for each."""
    monkeypatch.setattr(pipelines.webdataset.writer, "MAX_IMAGES", 1000)
    work(100, tmp_path)  # allocates what is allocated only once
    few, many = 5_000, 25_000
    assert peak(work, many, tmp_path) < peak(work, few, tmp_path) + 4 * (many - few)


def test_opening_takes_little_more_than_the_labels(tmp_path):
    write_beton(100, tmp_path)
    write_beton(200_000, tmp_path)
    BetonReader(tmp_path / "100.beton")
    few = peak(BetonReader, tmp_path / "100.beton")
    assert peak(BetonReader, tmp_path / "200000.beton") < few + 8 * 200_000 + (8 << 20)


@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_beyond_4_gib(tmp_path, in_place):
    """A sparse file with 5 GiB between the second and the third image."""
    jpegs = [jpeg_bytes(drawn_picture(index)) for index in range(4)]
    path = tmp_path / "large.beton"
    with BetonWriter(path, num_samples=4, class_names=CLASSES, in_place=in_place) as writer:
        for index, jpeg in enumerate(jpegs):
            if index == 2:
                writer._position += 5 << 30
                writer._file.seek(writer._position)
            writer.add(jpeg, 150, 200, index % 2, f"{index}.jpg")
        if in_place:
            assert writer.recover(0) == b""
    reader = BetonReader(path)
    assert path.stat().st_size > 5 << 30 and path.stat().st_blocks * 512 < 1 << 30
    assert [reader.image(index).tobytes() for index in range(4)] == jpegs
    assert reader.location(3)[0] > 1 << 32 and all(map(reader.checksum_ok, range(4)))
    flags = ["--workers", "1"]
    assert main([str(path), str(tmp_path / "small.beton"), *flags]) == 0
    small = BetonReader(tmp_path / "small.beton")
    assert [small.image(index).tobytes() for index in range(4)] == jpegs


# Outputs that cannot be written


@pytest.mark.parametrize("flags", [[], ["--format", "webdataset"], ["--continue"]])
@pytest.mark.parametrize("size", ["9m", "400k", "12k"])  # at the images, at once, at the manifest
def test_a_full_disk(tmp_path, capsys, flags, size):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "image.bin").write_bytes(jpeg_bytes(drawn_picture(0, 500, 400), quality=95))
    for index in range(400):
        (tmp_path / "images" / "a" / f"{index:0100}.jpg").symlink_to(tmp_path / "image.bin")
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        out = disk / ("shards" if "webdataset" in flags else "out.beton")
        assert main([str(tmp_path / "images"), str(out), "--workers", "1", *flags]) == 1
        error = capsys.readouterr().err
        assert "No space left on device; free some space" in error and error.count("\n") == 1
        kept = [f"{out.name}.partial"] if "--continue" in flags else []
        assert [path.name for path in disk.iterdir()] == kept
