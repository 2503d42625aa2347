"""Files from strangers run no code and take no more than they are."""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, drawn_picture, jpeg_bytes, run_python, write_beton
from hostile import jpeg_bomb, make_folder, png_bomb, write_tar
from sample_voc import write_devkit
from tiny_runs import pretrain

from bt_fast.cli import main
from pipelines.beton.writer import BetonWriter
from pipelines.convert.command import main as convert

FOLDERS = ("bt_fast", "pipelines", "tools")


def lint(*arguments: str, source: str = "") -> int:
    """Exit status of the linter, which refuses calls that run or download code (pyproject.toml)."""
    rules = "--select=TID251,S102,S202,S307,S602,S604,S605"
    command = [sys.executable, "-m", "ruff", "check", rules, *arguments]
    return subprocess.run(command, cwd=ROOT, input=source, text=True).returncode


def test_no_source_reads_code_from_data():
    assert lint(*FOLDERS) == 0
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        assert not re.search("allow_pickle|trust_remote_code|noqa.*S[0-9]", path.read_text()), path


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "from torch import load\nload(f, weights_only=flag)",
        "from pickle import load as innocent\ninnocent(f)",
        "import pickle\nread = pickle.load",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "eval(text)",
        "import tarfile\ntarfile.open(f).extractall(p)",
    ],
)
def test_the_linter_finds_what_it_is_for(source):
    assert lint("--stdin-filename=bt_fast/x.py", "-", source=source + "\n") == 1


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bombs(folder: Path, mark: Path) -> list[Path]:
    """The same bomb in every form that torch.save has or had, and bare."""
    names = ("hidden.pth", "legacy.pth", "bare.pth", "pretends.safetensors")
    hidden, legacy, *bare = files = [folder / name for name in names]
    content = {"model": {"conv1.weight": torch.zeros(3)}, "args": Bomb(mark)}
    torch.save(content, hidden)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    for file in bare:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    return files


def test_a_pickle_bomb_never_goes_off(tmp_path, small_beton, refused):
    mark = tmp_path / "exploded"
    files = bombs(tmp_path, mark)
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert mark.exists(), "the bomb is none"
    mark.rmdir()
    for file in files:
        for command in (
            ["eval", "knn", str(file), "--data", str(small_beton), "--device", "cpu"],
            ["export", str(file), "--to", "torchvision", "--out", str(tmp_path / "out.pth")],
        ):
            refused(main(command), f"{file} cannot be read as weights")
            assert not mark.exists() and not (tmp_path / "out.pth").exists()


def test_a_run_with_a_bomb_in_place_of_its_checkpoint_is_not_resumed_from_it(
    labelled_run, tmp_path, capsys, refused
):
    run, mark = tmp_path / "run", tmp_path / "exploded"
    shutil.copytree(labelled_run, run)
    for folder in (run / "checkpoints").glob("step-*"):
        for file in folder.iterdir():
            file.write_bytes(pickle.dumps(Bomb(mark)))
    (run / "encoder.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    resume = ["pretrain", "--resume", str(run), "--device", "cpu", "--max-steps", "1"]
    refused(main(resume), "no intact checkpoint is left")
    for folder in (run / "checkpoints").glob("*.damaged"):
        folder.rename(folder.with_suffix(""))
    (run / "encoder.safetensors").unlink()
    assert main(resume) == 0
    assert "skipped a damaged checkpoint" in capsys.readouterr().out and not mark.exists()


def test_archives_and_headers_that_claim_more_than_they_are(tmp_path, capsys):
    zipped = tmp_path / "bomb.pth"
    torch.save({"conv1.weight": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert zipped.stat().st_size < 40_000  # of 4 MB
    virtual = tmp_path / "virtual.pth"  # 4 TB of one value
    torch.save({"conv1.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, virtual)
    header = tmp_path / "header.safetensors"
    header.write_bytes(struct.pack("<Q", 1 << 62) + b"{}" * 100)
    offsets = tmp_path / "offsets.safetensors"
    claim = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}
    text = json.dumps({"conv1.weight": claim}).encode()
    offsets.write_bytes(struct.pack("<Q", len(text)) + text)
    too_large = "its tensors are larger than it"
    reasons = {zipped: "compressed", virtual: too_large, header: "header", offsets: ""}
    for file, reason in reasons.items():
        assert main(["export", str(file), "--to", "timm", "--out", str(tmp_path / "o.pth")]) == 2
        error = capsys.readouterr().err
        assert f"{file} cannot be read as weights" in error and error.count("\n") == 1
        assert reason in error.lower()


def test_a_decompression_bomb_is_refused_everywhere(labelled_run, tmp_path, capsys, refused):
    """At conversion, and where an evaluation reads a folder of images."""
    images = {"bomb.png": png_bomb(13_000, 13_000), "bomb.jpg": jpeg_bomb(65_000, 65_000)}
    for name, data in images.items():
        folder = make_folder(tmp_path / name, {"a": 1, "b": 1})
        (folder / "b" / name).write_bytes(data)
        assert convert([str(folder), str(tmp_path / "out.beton"), "--workers=1"]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2 and "pixels, more than" in errors[0] and "1 broken" in errors[1]
        flags = ["--data", str(folder), "--device=cpu", "--workers=1"]
        refused(main(["eval", "knn", str(labelled_run), *flags]))


def test_a_record_that_decodes_to_another_size_is_refused(tmp_path, capsys):
    """A forged .beton whose table says 8 x 8 of what would be 4 GB."""
    data = tmp_path / "x.beton"
    with BetonWriter(data, num_samples=16) as writer:
        for index in range(16):
            writer.add(jpeg_bomb(40000, 40000), 8, 8, -1, str(index))
    assert pretrain("--data", data, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "40000x40000 but was recorded as 8x8" in error and error.count("\n") == 1


def ambiguous_archive(folder: Path) -> list[str]:
    """Web shards with two images in a sample."""
    jpeg = jpeg_bytes(drawn_picture(0, 40, 30))
    write_tar(folder / "mixed.tar", {"1.jpg": jpeg, "1.a.jpg": jpeg, "1.cls": b"1"})
    paths = [str(folder / "mixed.tar"), str(folder / "out")]
    return ["convert", *paths, "--format=webdataset", "--workers=1"]


def shard_outside(folder: Path) -> list[str]:
    """Web shards whose archive is outside of their folder, where it exists."""
    shards = folder / "shards"
    data = str(write_beton(folder / "x.beton", 4))
    assert convert([data, str(shards), "--format=webdataset", "--workers=1"]) == 0
    (shards / "train-000000.tar").rename(folder / "outside.tar")
    text = (shards / "dataset.json").read_text()
    (shards / "dataset.json").write_text(text.replace("train-000000", "../outside"))
    return ["convert", str(shards), str(folder / "out.beton"), "--workers=1"]


def grouped_weights(folder: Path) -> list[str]:
    """A ResNet-18 but for one convolution."""
    weights = torchvision.models.resnet18().state_dict()
    weights["layer3.1.conv2.weight"] = torch.zeros(256, 8, 3, 3)
    torch.save(weights, folder / "w.pth")
    return ["export", str(folder / "w.pth"), "--to=timm", f"--out={folder / 'o.pth'}"]


def voc_numbers(folder: Path) -> list[str]:
    """A class list with a number that no int8 holds."""
    lists = write_devkit(folder) / "VOC2007" / "ImageSets" / "Main"
    (lists / "red_test.txt").write_text((lists / "red_test.txt").read_text().replace(" 1", "300"))
    return ["transfer", "--dataset=voc07", f"--data={folder / 'VOCdevkit'}"]


def inat(folder: Path, category: object, name: object = "a.jpg") -> list[str]:
    annotation = {"image_id": 1, "category_id": category}
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [annotation]}
    for split in ("train", "val"):
        (folder / f"{split}2018.json").write_text(json.dumps(content))
    return ["transfer", "--dataset=inat18", f"--data={folder}"]


def short_table(folder: Path) -> list[str]:
    """A .beton without its last byte."""
    data = write_beton(folder / "x.beton", 4)
    data.write_bytes(data.read_bytes()[:-1])
    return ["pretrain", f"--data={data}", f"--run-dir={folder / 'new'}", "--device=cpu"]


HOSTILE = {
    "2 images share the key 1 (1.jpg, 1.a.jpg)": ambiguous_archive,
    "dataset.json is damaged": shard_outside,
    "layer3.1.conv2.weight is [256, 8, 3, 3] instead of [256, 256, 3, 3]": grouped_weights,
    "red_test.txt has numbers other than -1, 0 and 1": voc_numbers,
    "train2018.json is not in iNaturalist's format: TypeError": lambda f: inat(f, "five"),
    "is not in iNaturalist's format: TypeError(": lambda f: inat(f, 5, name=None),
    "label 1000000000000 is out of range": lambda f: inat(f, 10**12),
    "truncated, or its allocation table is damaged": short_table,
}
IN_TURN = """
import json, sys
from bt_fast.cli import main
from pipelines.convert.command import main as convert
assert False, "python -O removes this"
for arguments in json.loads(sys.argv[1]):
    rest = arguments[1:]
    print(convert(rest) if arguments[0] == "convert" else main(arguments), file=sys.stderr)
"""


@pytest.mark.slow
def test_without_asserts_what_strangers_wrote_is_still_checked(labelled_run, tmp_path):
    """`python -O` removes asserts: none of them may be a check of a file."""
    commands = []
    for number, make in enumerate(HOSTILE.values()):
        (folder := tmp_path / str(number)).mkdir()
        command = make(folder)
        if command[0] == "transfer":
            command = ["eval", "transfer", str(labelled_run), *command[1:], "--device=cpu"]
        commands.append(command)
    done = run_python("-O", "-c", IN_TURN, json.dumps(commands), cwd=ROOT)
    errors = done.stderr.splitlines()
    assert len(errors) == 2 * len(HOSTILE), done.stderr
    for message, error, status in zip(HOSTILE, errors[::2], errors[1::2], strict=True):
        assert message in error and status == "2", error
