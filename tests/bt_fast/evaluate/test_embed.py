"""`bt-fast embed`: features of all images, in order, whole or not at all, continued when killed."""

import csv
import os
import re

import numpy as np
import pytest
import torch
from tiny_runs import failing

import bt_fast
from bt_fast.cli import main
from bt_fast.evaluate import embed as module
from bt_fast.evaluate import eval_setup
from pipelines.beton import BetonReader
from pipelines.crop import center_boxes, crop_and_resize

FLAGS = ["--device=cpu", "--precision=fp32", "--workers=1"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 10)


def expected_features(run, reader: BetonReader, size: int = 32) -> np.ndarray:
    """One image at a time: decoded by Pillow, cropped, normalised, through `load_encoder`."""
    import io

    from PIL import Image

    from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD

    encoder, rows = bt_fast.load_encoder(run), []
    for index in range(len(reader)):
        pixels = np.array(Image.open(io.BytesIO(reader.image(index).tobytes())).convert("RGB"))
        (box,) = center_boxes(1.0, *np.array([pixels.shape[:2]]).T)
        view = np.empty((size, size, 3), np.uint8)
        crop_and_resize(pixels, box, out=view)
        values = (view / 255 - IMAGENET_MEAN) / IMAGENET_STD
        with torch.no_grad():
            rows.append(encoder(torch.tensor(values).float().permute(2, 0, 1)[None])[0].numpy())
    return np.stack(rows)


def test_features_names_and_labels_in_order(labelled_run, small_beton, tmp_path, refused):
    """By the function; the command does not replace its files, and refuses another format."""
    flags = {"device": "cpu", "precision": "fp32", "workers": 1, "size": 32, "crop": 1.0}
    out = bt_fast.embed(labelled_run, small_beton, out=tmp_path / "f.npy", **flags)
    reader = BetonReader(small_beton)
    features = np.load(out, mmap_mode="r")
    assert features.dtype == np.float32 and features.shape[0] == len(reader)
    assert np.allclose(features, expected_features(labelled_run, reader), rtol=1e-3, atol=1e-3)
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [row["name"] for row in rows] == [reader.name(i) for i in range(len(reader))]
    assert [int(row["label"]) for row in rows] == reader.labels.tolist()
    assert [row["class"] for row in rows] == [reader.class_names[i] for i in reader.labels]
    command = ["embed", str(labelled_run), "--data", str(small_beton), "--out"]
    refused(main([*command, str(out)]), "--overwrite")
    refused(main([*command, "f.txt"]), "must end in .npy or .parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "f.npy"]


def test_an_interrupted_command_continues(labelled_run, small_beton, tmp_path, capsys):
    def run(name):
        flags = [f"--data={small_beton}", f"--out={tmp_path / name}", *FLAGS]
        return main(["embed", str(labelled_run), *flags])

    assert run("whole.npy") == 0
    with failing(eval_setup, "extract_features", KeyboardInterrupt(), at=3) as calls:
        assert run("parts.npy") == 130 and not (tmp_path / "parts.npy").exists()
        assert run("parts.npy") == 0 and len(calls) == 3 + 5  # 64 images in chunks of 10
    assert "continuing after 20 of 64 images" in capsys.readouterr().out
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_kill_while_files_are_moved(labelled_run, small_beton, tmp_path, monkeypatch, is_moved):
    out, replace = tmp_path / "f.npy", os.replace
    command = ["embed", str(labelled_run), f"--data={small_beton}", f"--out={out}", *FLAGS]

    def killed(origin, target):
        if is_moved or target != out:
            replace(origin, target)
        if target == out:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    assert main(command) == 130
    monkeypatch.undo()
    assert main([*command, *["--overwrite"] * is_moved]) == 0
    assert len(np.load(out)) == 64
    assert {path.name for path in tmp_path.iterdir()} == {"f.npy", "f.csv"}


def test_parquet_and_the_function(labelled_run, small_beton, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="PyArrow is not installed")
    flags = {"device": "cpu", "precision": "fp32", "workers": 1}
    out = bt_fast.embed(labelled_run, small_beton, out=tmp_path / "f.parquet", **flags)
    bt_fast.embed(labelled_run, small_beton, out=tmp_path / "f.npy", **flags)
    table = parquet.read_table(out).to_pydict()
    reader = BetonReader(small_beton)
    assert table["label"] == reader.labels.tolist()
    assert table["class"] == [reader.class_names[label] for label in reader.labels]
    assert np.array_equal(np.array(table["feature"], np.float32), np.load(tmp_path / "f.npy"))


@pytest.mark.slow
def test_ranks_divide_the_images(labelled_run, small_beton, tmp_path):
    for name, ranks in (("one", "1"), ("two", "2")):
        flags = [f"--data={small_beton}", f"--out={tmp_path / name}.npy", f"--gpus={ranks}", *FLAGS]
        assert main(["embed", str(labelled_run), *flags]) == 0
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert np.allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"sise": 32}, "sise: no such field of bt-fast embed"),
        ({"size": "32"}, "size must be int | None, got '32'"),
        ({"run": None}, "run must be Path, got None"),
        ({"device": "tpu"}, "--device is one of auto, cpu, cuda, got tpu"),
        ({"stem": "wide"}, "--stem is one of imagenet, "),
        ({"gpus": 2}, "several gpus need the command"),
        ({"out": "nowhere/f.npy"}, "the folder nowhere does not exist"),
    ],
)
def test_flags_of_the_function_are_checked(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bt_fast.embed(**{"run": "run", "out": "f.npy"} | flags)
