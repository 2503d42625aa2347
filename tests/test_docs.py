"""Every command in the documentation runs, on small stand-ins for the files it names.

A block that cannot run here says why in the line above it: <!-- not run: a cluster -->. Training
and evaluation commands get flags of a tiny model behind their own, so that all that is written is
read and checked, and the run takes seconds.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_beton
from sample_imagenet import CLASSES, write_folder
from sample_voc import write_devkit

from bt_fast.choices import is_of_library
from bt_fast.cli import main as bt_fast
from pipelines.convert.command import main as bt_convert

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
REASONS = {"a cluster", "detectron2", "Docker", "an earlier commit"}

TINY_RUN = shlex.split(
    "--device cpu --precision fp32 --encoder resnet18 --projector 32 16 --size 32 --batch-size 8"
    " --epochs 2 --warmup-epochs 1 --max-steps 2 --workers 1 --probe-every 0"
)
TINY_LIBRARY_RUN = [word for word in TINY_RUN if word not in ("--encoder", "resnet18")]
TINY_EVAL = shlex.split("--device cpu --precision fp32 --workers 1")
FEW_EPOCHS = {"linear": ["--epochs", "2"], "semi": ["--epochs", "5"], "transfer": []}
TINY_TOOL = {
    "profile.py": [*TINY_RUN, "--seconds", "0.02"],
    "gpu_suite.py": ["--parts", "loss"],
    "bench_loss.py": shlex.split("--samples 16 --dimensions 32 --seconds 0.05"),
    "compiled_traffic.py": ["--images", "4", "--size", "64"],
    "kernel_report.py": [],
    "ablate.py": [*TINY_RUN, "--max-steps", "1", "--gpus", "1", "--probe-every", "1"],
    "parity.py": [*TINY_RUN, "--max-steps", "1", "--probe-every", "1"],
    "soak.py": shlex.split("--minutes 0.1 --kills 1 --images 32 --epochs 2 --save-every 1"),
    "fuzz.py": ["--count", "20"],
    "slurm_cluster.py": [],
}
A_FEW_RUNS = {"table5": "invariance-only", "table6": "stop-gradient"}  # of dozens


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    not_run: str | None  # why
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """What follows the prompts, a trailing backslash joining lines."""
        found: list[str] = []
        for line in self.lines:
            if line.startswith("$ "):
                found.append(line[2:])
            elif found and found[-1].endswith("\\"):
                found[-1] = found[-1][:-1] + line.strip()
        return found


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    inside, before = None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            if inside:
                inside.lines.append(line)
            before = line
        elif inside:
            inside = None
        else:
            why = re.fullmatch(r"<!-- not run: (.*) -->", before)
            inside = Block(page.name, number, line[3:].strip(), why and why[1])
            blocks.append(inside)
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, labelled_run) -> Path:
    """Files and folders by the names the documentation uses."""
    folder = tmp_path_factory.mktemp("stand-ins")
    write_folder(folder / "imagenet")
    for name in ("photos", "images", "cifar10"):
        (folder / name).symlink_to(folder / "imagenet")
    write_devkit(folder)
    write_beton(folder / "out.beton", 40)
    for name in ("out", "imagenet"):
        write_beton(folder / f"{name}.val.beton", 16)
    for name in ("cifar10", "photos", "imagenet", "first", "second"):
        shutil.copy(folder / "out.beton", folder / f"{name}.beton")
    (folder / "imagenet100.txt").write_text("\n".join(sorted(CLASSES)[:2]))
    (folder / "kept.txt").write_text("class-0/000.jpg\nclass-1/001.jpg\n")
    (folder / "demo").mkdir()
    shutil.copy(folder / "out.beton", folder / "demo" / "out.beton")
    (folder / "parts").mkdir()
    for shard in (2, 3, 4):
        flags = ["--shard", f"{shard}/4", "--workers", "1"]
        assert bt_convert([f"{folder}/imagenet", f"{folder}/parts/{shard}.beton", *flags]) == 0
    flags = ["--format", "webdataset", "--workers", "1"]
    assert bt_convert([f"{folder}/imagenet", f"{folder}/shards", *flags]) == 0
    shutil.copytree(labelled_run, folder / "RUN")
    return folder


@pytest.fixture
def sandbox(stand_ins, tmp_path, monkeypatch) -> Path:
    shutil.copytree(stand_ins, tmp_path / "sandbox", symlinks=True)
    monkeypatch.chdir(tmp_path / "sandbox")
    return tmp_path / "sandbox"


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console"], ids=str)
def test_the_commands_run(block, sandbox, capsys):
    if block.not_run:
        pytest.skip(f"needs {block.not_run}")
    assert block.commands(), "a block of the console has prompts"
    for command in block.commands():
        status = run(shlex.split(command, comments=True))
        output = capsys.readouterr()
        assert status == 0, f"{command}\n{output.out}\n{output.err}"


def run(words: list[str]) -> int:
    """Run a command of the documentation in the current folder; returns its exit status."""
    words = [re.sub(r"^runs/\S+", "RUN", word) for word in words]
    while "=" in words[0]:
        words.pop(0)
    program, *arguments = words
    if program == "bt-convert":
        if "--verify" not in arguments:  # an example writes its output anew
            out = Path(arguments[1])
            shutil.rmtree(out, ignore_errors=True)
            for path in (out, out.with_suffix(".val.beton")):
                path.unlink(missing_ok=True)
        return bt_convert([*arguments, "--workers", "1"])
    if program == "bt-fast" and arguments[0] == "pretrain":
        if "--resume" in arguments:  # shape and length are the run's
            return bt_fast([*arguments, "--device", "cpu", "--workers", "1"])
        if "--dry-run" in arguments and "--gpus" in arguments:
            return bt_fast([*arguments, "--data", "none.beton"])  # a plan for all of ImageNet
        if "shards/" in arguments:
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        of_library = "imagenet-vit" in arguments or any(map(is_of_library, arguments))
        return bt_fast([*arguments, *(TINY_LIBRARY_RUN if of_library else TINY_RUN)])
    if program == "bt-fast" and arguments[0] == "eval":
        return bt_fast([*arguments, *TINY_EVAL, *FEW_EPOCHS.get(arguments[1], [])])
    if program == "bt-fast":
        return bt_fast(arguments)
    if program == "python" and arguments[0].startswith("tools/"):
        name = Path(arguments[0]).name
        arguments = [A_FEW_RUNS.get(word, word) for word in arguments]
        if "--seeds" in arguments:
            arguments[arguments.index("--seeds") + 2 : arguments.index("--")] = []
        command = [sys.executable, ROOT / arguments[0], *arguments[1:], *TINY_TOOL[name]]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}).returncode
    if program == ".venv/bin/ruff":
        command = [sys.executable, "-m", "ruff", *arguments, "--check"]
        return subprocess.run(command, cwd=ROOT).returncode
    if program == ".venv/bin/python":
        return subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if program in ("make", "source", "pip"):  # CI makes the targets and installs the wheel
        return 0
    raise AssertionError(f"no test knows how to run {program}")


ALONE = "library.md"  # its programs are run by tests/bt_fast/test_library.py
PROGRAMS = [block for block in BLOCKS if block.language == "python" and block.page != ALONE]


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_the_programs_run(block, sandbox):
    source = re.sub(r'"runs/[^"]*"', '"RUN"', "\n".join(block.lines))
    exec(compile(source, str(block), "exec"), {"images": torch.randn(2, 3, 64, 64)})


def test_commands_stand_in_console_blocks_and_reasons_are_known():
    for block in BLOCKS:
        if block.language != "console":
            assert not block.commands(), block
        assert block.not_run in {None, *REASONS}, block


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_links_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in [*PAGES, *ROOT.glob("docs/*.ipynb")]:
        name = page.name if page.parent.name == "docs" else f"../{page.name}"
        assert page.name == "index.md" or f"]({name})" in index, name
