"""Failures of different kinds end in one line of docs/errors.md, which lists every message."""

import ast
import dataclasses
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, drawn_picture, jpeg_bytes, write_beton
from hostile import make_folder
from PIL import Image

from bt_fast import cli
from bt_fast.distributed.collectives import World
from pipelines.beton import BetonReader
from pipelines.convert import command
from pipelines.convert.workers import prepare_all

DOCUMENT = ROOT / "docs" / "errors.md"
ENTRIES = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text(), re.M)
_LISTED = ("Broken: ", "Damaged: ")  # lines that may stand before the last
ERRORS = {
    *("ValueError", "UsageError", "SourceError", "BetonError", "BrokenImages", "DamagedResult"),
    *("WorkerDied", "UnreadableImage", "NotFinite"),
}
# Not the last word of a command line: what only a program can do wrong, reasons inside another
# message of the list, and warnings.
INTERNAL = {
    "dry_run, slurm and several gpus need the command bt-fast pretrain",
    "…: no such field of …",
    "the authors give no learning rate for batch size …",
    "state.json differs from what was saved",
    "… differs from what was saved",
    "average precision needs a positive image",
    "… must be a floating-point tensor [n, D], got …",
    "… must be finite and not negative, got …",
    "z_a and z_b must be [n, D] of the same shape and dtype, got … … and … …",
    "the loss needs at least two samples: it standardises over the batch",
    "method 'dense' needs a D x D matrix: for one process only",
    "method must be auto, dense, gram or columns, got …",
    "unknown objective …",
    "a training batch holds two views of every image, got … rows",
    "batch norm needs more than one value per channel and view",
    "stochastic depth needs DropPaths.draw and .use before a training batch",
    "it is a compressed archive, which torch does not write",
    "it is a TorchScript archive, which contains code; save its weights alone:"
    " torch.save(torch.jit.load(FILE).state_dict(), ...)",
    "images must be uint8 [n, H, W, 3], got … …",
    "… images but parameters for …",
    "images must have fewer than 2 ** 29 pixels, got … x …",
    "page_size …: must be a power of two from 2 MiB to 2 GiB",
    "…: more than num_samples=… images",
    "…: no images were added",
    "…: a name cannot contain NUL",
    "…: … bytes cannot be stored",
    "JPEG without a frame header",
    "num_samples must not be negative, got …",
    "crops must be uint8 …, got … …; see channels_first for the other memory layout",
    "… must be a Branch, got …",
    "keys must be uint64 …, got … …",
    "keys are not drawn from a generator: give one of them",
    "dtype must be a floating-point type of torch, got …",
    "rank … is not one of … ranks, counted from 0",
    "size must be at least 1, got …",
    "scale must lie in (0, 1], smallest first, got …",
    "ratio must be positive, smallest first, got …",
    "config has all values of a run; leave recipe out",
    "another thread is training; wait for it, or use a process of its own",
    "config must be a Config, got …; a recipe is named by recipe=",
    "fused=True needs triton and float32 parameters on one NVIDIA GPU of sm_80 or newer",
    "device is cuda, but there is no usable GPU here",
    "fused LARS needs float32 parameters and gradients",
    "fused LARS needs parameters without gaps in memory",
    "loader … is not one of …",
    "dataset must be opened by open_data, got …",
    "crop must be a RandomResizedCrop, got …",
    "this process is one of several ranks; start bt-fast pretrain instead",
}


def matches(entry: str, text: str) -> bool:
    """Whether the text equals the entry, with any text for each "…"."""
    return re.fullmatch(".+".join(map(re.escape, entry.split("…"))), text, re.S) is not None


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """The folder in which a case runs, its data, and changes to this process."""

    path: Path
    data: Path  # an intact .beton of 64 images, 4 classes, without a .val.beton
    run: Path  # a finished run
    monkeypatch: pytest.MonkeyPatch

    def patch(self, name: str, value: object) -> None:
        self.monkeypatch.setattr(name, value)

    def write(self, name: str, content: bytes | str = b"") -> Path:
        """Write a file; a hard link of the same name is removed, not written through."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def images(self) -> Path:
        return make_folder(self.path / "images", {"a": 2, "b": 2})

    def copy_run(self) -> Path:
        """Copy the run to run/ as hard links, which `write` replaces."""
        shutil.copytree(self.run, self.path / "run", copy_function=os.link)
        return self.path / "run"

    def shards(self) -> Path:
        """Convert images/ to shards/; return the shard."""
        self.images()
        assert command.main(["images", "shards", "--format=webdataset", "--workers=1"]) == 0
        return next((self.path / "shards").glob("*.tar"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that fails with a message of the list."""

    entry: str  # the message in the list, or its beginning
    command: str  # {data}, {run}: of Sandbox
    prepare: Callable[[Sandbox], object] = lambda box: None
    status: int = 2

    def message(self) -> str:
        """The complete message of the list."""
        if self.entry in ENTRIES:
            return self.entry
        (message,) = [entry for entry in ENTRIES if entry.startswith(self.entry)]
        return message


def run_case(case: Case, box: Sandbox, capsys) -> None:
    """Run the command in this process; its stderr must equal the message of the list."""
    message = case.message()
    box.monkeypatch.chdir(box.path)
    case.prepare(box)
    program, *arguments = shlex.split(case.command.format(data=box.data, run=box.run))
    try:
        if program == "bt-convert":
            status = command.main([*arguments, "--workers", "1"])
        else:
            status = cli.main([program, *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == case.status, error
    lines = error.splitlines()
    if message.startswith(_LISTED):
        assert any(matches(message, line) for line in lines), error
        return
    (line,) = [line for line in lines if not line.startswith(_LISTED)]
    text = re.sub(r"^bt-(fast|convert)( (pretrain|export|doctor|eval \w+))?: ", "", line)
    if not message.endswith("--help"):
        text = re.sub(r"; see bt-\w+( \w+)* --help$", "", text)
    assert matches(message, text), error


PRETRAIN = (
    "pretrain --recipe demo --device cpu --size 32 --batch-size 16 --workers 1 --projector 32 16"
    " --data {data} --run-dir new"
)
RESUME = "pretrain --resume run --device cpu"
KNN = "eval knn {run} --device cpu --workers 1"
JPEG = jpeg_bytes(drawn_picture(0, 40, 30))
VAL = "ILSVRC2012_img_val.tar"


def raises(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def writes(name: str, content: bytes | str = b""):
    return lambda box: box.write(name, content)


def without(module: str):
    """Simulate that a module is not installed."""
    return lambda box: box.monkeypatch.setitem(sys.modules, module, None)


def no_gpu(box: Sandbox) -> None:
    box.patch("torch.cuda.is_available", lambda: False)
    box.patch("torch.cuda.device_count", lambda: 0)


def damaged_image(box: Sandbox) -> None:
    content = bytearray(box.data.read_bytes())
    start, size, _ = BetonReader(box.data).location(0)
    content[start + size // 2] ^= 1
    box.write("x.beton", bytes(content))


def two_ranks(box: Sandbox) -> None:
    """The environment of the first of two ranks."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        box.monkeypatch.setenv(name, str(value))


def failing_rank(box: Sandbox) -> None:
    """The second of two ranks, whose collective fails."""
    two_ranks(box)
    world = World(rank=1, size=2, local_rank=1, local_size=2)
    box.patch("bt_fast.distributed.ranks.meet", lambda timeout, limit: world)
    box.patch("bt_fast.distributed.ranks.join", lambda world, timeout, on_gpu: None)
    box.patch("bt_fast.distributed.ranks.unresponsive_ranks", lambda world: [0])
    box.patch("bt_fast.train.pretrain", raises(RuntimeError("connection closed\nby peer")))
    box.patch("os._exit", lambda status: raises(SystemExit(status))())


def refusing_sbatch(box: Sandbox) -> None:
    program = box.write("bin/sbatch", "#!/bin/sh\necho error: no such partition >&2\nexit 1\n")
    program.chmod(0o755)
    box.monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def ilsvrc_without_labels(box: Sandbox) -> None:
    with tarfile.open(VAL, "w") as archive:
        archive.add(box.write("v_1.JPEG", JPEG), "v_1.JPEG")


def archive_cut_while_converted(box: Sandbox) -> None:
    with tarfile.open("x.tar", "w") as archive:
        archive.add(box.write("a.jpg", JPEG), "a.jpg")
        archive.add(box.write("a.cls", b"1"), "a.cls")

    def cut_and_decode(*arguments, **options):
        os.truncate("x.tar", 600)
        return prepare_all(*arguments, **options)

    box.patch("pipelines.convert.write_split.prepare_all", cut_and_decode)


def wide_image(box: Sandbox) -> None:
    Image.fromarray(np.zeros((2, 70_000), np.uint8)).save(box.images() / "a" / "wide.png")


CASES = [
    # bt-fast pretrain
    Case("…; see … --help", "pretrain --epoch 3"),
    Case("--… must be finite, below", PRETRAIN + " --lr-weights 1e300"),
    Case("--deterministic excludes", PRETRAIN + " --deterministic --compile max-autotune"),
    Case("--encoder …/... needs", PRETRAIN + " --encoder timm/x", without("timm")),
    Case("--data … does not exist; pass its path", PRETRAIN + " --data nowhere.beton"),
    Case("not enough memory", PRETRAIN + " --size 200000"),
    Case(
        "interrupted",
        PRETRAIN,
        lambda box: box.patch("bt_fast.pretrain_command.run_pretrain", raises(KeyboardInterrupt())),
        status=130,
    ),
    Case("--device cuda: no usable GPU", PRETRAIN + " --device cuda", no_gpu),
    Case("--run-dir …: … is not", PRETRAIN, writes("new")),
    Case(
        "… is not a configuration of this version",
        RESUME,
        lambda box: (box.copy_run(), box.write("run/config.json", "{")),
    ),
    Case("… cannot change when a run is resumed", "pretrain --resume {run} --epochs 9"),
    Case("image … is not what was converted", PRETRAIN + " --data x.beton", damaged_image),
    Case("…: too short", PRETRAIN + " --data x.beton", writes("x.beton")),
    Case(
        "… is missing or damaged; convert",
        PRETRAIN + " --data shards",
        lambda box: box.shards().with_suffix(".idx").unlink(),
    ),
    # Several ranks
    Case("--gpus …, but … ranks were started", PRETRAIN + " --gpus 4", two_ranks),
    Case("rank … failed: …", PRETRAIN, failing_rank, status=1),
    Case("--slurm …: …", PRETRAIN + " --slurm fast --gpus 2", refusing_sbatch),
    # bt-fast eval, export and doctor
    Case(
        "… has other classes than …",
        KNN + " --data {data} --val-data x.beton",
        lambda box: write_beton(box.path / "x.beton", 8, num_classes=1),
    ),
    Case("--gpus …, but this machine has … GPUs; choose", KNN + " --gpus 4 --device auto", no_gpu),
    Case("--out … exists; add --overwrite", "export {run} --to timm --out x.pth", writes("x.pth")),
    Case("…; see … --help", "export {run} --to pdf --out x.pth"),
    Case("--to onnx needs more", "export {run} --to onnx --out x.onnx", without("onnxscript")),
    Case("--json … exists", "doctor --json x.json", writes("x.json")),
    # bt-convert
    Case(
        "OUT … exists",
        "bt-convert images x.beton",
        lambda box: (box.images(), box.write("x.beton")),
    ),
    Case("… has become shorter", "bt-convert x.tar x.beton", archive_cut_while_converted),
    Case(
        "OUT … has no …",
        "bt-convert images x --format webdataset --overwrite",
        lambda box: (box.images(), box.write("x/mine.txt")),
    ),
    Case("… broken (listed above)", "bt-convert images x.beton --max-side 0", wide_image, 1),
    Case("Broken: …: … pixels long", "bt-convert images x.beton --max-side 0", wide_image, 1),
    Case("Damaged: …: image", "bt-convert --verify x.beton", damaged_image, 1),
    Case("… does not contain the classes", f"bt-convert {VAL} x.beton", ilsvrc_without_labels),
    Case("…, line …: … where line", "bt-convert x.txt x.beton", writes("x.txt", "a.jpg 1\nb.jpg")),
    Case(
        "reading parquet files",
        "bt-convert x.parquet x.beton",
        lambda box: (box.write("x.parquet"), without("pyarrow")(box)),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.entry)
def test_a_failure_is_one_line(case, tmp_path, small_beton, labelled_run, monkeypatch, capsys):
    run_case(case, Sandbox(tmp_path, small_beton, labelled_run, monkeypatch), capsys)


def test_every_entry_is_unique():
    assert len(set(ENTRIES)) == len(ENTRIES) > 150


def templates(source: str) -> list[str]:
    """The messages a file raises, or returns to be raised, with "…" for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise | ast.Return):
            error = node.exc if isinstance(node, ast.Raise) else node.value
            if isinstance(error, ast.Call) and getattr(error.func, "id", None) in ERRORS:
                found += [text for node in error.args[:1] if (text := template(node))]
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", None) or getattr(function, "attr", "")
            texts = [text for node in node.args if (text := template(node))][-1:]
            if name == "_require" and len(node.args) == 4:  # config's: holds, name, value, what
                found += [f"--… {text}, got …" for text in texts]
            elif name in ("_require", "_require_all"):
                found += [f"…: {text}" for text in texts]
            elif name == "_fail":
                found += texts
    return found


def template(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return None


def test_every_message_of_the_source_is_in_the_list():
    missing = set()
    for path in [
        p for part in ("bt_fast", "pipelines", "tools") for p in (ROOT / part).rglob("*.py")
    ]:
        for text in templates(path.read_text()):
            pattern = ".*".join(re.escape(piece) for piece in text.split("…"))
            if not any(re.search(pattern, entry) or matches(entry, text) for entry in ENTRIES):
                missing.add(text)
    assert missing == INTERNAL


def test_the_search_finds_messages():
    source = "raise ValueError(f'{a} is not {b!r}')\nself._require(x, f'bad {y}')\n_fail('no', 2)"
    assert templates(source) == ["… is not …", "…: bad …", "no"]
