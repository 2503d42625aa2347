"""The messages of docs/errors.md, and how to run a command that must fail with one of them."""

import dataclasses
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import make_folder

from bt_fast import cli
from pipelines.convert import command

DOCUMENT = Path(__file__).parents[1] / "docs" / "errors.md"
ENTRIES = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text(), re.M)
_LISTED = ("Broken: ", "Damaged: ")  # lines that may stand before the last


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

    @property
    def entries(self) -> list[str]:
        """The complete message of the list: exactly one."""
        found = [entry for entry in ENTRIES if entry.startswith(self.entry)]
        return [self.entry] if self.entry in found else found


def run_case(case: Case, box: Sandbox, capsys) -> None:
    """Run the command in this process; its stderr must equal the message of the list."""
    (message,) = case.entries
    box.monkeypatch.chdir(box.path)
    kept = case.prepare(box)
    program, *arguments = shlex.split(case.command.format(data=box.data, run=box.run))
    try:
        if program == "bt-convert":
            status = command.main([*arguments, "--workers", "1"])
        else:
            status = cli.main([program, *arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    del kept  # keeps the result of `prepare`, such as a lock, until here
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
