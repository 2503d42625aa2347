"""Held-out images that are training images are found, and every evaluation says so."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import drawn_picture, jpeg_bytes, write_beton
from hostile import make_folder
from tiny_runs import evaluate

from bt_fast.evaluate import overlap
from bt_fast.evaluate.overlap import shared_images
from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.loading.image_files import open_folder

JPEGS = [jpeg_bytes(drawn_picture(seed, 24, 20)) for seed in range(8)]


def beton(path: Path, jpegs: list[bytes], checksum: int | None = None) -> BetonReader:
    with BetonWriter(path, num_samples=len(jpegs), class_names=["a"]) as writer:
        for index, jpeg in enumerate(jpegs):
            writer.add(jpeg, 20, 24, 0, f"a/{index}.jpg", checksum)
        writer.finalize()
    return BetonReader(path)


def test_images_of_betons_are_compared_by_content(tmp_path):
    """Other positions, files and names; one image twice; no image of the training set."""
    train = beton(tmp_path / "train.beton", JPEGS[:5])
    val = beton(tmp_path / "val.beton", [JPEGS[6], JPEGS[4], JPEGS[7], JPEGS[0], JPEGS[4]])
    assert shared_images(train, val).tolist() == [1, 3, 4]
    assert shared_images(train, train).tolist() == [0, 1, 2, 3, 4]
    assert not len(shared_images(train, beton(tmp_path / "other.beton", JPEGS[5:])))


def test_a_checksum_alone_is_no_proof(tmp_path):
    """Images of one length and, as the file says, one CRC-32, of which one is in both."""
    size = max(map(len, JPEGS))
    padded = [jpeg + bytes(size - len(jpeg)) for jpeg in JPEGS]
    train = beton(tmp_path / "train.beton", padded[:4], checksum=7)
    val = beton(tmp_path / "val.beton", padded[3:], checksum=7)
    assert shared_images(train, val).tolist() == [0]


@pytest.mark.parametrize(
    "is_large,expected", [(False, ["copy", "hard", "soft"]), (True, ["hard", "soft"])]
)
def test_image_files_are_compared(is_large, expected, tmp_path, monkeypatch):
    """By content, those of a large folder by file: under another path, as hard or symbolic link."""
    monkeypatch.setattr(overlap, "_MAX_BYTES", 100 if is_large else 1e9)
    train, val = make_folder(tmp_path / "train", {"a": 4, "b": 2}), tmp_path / "val" / "b"
    val.mkdir(parents=True)
    os.link(train / "a" / "001.jpg", val / "hard.jpg")
    (val / "soft.jpg").symlink_to(train / "b" / "000.jpg")
    shutil.copy(train / "a" / "002.jpg", val / "copy.jpg")
    (val / "other.jpg").write_bytes(JPEGS[0])
    (val / "broken.jpg").write_bytes(b"")
    os.mkfifo(val / "pipe.jpg")
    (tmp_path / "link").symlink_to(train)
    ours, theirs, linked = (open_folder(tmp_path / n)["train"] for n in ("train", "val", "link"))
    names = [theirs.name(index) for index in shared_images(ours, theirs)]
    assert names == [f"b/{name}.jpg" for name in expected]
    assert len(shared_images(ours, linked)) == len(ours) == 6
    converted = beton(tmp_path / "x.beton", [(train / "b" / "001.jpg").read_bytes(), JPEGS[1]])
    assert shared_images(ours, converted).tolist() == ([] if is_large else [0])


class WithoutChecksums(BetonReader):
    """As of a file that FFCV wrote."""

    def location(self, index: int):
        return *super().location(index)[:2], None


def test_files_without_checksums_are_read(tmp_path, monkeypatch):
    """Large ones are only compared with themselves."""
    write_beton(tmp_path / "a.beton", 8)
    shutil.copy(tmp_path / "a.beton", tmp_path / "b.beton")
    a, b = (WithoutChecksums(tmp_path / name) for name in ("a.beton", "b.beton"))
    assert len(shared_images(a, b)) == 8
    monkeypatch.setattr(overlap, "_MAX_BYTES", 100)
    assert len(shared_images(a, a)) == 8 and not len(shared_images(a, b))


@pytest.mark.parametrize(
    "command,flags",
    [
        ("knn", []),
        # All others end after the warning, by an error.
        ("linear", ["--cached", "--views=0"]),
        ("semi", ["--train-list=nowhere.txt"]),
        ("transfer", ["--data={train}", "--lr=-1"]),
        ("all", []),
    ],
)
def test_every_evaluation_warns(command, flags, labelled_run, tmp_path, capsys, monkeypatch):
    def end(*_, **__):
        raise ValueError("enough")

    monkeypatch.setattr("bt_fast.evaluate.all_protocols.measure_knn", end)
    train = labelled_run.parent / "train.beton"
    flags = [flag.format(train=train) for flag in flags]
    status = evaluate(labelled_run, tmp_path, command, *flags, "--val-data", train)
    assert status == (0 if command == "knn" else 2)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    names = "class-0/000.jpg, class-1/001.jpg, class-2/002.jpg, ..."
    assert warnings == [
        f"warning: 64 of the 64 held-out images of {train} are training images of {train}"
        f" ({names}): the scores are not those of unseen images; choose others with --val-data"
    ]
