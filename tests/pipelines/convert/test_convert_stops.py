"""A conversion that is stopped leaves no partial output, and no process waits forever."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, drawn_picture, jpeg_bytes
from hostile import make_folder

from pipelines.convert.command import main

COMMAND = [sys.executable, "-m", "pipelines"]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """4,000 links to a large image: a minute of work."""
    root = tmp_path_factory.mktemp("many")
    (root / "cat").mkdir()
    (root / "large.bin").write_bytes(jpeg_bytes(drawn_picture(0, 1600, 1200)))
    for index in range(4000):
        (root / "cat" / f"{index}.jpg").symlink_to(root / "large.bin")
    return root


def start_conversion(folder: Path, out: Path, *flags: str) -> subprocess.Popen:
    """Start a conversion with two workers; returns when it has stored some images."""
    command = [*COMMAND, str(folder), str(out), "--workers", "2", *flags]
    child = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    journal = out.with_name(f"{out.name}.partial") / "train.journal"
    while not (journal.exists() and journal.stat().st_size > 2000):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return child


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "number,flags,kept",
    [
        (signal.SIGINT, [], []),
        (signal.SIGTERM, [], []),
        (signal.SIGTERM, ["--continue"], ["out.beton.partial"]),
    ],
)
def test_a_signal(many, tmp_path, number, flags, kept):
    child = start_conversion(many, tmp_path / "out.beton", *flags)
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 128 + number
    assert f"stopped by {number.name}" in errors and "Traceback" not in errors
    assert names_in(tmp_path) == kept


STREAMS = {
    ">&-": 0,  # closed
    ">&- 2>&- <&-": 0,
    "| true": 1,  # its reader has gone
}


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("workers", [1, 2])
def test_closed_standard_streams(tmp_path, streams, workers):
    make_folder(tmp_path / "images", {"a": 2})
    command = " ".join(COMMAND) + f" {tmp_path}/images {tmp_path}/out.beton --workers {workers}"
    shell = f"set -o pipefail; (sleep 0.1; {command}) {streams}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert done.returncode == STREAMS[streams]
    written = ["out.beton", "out.beton.json", "out.report.html"]
    names = ["images"] if done.returncode else ["images", *written]
    assert names_in(tmp_path) == names
    message = "bt-convert: the reader of standard output has closed it; nothing was written\n"
    assert done.stderr == (message if done.returncode else "")


def test_a_reader_that_goes_after_the_conversion(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "images", {"a": 2})
    monkeypatch.setattr("os.dup2", lambda *_: None)

    def fail(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("pipelines.convert.command.verify", fail)
    assert main([f"{tmp_path}/images", f"{tmp_path}/out.beton", "--verify", "--workers=1"]) == 1
    assert "closed it; the conversion is complete" in capsys.readouterr().err


@pytest.mark.parametrize("tmpdir", ["missing", "x" * 120])
def test_workers_need_no_tmpdir(tmp_path, tmpdir):
    """Neither one that exists nor one whose path is short enough for a socket."""
    make_folder(tmp_path / "images", {"a": 2})
    (tmp_path / ("x" * 120)).mkdir()
    command = [*COMMAND, f"{tmp_path}/images", f"{tmp_path}/out.beton", "--workers=2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / tmpdir)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def test_too_few_open_files(tmp_path):
    make_folder(tmp_path / "images", {"a": 2})
    command = [*COMMAND, f"{tmp_path}/images", f"{tmp_path}/out.beton", "--workers=2"]
    limited = ["bash", "-c", 'ulimit -n 16; exec "$@"', "-", *command]
    done = subprocess.run(limited, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert "too many open files: at most 16 here" in done.stderr and done.stderr.count("\n") == 1
    assert names_in(tmp_path) == ["images"]
