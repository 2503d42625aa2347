"""`bt-convert`: stored images, rejected images, wrong usage, and no partial output."""

import errno
import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import BROKEN, STORED, make_folder, make_hostile_folder
from PIL import Image
from test_convert_stops import names_in

from pipelines.beton import BetonReader
from pipelines.convert.command import main
from pipelines.convert.jpeg import prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), {"cat": 7, "dog": 12, "eel": 3})


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "images"
    make_hostile_folder(root)
    return root


@pytest.fixture
def train_and_val(tmp_path) -> Path:
    """A folder `s` with an image in either split."""
    for split in ("train", "val"):
        make_folder(tmp_path / "s" / split, {"cat": 1})
    return tmp_path / "s"


def convert(*arguments) -> int:
    return main([str(argument) for argument in arguments])


# Stored images


def test_plain_jpegs_keep_their_bytes_in_torchvisions_order(folder, tmp_path):
    from torchvision.datasets import ImageFolder

    assert convert(folder, tmp_path / "one.beton", "--workers", 1) == 0
    assert convert(folder, tmp_path / "out.beton", "--workers", 3) == 0
    assert (tmp_path / "one.beton").read_bytes() == (tmp_path / "out.beton").read_bytes()
    reader, reference = BetonReader(tmp_path / "out.beton"), ImageFolder(folder)
    assert reader.class_names == reference.classes
    assert len(reader) == len(reference) == 22
    for index, (path, label) in enumerate(reference.samples):
        assert reader.image(index).tobytes() == Path(path).read_bytes()
        assert reader.label(index) == label
        assert folder / reader.name(index) == Path(path)
        assert reader.size(index) == Image.open(path).size[::-1]
        assert reader.checksum_ok(index)


# Rejected images


def test_hostile_folder(hostile, tmp_path, capsys):
    out = tmp_path / "out.beton"
    assert convert(hostile, out) == 1
    errors = capsys.readouterr().err
    for name, reason in BROKEN.items():
        line = next(line for line in errors.splitlines() if f"/{name}:" in line)
        assert reason in line, line
    assert errors.count("Broken: ") == len(BROKEN)
    assert names_in(tmp_path) == []

    assert convert(hostile, out, "--skip-broken") == 0
    output = capsys.readouterr().out
    assert "Classes without images" in output
    assert "Of 1 animations only the first frame is stored" in output
    reader, report = BetonReader(out), json.loads(Path(f"{out}.json").read_text())
    assert reader.class_names == report["classes"] == ["a", "b", "empty"]
    names = [reader.name(index) for index in range(len(reader))]
    assert set(names) == set(STORED)
    assert [name.split("/")[0] for name in names] == ["ab"[label] for label in reader.labels]
    assert {reject["path"] for reject in report["rejects"]} == set(BROKEN)
    reencoded = {name for name, action in STORED.items() if action.startswith("reencoded")}
    repaired = {name for name in reencoded if name.lower().endswith(("jpg", "jpeg"))}
    assert {repair["path"] for repair in report["repairs"]} == repaired
    for index, name in enumerate(names):
        prepared = prepare((hostile / name).read_bytes(), 512)
        assert prepared.action.startswith(STORED[name])
        assert reader.image(index).tobytes() == prepared.jpeg
        assert reader.size(index) == (prepared.height, prepared.width)


def test_names_that_are_not_utf8(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    plain = jpeg_bytes(drawn_picture(0))
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/\xff\xfe.jpg")).write_bytes(plain)
    except OSError:
        pytest.skip("this file system requires UTF-8")
    (tmp_path / "images" / "\x1b[31m.jpg").write_bytes(b"")
    assert convert(tmp_path / "images", tmp_path / "out.beton", "--skip-broken") == 0
    assert BetonReader(tmp_path / "out.beton").name(0) == "\\xff\\xfe.jpg"
    assert "\x1b" not in capsys.readouterr().err


def test_an_unreadable_folder_is_reported_as_broken(folder, tmp_path, monkeypatch, capsys):
    scandir = os.scandir

    def guarded(path):  # simulated, because root may read every folder
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert convert(folder, tmp_path / "out.beton") == 1
    assert "dog: folder not readable: Permission denied" in capsys.readouterr().err


# Pixels whose meaning flags decide


def test_pixel_flags(tmp_path, capsys):
    """They are in the report, must be the same for --continue, and --verify ignores them."""
    (tmp_path / "images").mkdir()
    ramp = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    pages = [Image.fromarray(page) for page in (ramp[::-1], ramp)]
    pages[0].save(tmp_path / "images" / "1.tif", save_all=True, append_images=pages[1:])
    drawn_picture(0).save(tmp_path / "images" / "2.gif", save_all=True, append_images=pages)
    command = [tmp_path / "images", tmp_path / "out.beton", "--workers", 1]
    assert convert(*command, "--bits", 12) == 1
    assert "2 pages of 16-bit grey, values 0 to 4095: which page is" in capsys.readouterr().err
    assert convert(*command, "--bits=12", "--page=2", "--verify") == 0
    report = json.loads((tmp_path / "out.beton.json").read_text())
    assert [report[key] for key in ("bits", "range", "bands", "page")] == [12, None, None, 2]
    assert report["reencoded"] == {"TIFF, page 2, bits 12": 1, "GIF, page 2": 1}
    stored = Image.open(io.BytesIO(BetonReader(tmp_path / "out.beton").image(0).tobytes()))
    assert np.abs(np.asarray(stored.convert("L")) - ramp * (255 / 4095)).max() < 5

    assert convert(*command[:1], tmp_path / "x.beton", "--range=0:4095", "--continue") == 1
    assert convert(*command[:1], tmp_path / "x.beton", "--range=0:3000", "--continue") == 2
    assert "range was [0.0, 4095.0]" in capsys.readouterr().err


# Folder layouts


def test_train_and_val(tmp_path):
    make_folder(tmp_path / "images" / "train", {"cat": 3, "dog": 2, "eel": 1})
    make_folder(tmp_path / "images" / "val", {"dog": 4, "eel": 1}, seed=50)
    assert convert(tmp_path / "images", tmp_path / "out.beton", "--subset", "4") == 0
    train, val = BetonReader(tmp_path / "out.beton"), BetonReader(tmp_path / "out.val.beton")
    assert train.class_names == val.class_names == ["cat", "dog", "eel"]
    assert train.labels.tolist() == [0, 0, 1, 2]  # the subset is of train only
    assert val.labels.tolist() == [1, 1, 1, 1, 2]
    report = json.loads((tmp_path / "out.val.beton.json").read_text())
    assert report["samples_per_class"] == [0, 4, 1]
    assert report["checksum"] == f"sha256:{val.sha256()}"


def test_a_broken_val_leaves_no_train(train_and_val, tmp_path):
    (train_and_val / "val" / "cat" / "x.jpg").touch()
    assert convert(train_and_val, tmp_path / "out.beton") == 1
    assert names_in(tmp_path) == ["s"]


# Usage


@pytest.mark.parametrize(
    "command,message",
    [
        ("missing out.beton", "does not exist"),
        ("nothing out.beton", "no images"),
        ("images out.ffcv", "must end in .beton"),
        ("images missing/out.beton", "does not exist; create it first"),
        ("images exists.beton", "--overwrite"),
        ("images --verify --skip-broken", "--skip-broken applies to a conversion;"),
        ("images --verify --max-side 64", "--max-side applies to a conversion;"),
        ("images out.beton --shard-size 2", "--shard-size applies to --format webdataset"),
        ("images out.beton --bits 0", "--bits 0"),
        ("images out.beton --bits 99", "--bits 99: must be 64 or less"),
        ("x.beton out.beton --bits 12", "--page do not apply to a .beton"),
        ("images out.beton --page 0", "--page 0"),
        ("images out.beton --range 5", "--range 5"),
        ("images out.beton --range 9:1", "--range 9:1"),
        ("images out.beton --range 0:nan", "--range 0:nan"),
        ("images out.beton --bands 1,2", "--bands 1,2"),
        ("images out.beton --bands 0", "--bands 0"),
        ("images out.beton --bands 4,3,2,1", "--bands 4,3,2,1"),
        ("images out.beton --bits 8 --range 0:9", "--bits and --range both define white"),
        ("images out.beton --shard 0/2", "--shard 0/2"),
        ("images out.beton --shard 3/2", "--shard 3/2"),
        ("images out.beton --shard a/b", "--shard a/b"),
        ("images out.beton --shard 1/50", "--shard 1/50: train has fewer images than parts"),
    ],
)
def test_wrong_usage_prints_one_line(tmp_path, monkeypatch, refused, command, message):
    make_folder(tmp_path, {"images": 1})
    (tmp_path / "nothing").mkdir()
    (tmp_path / "exists.beton").write_text("precious")
    before = names_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(convert(*command.split()), message)
    assert names_in(tmp_path) == before
    assert (tmp_path / "exists.beton").read_text() == "precious"


def test_a_val_file_of_another_conversion_is_an_error(tmp_path, refused):
    make_folder(tmp_path / "images" / "a", {"": 2})
    (tmp_path / "out.val.beton").write_text("older")
    for flags in ([], ["--overwrite"]):
        refused(convert(tmp_path / "images", tmp_path / "out.beton", *flags), "out.val.beton")
    assert names_in(tmp_path) == ["images", "out.val.beton"]


@pytest.mark.parametrize(
    "name",
    ["out.beton", "out.val.beton", "out.report.html", "out.beton.json", "out.val.beton.json"],
)
def test_what_has_the_name_of_an_output_is_not_replaced(train_and_val, tmp_path, refused, name):
    """A report, or a link that leads nowhere."""
    path = tmp_path / name
    if path.suffix == ".beton":
        path.symlink_to("unmounted/disk.beton")
    else:
        path.write_text("mine")
    refused(convert(train_and_val, tmp_path / "out.beton"), f"{path} ")
    assert path.is_symlink() or path.read_text() == "mine"
    assert names_in(tmp_path) == sorted([path.name, "s"])


@pytest.mark.parametrize("call", range(5))
def test_files_appear_together(train_and_val, tmp_path, monkeypatch, capsys, call):
    """A failure of any of the moves leaves none of the files, and a stop signal waits."""
    replace, calls = os.replace, []

    def fail(origin, target):
        if Path(target).name.startswith("out.") and "partial" not in str(target):
            calls.append(target)
            os.kill(os.getpid(), signal.SIGTERM)
            if len(calls) == call + 1:
                raise OSError(errno.EIO, "Input/output error", str(target))
        replace(origin, target)

    monkeypatch.setattr(os, "replace", fail)
    assert convert(train_and_val, tmp_path / "out.beton", "--continue") == 1
    assert "Input/output error" in capsys.readouterr().err
    assert names_in(tmp_path) == ["out.beton.partial", "s"]
    monkeypatch.setattr(os, "replace", replace)
    assert convert(train_and_val, tmp_path / "out.beton", "--continue") == 0
    assert "1 images were converted before" in capsys.readouterr().out
    assert len(names_in(tmp_path)) == 6


def test_a_failed_overwrite_keeps_the_old_file(hostile, tmp_path):
    (tmp_path / "out.beton").write_text("old")
    assert convert(hostile, tmp_path / "out.beton", "--overwrite") == 1
    assert (tmp_path / "out.beton").read_text() == "old"
    assert names_in(tmp_path) == ["out.beton"]


def test_an_error_of_reading_is_not_one_of_writing(folder, tmp_path, monkeypatch, refused):
    def fail(split, top, label, nested):
        raise OSError(errno.EIO, "Input/output error", str(top))

    monkeypatch.setattr("pipelines.convert.sources.folder._images_below", fail)
    refused(convert(folder, tmp_path / "out.beton"), f"SOURCE {folder} cannot be read: [Errno 5]")


def test_repairs_are_counted_and_the_first_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.convert.data_report.MAX_LISTED", 2)
    for index in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        drawn_picture(index).save(tmp_path / "in" / f"{index}.jpg", "PNG")
    assert main([str(tmp_path / "in"), str(tmp_path / "out.beton"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "out.beton.json").read_text())
    assert (report["num_repairs"], len(report["repairs"])) == (3, 2)
