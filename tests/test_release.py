"""The files of a release, and that it runs outside the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

from bt_fast.doctor.requirements import requirements
from pipelines import __version__

MADE = ("__pycache__", "*.egg-info", "*.py[cod]")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """The folder with wheel and source archive, built from a copy without the network."""
    pytest.importorskip("build", reason="a release is built with PyPA's build")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 or newer, not {setuptools.__version__}")
    source, out = tmp_path_factory.mktemp("source") / "bt", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("bt_fast", "pipelines", "tests", "tools", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*MADE))
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix != ".beton":
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(command, check=True)
    return out


def imports() -> set[str]:
    """Top-level modules that the packages import anywhere, without Python's own and ours."""
    found = set()
    for package in ("bt_fast", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"bt_fast", "pipelines"}


def test_every_import_is_declared():
    by_extra = requirements()
    declared = {one.name.lower() for extra in by_extra.keys() - {"dev"} for one in by_extra[extra]}
    declared.add("triton")  # torch brings it
    providers = packages_distributions()
    for name in imports() & providers.keys():  # of a package that is not installed, it is unknown
        assert {provider.lower() for provider in providers[name]} & declared, name


def test_the_index_shows_readme_and_metadata(release):
    twine = pytest.importorskip("twine.commands.check", reason="twine is not installed")
    assert not twine.check([str(path) for path in release.iterdir()], strict=True)
    (wheel,) = release.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"bt_fast-{__version__}.dist-info/METADATA").decode()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20 and all(re.match("https://|#", link) for link in links)
    assert f"## {__version__}, 20" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_the_packages_and_nothing_else(release):
    (wheel,) = release.glob("*.whl")
    assert wheel.name == f"bt_fast-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    meta = f"bt_fast-{__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"bt_fast", "pipelines", meta}
    assert f"{meta}/licenses/LICENSE" in names
    kept = {
        str(path.relative_to(ROOT))
        for package in ("bt_fast", "pipelines")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    assert {name for name in names if not name.startswith(meta)} == kept


def test_the_source_archive_can_be_worked_on(release):
    (archive,) = release.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for name in ("Makefile", "constraints.txt", "CHANGELOG.md", "Dockerfile", "LICENSE"):
        assert name in names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")} <= names
    assert "tools/make_demo_images.py" in names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.fixture(scope="module")
def installed(release, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel; dependencies are this one's."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    bin_folder = folder / "bin"
    (wheel,) = release.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", bin_folder / "python", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    others |= {path for path in sys.path if path.endswith("site-packages")}
    (site / "dependencies.pth").write_text("\n".join(sorted(others)))
    return bin_folder


def run(bin_folder: Path, elsewhere: Path, *command: str) -> str:
    """A command of the installed wheel, outside the checkout -> what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [bin_folder / command[0], *command[1:]],
        capture_output=True, text=True, cwd=elsewhere, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_the_wheel_is_what_runs(installed, tmp_path):
    code = "import bt_fast, pipelines; print(bt_fast.__file__, pipelines.__file__, sep='\\n')"
    for line in run(installed, tmp_path, "python", "-c", code).splitlines():
        assert Path(line).is_relative_to(installed.parent)


@pytest.mark.slow
def test_the_first_commands_and_the_first_example_of_the_library(installed, tmp_path):
    """In `make test-wheel` also with dependencies of their own."""
    assert "encoder.safetensors" in run(installed, tmp_path, "python", ROOT / "tools/try_wheel.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command,wanted",
    [
        ("bt-fast --version", __version__),
        ("bt-convert --version", __version__),
        ("bt-fast pretrain --help", "--if-save-fails"),
        ("bt-fast doctor", "bt-fast can run here"),
        ("bt-fast pretrain --dry-run --gpus 32", "32, with 64 of 2048 images each"),
    ],
)
def test_commands_run_outside_the_checkout(installed, tmp_path, command, wanted):
    assert wanted in run(installed, tmp_path, *command.split())
    assert not list(tmp_path.iterdir())
