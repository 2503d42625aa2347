"""Files from strangers run no code and take no more than they are."""

import ast
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import drawn_picture, jpeg_bytes
from hostile import png_bomb

from bt_fast.cli import main
from pipelines.convert.command import main as convert

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("bt_fast", "pipelines", "tools") for path in (ROOT / folder).rglob("*.py")
)

# Never called, or even named, whatever the arguments: they run what they read, or reach out for it.
BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load"),
    *("shelve.open", "marshal.load", "marshal.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("torch.distributed.checkpoint.load", "torch.distributed.checkpoint.load_state_dict"),
    *("urllib.request.urlopen", "urllib.request.urlretrieve", "torch.hub.download_url_to_file"),
    *("shutil.unpack_archive", "pandas.read_pickle"),
}
# Allowed with these constants only; without the argument unless that is what it is by default.
ONLY_WITH = {
    "torch.load": {"weights_only": True},
    "torch.serialization.load": {"weights_only": True},
}
NEVER_WITH = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def dangers(source: str) -> list[str]:
    """What a piece of source calls that it should not, by line."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name of this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    found = []
    for node in ast.walk(tree):
        # Also what is only mentioned: f = pickle.load; f(file)
        called = _dotted(node, names) if isinstance(node, ast.Name | ast.Attribute) else ""
        if called in FORBIDDEN:
            found.append(f"line {node.lineno}: {called}")
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: getattr(k.value, "value", "not a constant") for k in node.keywords}
        for name, value in NEVER_WITH.items():
            if name in given and given[name] in (value, "not a constant"):
                found.append(f"line {node.lineno}: {name}={given[name]}")
        called = _dotted(node.func, names)
        if called in BUILTINS:
            found.append(f"line {node.lineno}: {called}")
        for name, value in ONLY_WITH.get(called, {}).items():
            if given.get(name) is not value:
                found.append(f"line {node.lineno}: {called} without {name}={value}")
        if called.endswith((".extractall", ".extract")) and "filter" not in given:
            found.append(f"line {node.lineno}: {called} without a filter")
    return found


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """ "pickle.load" for what means that in this file."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}"
    return ""  # what a call or an index gives


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_code_from_data(path):
    assert not dangers(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import pickle as p\np.loads(b)",
        "from pickle import load as innocent\ninnocent(f)",
        "import pickle\nread = pickle.load",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "import joblib\njoblib.load(f)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "eval(text)",
        "exec(text)",
        "import os\nos.system(c)",
        "import tarfile\ntarfile.open(f).extractall(p)",
        "import torch\ntorch.hub.load(r, m)",
    ],
)
def test_the_search_finds_what_it_is_for(source):
    assert dangers(source)


def test_the_search_lets_safe_ones_pass():
    assert not dangers(
        "import torch, numpy as np, subprocess\nmodel.eval()\ntorch.compile(f)\nre.compile(x)\n"
        "torch.load(f, weights_only=True)\nnp.load(f)\nsubprocess.run(['ls'])\nyaml.safe_load(f)"
    )


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bombs(folder: Path, mark: Path) -> list[Path]:
    """The same bomb in every form that torch.save has or had, and bare."""
    legacy, bare, hidden = (folder / name for name in ("legacy.pth", "bare.pth", "hidden.pt"))
    torch.save({"model": Bomb(mark)}, folder / "zip.pth")
    torch.save({"model": Bomb(mark)}, legacy, _use_new_zipfile_serialization=False)
    bare.write_bytes(pickle.dumps(Bomb(mark)))
    torch.save({"model": {"conv1.weight": torch.zeros(3)}, "args": Bomb(mark)}, hidden)
    pretends = folder / "pretends.safetensors"
    pretends.write_bytes(bare.read_bytes())
    return [folder / "zip.pth", legacy, bare, hidden, pretends]


def test_a_pickle_bomb_never_goes_off(tmp_path, small_beton, capsys):
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
            assert main(command) == 2
            error = capsys.readouterr().err
            assert f"{file} cannot be read as weights" in error and error.count("\n") == 1
            assert not mark.exists() and not (tmp_path / "out.pth").exists()


def test_a_run_with_a_bomb_in_place_of_its_checkpoint_is_not_resumed_from_it(
    labelled_run, tmp_path, capsys
):
    run, mark = tmp_path / "run", tmp_path / "exploded"
    shutil.copytree(labelled_run, run)
    for folder in (run / "checkpoints").glob("step-*"):
        for file in folder.iterdir():
            file.write_bytes(pickle.dumps(Bomb(mark)))
    (run / "encoder.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    assert main(["pretrain", "--resume", str(run), "--device", "cpu", "--max-steps", "1"]) == 0
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
    for file, reason in (
        (zipped, "compressed"),
        (virtual, "its tensors are larger than it"),
        (header, "header"),
        (offsets, ""),
    ):
        assert main(["export", str(file), "--to", "timm", "--out", str(tmp_path / "o.pth")]) == 2
        error = capsys.readouterr().err
        assert f"{file} cannot be read as weights" in error and error.count("\n") == 1
        assert reason in error.lower()


def test_a_decompression_bomb_is_refused_where_images_come_in(labelled_run, tmp_path, capsys):
    """At conversion, and where an evaluation reads a folder of images."""
    plain = jpeg_bytes(drawn_picture(0))
    frame = plain.index(b"\xff\xc0")
    huge = plain[: frame + 5] + struct.pack(">HH", 65000, 65000) + plain[frame + 9 :]
    for name, data in (("bomb.png", png_bomb(13_000, 13_000)), ("bomb.jpg", huge)):
        folder = tmp_path / name
        for label in ("a", "b"):
            (folder / label).mkdir(parents=True)
            (folder / label / "plain.jpg").write_bytes(plain)
        (folder / "b" / name).write_bytes(data)
        assert convert([str(folder), str(tmp_path / "out.beton"), "--workers=1"]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2 and "pixels, more than" in errors[0] and "1 broken" in errors[1]
        flags = ["--data", str(folder), "--device=cpu", "--workers=1"]
        assert main(["eval", "knn", str(labelled_run), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error


def test_a_record_that_decodes_to_another_size_is_refused(tmp_path, capsys):
    """A forged .beton whose table says 8 x 8 of what would be 4 GB."""
    from pipelines.beton.writer import BetonWriter

    plain = jpeg_bytes(drawn_picture(0))
    frame = plain.index(b"\xff\xc0")
    huge = plain[: frame + 5] + struct.pack(">HH", 40000, 40000) + plain[frame + 9 :]
    with BetonWriter(tmp_path / "x.beton", num_samples=8) as writer:
        for index in range(8):
            writer.add(huge, 8, 8, -1, str(index))
    flags = [
        "--recipe=demo",
        "--device=cpu",
        "--precision=fp32",
        "--batch-size=8",
        "--size=32",
        "--workers=1",
    ]
    flags += ["--projector", "16", "--run-dir", str(tmp_path / "run")]
    assert main(["pretrain", *flags, "--data", str(tmp_path / "x.beton")]) == 2
    error = capsys.readouterr().err
    assert "40000x40000 but was recorded as 8x8" in error and error.count("\n") == 1
