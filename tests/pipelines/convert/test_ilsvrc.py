"""The ILSVRC2012 archives convert like a folder of their images."""

import io
from pathlib import Path

import numpy as np
import pytest
from hostile import write_tar
from sample_imagenet import CLASSES, convert, same_as


@pytest.fixture
def downloads(imagenet_folder, tmp_path) -> Path:
    """The two archives as downloaded, with unsorted members."""
    root, outer = tmp_path / "downloads", {}
    for name in sorted(CLASSES, reverse=True):
        files = sorted((imagenet_folder / "train" / name).iterdir(), reverse=True)
        write_tar(tmp_path / "class.tar", {path.name: path.read_bytes() for path in files})
        outer[f"{name}.tar"] = (tmp_path / "class.tar").read_bytes()
    write_tar(root / "ILSVRC2012_img_train.tar", outer)
    files = sorted((imagenet_folder / "val").rglob("*.JPEG"), key=lambda path: path.name)
    write_tar(root / "ILSVRC2012_img_val.tar", {path.name: path.read_bytes() for path in files})
    return root


def val_classes(folder: Path) -> list[str]:
    files = sorted((folder / "val").rglob("*.JPEG"), key=lambda path: path.name)
    return [path.parent.name for path in files]


def write_devkit(path: Path, folder: Path) -> None:
    """Write a devkit whose class numbers are not sorted by name, with a class of another year."""
    savemat = pytest.importorskip("scipy.io", reason="SciPy is not installed").savemat
    names = ["n15075141", "n01440764", "n01443537", "n99999999"]
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(i + 1, n, f"w{i}", 0) for i, n in enumerate(names)], fields)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets.reshape(-1, 1)})
    numbers = "".join(f"{names.index(name) + 1}\n" for name in val_classes(folder))
    top = "ILSVRC2012_devkit_t12/data"
    files = {f"{top}/ILSVRC2012_validation_ground_truth.txt": numbers.encode()}
    write_tar(path, files | {f"{top}/meta.mat": buffer.getvalue()}, "w:gz")


def test_ilsvrc_with_a_devkit(imagenet_folder, downloads, imagenet_beton, tmp_path):
    write_devkit(downloads / "ILSVRC2012_devkit_t12.tar.gz", imagenet_folder)
    assert convert(downloads, tmp_path / "out.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton")


@pytest.mark.parametrize("with_names", [True, False])
def test_ilsvrc_with_labels(imagenet_folder, downloads, imagenet_beton, tmp_path, with_names):
    lines = val_classes(imagenet_folder)
    if with_names:
        lines = [f"ILSVRC2012_val_{i:08} {line}" for i, line in enumerate(lines, 1)][::-1]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    flags = ["--labels", tmp_path / "labels.txt"]
    assert convert(downloads, tmp_path / "out.beton", *flags) == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton")

    alone = downloads / "ILSVRC2012_img_val.tar"
    assert convert(alone, tmp_path / "val.beton", *flags) == 0
    expected = imagenet_beton.with_suffix(".val.beton")
    assert (tmp_path / "val.beton").read_bytes() == expected.read_bytes()


def test_ilsvrc_train_archive_alone(downloads, imagenet_beton, tmp_path):
    (downloads / "ILSVRC2012_img_train.tar").rename(tmp_path / "renamed.tar")
    assert convert(tmp_path / "renamed.tar", tmp_path / "out.beton") == 0
    assert same_as(imagenet_beton, tmp_path / "out.beton", ["train"])


def test_ilsvrc_that_cannot_be_read(downloads, tmp_path, refused):
    out, labels = tmp_path / "out.beton", tmp_path / "labels.txt"
    refused(convert(downloads, out), "put ILSVRC2012_devkit_t12.tar.gz beside it")
    unknown = "n01440764\n" * 10 + "n00000000"
    for text, message in (("n01440764\n" * 3, "11 lines"), (unknown, "images: n00000000")):
        labels.write_text(text)
        refused(convert(downloads, out, "--labels", labels), message)
    (downloads / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"<html>")
    refused(convert(downloads, out))

    train = downloads / "ILSVRC2012_img_train.tar"
    for size in (300, 5_000, train.stat().st_size // 2):
        train.write_bytes(train.read_bytes()[:size] if size < train.stat().st_size else b"")
        refused(convert(train, out), "get it again")
    assert not out.exists()
