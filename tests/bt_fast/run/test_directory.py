"""The run directory: one owner, a unique name, nothing overwritten."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bt_fast.config import Config
from bt_fast.run import directory
from bt_fast.run.directory import RunDirectory


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(directory.make_folder, [Config()] * 24))
    assert len({str(folder) for folder in folders}) == 24
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "imagenet-20260101-120000",
        *(f"imagenet-20260101-120000-{number}" for number in range(2, 25)),
    }


def test_a_second_process_names_the_first(tmp_path):
    with RunDirectory(tmp_path), pytest.raises(ValueError) as refused:
        RunDirectory(tmp_path)
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
    RunDirectory(tmp_path).close()  # and it may, once the first has gone


def test_a_killed_owner_blocks_nobody(tmp_path):
    code = "import sys, os; from pathlib import Path; from bt_fast.run.directory import *\n"
    code += "RunDirectory(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert done.returncode == -9 and (tmp_path / ".lock").read_text().startswith("process ")
    (tmp_path / "config.json.tmp-1").touch()  # what it was writing
    RunDirectory(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_locks_a_running_owner_of_this_machine_is_detected(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    here = socket.gethostname()
    with subprocess.Popen(["sleep", "600"]) as other:
        (tmp_path / ".lock").write_text(f"process {other.pid} on {here}")
        with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
            RunDirectory(tmp_path)
        # On another machine; an earlier one of the same number.
        others = f"process {other.pid} on elsewhere", f"process {os.getpid()} on {here}"
        for owner in (*others, "", "garbage"):
            (tmp_path / ".lock").write_text(owner)
            RunDirectory(tmp_path).close()
        other.kill()
    (tmp_path / ".lock").write_text(f"process {other.pid} on {here}")
    RunDirectory(tmp_path).close()


def test_the_folder_of_a_killed_start_can_be_used(tmp_path):
    for name in (".lock", "config.json.tmp-12"):
        (tmp_path / name).touch()
    assert directory.choose_path(Config(run_dir=tmp_path)) == tmp_path
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="is not empty; continue its run with --resume"):
        directory.choose_path(Config(run_dir=tmp_path))
