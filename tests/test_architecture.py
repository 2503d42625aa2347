"""The structure that docs/architecture.md describes: files, imports, language."""

import ast
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_python

FILES = sorted(path for root in ("bt_fast", "pipelines") for path in (ROOT / root).rglob("*.py"))


def test_the_document_lists_all_folders_and_no_others():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(.+)/` \| .+ \| (.+) \|$", text, re.MULTILINE)
    folders = {str(path.parent.relative_to(ROOT)) for path in FILES}
    # Subfolders that the row of their package describes.
    folders -= {
        "pipelines/convert/sources",
        "bt_fast/evaluate/detectron2",
        "bt_fast/evaluate/curate",
    }
    assert sorted(folder for folder, _ in rows) == sorted(folders) and len(rows) <= 15
    for folder, files in rows:
        for name in re.findall(r"`(.+?)`", files):
            assert ROOT / folder / name in FILES


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
    done = run_python("-c", code, env=environment, check=True)
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "command",
    ["--help", "pretrain --help", "pretrain --epochs 0", "eval linear run --size 0", "export run"],
)
def test_help_and_wrong_flags_import_no_torch(command):
    imported = modules_after(f"from bt_fast.cli import main; main({command.split()})")
    assert "bt_fast.cli" in imported
    assert not imported & {"torch", "torchvision", "matplotlib", "numpy", "bt_fast.train"}


def test_the_library_imports_torch_when_it_is_used():
    assert "torch" not in modules_after("import bt_fast")


@pytest.mark.parametrize(
    "statement",
    [
        "import bt_fast.evaluate.command, bt_fast.evaluate.knn",
        "from bt_fast.cli import main; main(['pretrain', '--gpus=8', '--dry-run'])",
    ],
)
def test_evaluations_and_plans_import_no_trainer(statement):
    assert not modules_after(statement) & {"bt_fast.train", "matplotlib"}


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
