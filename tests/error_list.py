"""The messages of docs/errors.md, and command lines that must fail with one of them."""

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_beton
from hostile import make_folder

from bt_fast import cli
from pipelines.convert import command

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
ENTRIES = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text(), re.M)
_LISTED = ("Broken: ", "Damaged: ", "bt-fast: rank ")  # lines that may stand before the last


@dataclasses.dataclass(frozen=True)
class Place:
    """The folder in which a case runs, and its data."""

    path: Path
    data: Path  # an intact .beton of 64 images, 4 classes, without a .val.beton
    run: Path  # a finished run
    monkeypatch: pytest.MonkeyPatch

    def patch(self, name: str, value: object) -> None:
        self.monkeypatch.setattr(name, value)

    def without(self, *modules: str) -> None:
        """Simulate that the modules are not installed."""
        for module in modules:
            self.monkeypatch.setitem(__import__("sys").modules, module, None)

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file; a hard link of the same name is removed, not written through."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def images(self, name: str = "images", **classes: int) -> Path:
        return make_folder(self.path / name, classes or {"a": 2, "b": 2})

    def copy_run(self) -> Path:
        """Copy the run to run/ as hard links, which `write` replaces."""
        shutil.copytree(self.run, self.path / "run", copy_function=os.link)
        return self.path / "run"

    def beton(self, name: str, count: int = 8, num_classes: int = 2) -> Path:
        return write_beton(self.path / name, count, num_classes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line that fails with a message of the list."""

    entry: str  # the message in the list, or its beginning
    command: str  # {data}, {run}: of Place
    prepare: Callable[[Place], object] = lambda place: None
    status: int = 2
    needs: str = ""  # a package

    @property
    def message(self) -> str:
        """The complete message of the list."""
        if self.entry in ENTRIES:
            return self.entry
        (found,) = [entry for entry in ENTRIES if entry.startswith(self.entry)]
        return found


def matches(entry: str, text: str) -> bool:
    """Whether the text equals the entry, with any text for each "…"."""
    return re.fullmatch(".+".join(map(re.escape, entry.split("…"))), text, re.S) is not None


def run_case(case: Case, place: Place, capsys) -> None:
    """Run the command in this process; its stderr must equal the message of the list."""
    if case.needs:
        pytest.importorskip(case.needs, reason=f"{case.needs} is not installed")
    place.monkeypatch.chdir(place.path)
    kept = case.prepare(place)
    arguments = shlex.split(case.command.format(data=place.data, run=place.run))
    try:
        if arguments[0] == "bt-convert":
            status = command.main(
                arguments[1:] + ["--workers", "1"] * ("--workers" not in arguments)
            )
        else:
            status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    del kept  # keeps the result of `prepare`, such as a lock, until here
    assert status == case.status, error
    if case.message.startswith(_LISTED):
        assert any(matches(case.message, line) for line in error.splitlines()), error
        return
    lines = [line for line in error.splitlines() if not line.startswith(_LISTED)]
    text = re.sub(
        r"^bt-(fast|convert)( (pretrain|export|doctor|eval \w+))?: ", "", "\n".join(lines)
    )
    if not case.message.endswith("--help"):
        text = re.sub(r"; see bt-\w+( \w+)* --help$", "", text)
    assert matches(case.message, text), error
    assert len(lines) == 1 + case.message.endswith("each:…")
