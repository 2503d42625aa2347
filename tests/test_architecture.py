"""The structure that docs/architecture.md describes: files, imports, language, files of a step."""

import ast
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
from tiny_runs import TINY

from bt_fast import train
from bt_fast.cli import main

ROOT = Path(__file__).parents[1]
FILES = sorted(path for root in ("bt_fast", "pipelines") for path in (ROOT / root).rglob("*.py"))


def test_the_document_lists_all_folders_and_no_others():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(.+)/` \| .+ \| (.+) \|$", text, re.MULTILINE)
    folders = {str(path.parent.relative_to(ROOT)) for path in FILES}
    # Subfolders that the row of their package describes.
    folders -= {"pipelines/convert/sources", "bt_fast/evaluate/detectron2"}
    assert sorted(folder for folder, _ in rows) == sorted(folders) and len(rows) <= 15
    for folder, files in rows:
        for name in re.findall(r"`(.+?)`", files):
            assert ROOT / folder / name in FILES


def test_the_first_line_of_every_file_says_what_it_is():
    for path in FILES:
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_at_most_twenty_files_are_flat():
    assert sum(path.parent.name == "bt_fast" for path in FILES) <= 20


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    modules = {name_of(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module} & modules
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found - {name_of(path)}


def test_no_import_cycles():
    """Also none of imports inside of functions."""
    remaining = {name_of(path): imports_of(path) for path in FILES}
    while leaves := [
        name for name, imported in remaining.items() if not imported & remaining.keys()
    ]:
        for name in leaves:
            del remaining[name]
    assert not remaining


def test_pipelines_know_nothing_of_bt_fast():
    for path in FILES:
        if name_of(path).startswith("pipelines"):
            assert not any(name.startswith("bt_fast") for name in imports_of(path)), path


def modules_after(statement: str) -> set[str]:
    """Top-level modules, and ours, that a fresh interpreter has imported after a statement."""
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["pretrain", "--help"],
        ["pretrain", "--epocs", "3"],
        ["pretrain", "--epochs", "0"],
        ["eval", "knn", "--help"],
        ["eval", "linear", "run", "--size", "0"],
        ["export", "--help"],
        ["export", "run"],
        ["doctor", "--help"],
    ],
)
def test_help_and_wrong_flags_import_no_torch(arguments):
    imported = modules_after(f"from bt_fast.cli import main; main({arguments})")
    assert "bt_fast.cli" in imported
    assert not imported & {"torch", "torchvision", "matplotlib", "numpy", "bt_fast.train"}


def test_an_evaluation_imports_no_trainer():
    imported = modules_after("import bt_fast.evaluate.command, bt_fast.evaluate.knn")
    assert not imported & {"bt_fast.train", "bt_fast.build", "matplotlib"}


def test_a_plan_imports_no_trainer():
    imported = modules_after(
        "from bt_fast.cli import main; main(['pretrain', '--gpus=8', '--dry-run'])"
    )
    assert "bt_fast.plan.dry_run" in imported
    assert not imported & {"bt_fast.train", "matplotlib"}


FORBIDDEN = re.compile(
    r"\b(rooms?|patience|told|wish(es)?|meetings?|learns_otherwise|in_words|last_words|see_through)\b"
    r"|what a user can do wrong",
    re.IGNORECASE,
)


def test_the_language_is_that_of_the_field():
    """No word of the list in code, messages and documents, but for the hidden alias."""
    names = ("README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile", "pyproject.toml", ".ci/run")
    documents = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in names)]
    tools = [*(ROOT / "tools").glob("*"), *(ROOT / "tests").rglob("*.py")]
    for path in [*FILES, *documents, *(p for p in tools if p.is_file())]:
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = FORBIDDEN.search(line) or FORBIDDEN.search(line.replace("_", " "))
            alias = "patience" in line and ("timeout" in line or path.name == "test_cli.py")
            assert not found or alias, f"{path.name}:{number}: {line}"


def test_a_step_passes_through_few_files(small_beton, tmp_path, monkeypatch):
    """From one update to the next, between log lines, on all threads."""
    files: dict[str, set[str]] = defaultdict(set)
    tracing = False

    def profile(frame, event, _):
        if tracing and event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "bt_fast") or path.is_relative_to(ROOT / "pipelines"):
                files[str(path.relative_to(ROOT))].add(frame.f_code.co_name)

    def set_learning_rates(setup, step):
        nonlocal tracing
        tracing = 3 <= step < 5
        return real(setup, step)

    real = train.set_learning_rates
    monkeypatch.setattr(train, "set_learning_rates", set_learning_rates)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        flags = ["--data", str(small_beton), "--run-dir", str(tmp_path / "run")]
        flags += ["--device=cpu", "--log-every=100", "--probe-every=0", "--max-steps=8"]
        assert main(["pretrain", *TINY, *flags, "--save-every=100"]) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert {"bt_fast/loss.py", "pipelines/order.py", "pipelines/crop.py"} < files.keys()
    assert len(files) <= 14, sorted(files)
