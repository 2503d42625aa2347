"""Disks that fill up or turn read-only while a run trains, and clocks that are set back."""

import errno
import itertools
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny_runs
from conftest import mounted, run_python
from tiny_runs import TINY, comparable, learned, metrics, pretrain, same, start, wait_for_step

from bt_fast import train
from bt_fast.cli import main
from bt_fast.distributed.signals import EXIT_UNSAVED
from bt_fast.run import checkpoint, plots
from bt_fast.run.metrics import RecordFile

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_continues(
    small_beton, finished, tmp_path, capsys
):
    with mounted(tmp_path / "disk", "size=150m") as disk:  # space for one checkpoint of 90 MB
        folder = disk / "run"
        flags = ("--data", small_beton, "--run-dir", folder, "--save-every", 4)
        assert pretrain(*flags) == EXIT_UNSAVED
        output = capsys.readouterr().out
        assert saved_steps(folder) == ["step-00000004"]
        assert output.count("warning") == 2 and "step 8 was not saved" in output
        assert "No space left on device" in output
        assert comparable(metrics(folder)) == comparable(metrics(finished))
        ours, theirs = (path / "encoder.safetensors" for path in (folder, finished))
        assert ours.read_bytes() == theirs.read_bytes()  # there was space for this

        subprocess.run(["mount", "-o", "remount,size=500m", disk], check=True)
        assert main(["pretrain", "--resume", str(folder)]) == 0
        assert "at step 4 of 12" in capsys.readouterr().out
        assert same(learned(folder), learned(finished))
        assert comparable(metrics(folder)) == comparable(metrics(finished))


@pytest.mark.slow
def test_a_full_disk_stops_all_ranks(small_beton, tmp_path):
    with mounted(tmp_path / "disk", "size=150m") as disk:
        flags = ("--data", small_beton, "--run-dir", disk / "run", "--save-every", 4, "--gpus", 2)
        process = start(*flags, "--probe-every", 0, "--if-save-fails", "stop")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == EXIT_UNSAVED, output
        assert "not everything was saved at step 10 of 12" in output and "resuming" not in output
        assert saved_steps(disk / "run") == ["step-00000004"]


@pytest.mark.slow
def test_the_next_save_follows_one_that_failed(small_beton, finished, tmp_path, capsys):
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with tiny_runs.failing(checkpoint, "write", read_only, at=2):  # of step 8
        assert pretrain("--data", small_beton, "--run-dir", tmp_path / "run") == 0
    assert saved_steps(tmp_path / "run") == ["step-00000004", "step-00000012"]
    assert capsys.readouterr().out.count("was not saved") == 1
    assert same(learned(tmp_path / "run"), learned(finished))


@pytest.mark.slow
def test_training_continues_during_a_save(small_beton, finished, tmp_path, monkeypatch):
    """The checkpoint holds the state at its step, not a later one."""
    real_write, real_update = checkpoint.write, train.update
    updates, further = itertools.count(1), threading.Event()

    def update(setup, views):
        if next(updates) == 7:
            further.set()
        return real_update(setup, views)

    def write(folder, step, *arguments, **options):
        assert further.wait(300), "nothing was trained meanwhile"
        return real_write(folder, step, *arguments, **options)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(checkpoint, "write", write)
    folder = tmp_path / "run"
    assert pretrain("--data", small_beton, "--run-dir", folder, "--save-every", 5, "--keep", 3) == 0
    assert saved_steps(folder) == [f"step-{step:08d}" for step in (5, 10, 12)]
    for newer in (10, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{newer:08d}")
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert same(learned(folder), learned(finished))


def test_missing_optional_output_is_reported_once(
    small_beton, finished, tmp_path, monkeypatch, capsys
):
    """No line of the metrics for half a run, and no picture: nothing is lost but the pictures."""
    real, calls = os.pwrite, itertools.count()

    def pwrite(descriptor, data, offset):
        if next(calls) < 14:
            raise FULL
        return real(descriptor, data, offset)

    def after_opening(*arguments):
        log = real_log(*arguments)
        monkeypatch.setattr(os, "pwrite", pwrite)
        return log

    real_log = train.RunLog
    monkeypatch.setattr(train, "RunLog", after_opening)
    monkeypatch.setattr(plots, "atomic_file", mock.Mock(side_effect=FULL))
    folder = tmp_path / "run"
    assert pretrain("--data", small_beton, "--run-dir", folder) == 0
    output = capsys.readouterr().out
    for name in ("metrics.jsonl", "tensorboard", "views.png", "curves.png"):
        assert output.count(f"warning: {name} cannot be written: No space left") == 1
        assert not (folder / name).exists() or not name.endswith("png")
    assert comparable(metrics(folder)) == comparable(metrics(finished))


def test_a_record_is_complete_or_pending(tmp_path, monkeypatch):
    """A disk that accepts only a number of bytes, now and then."""
    real, space = os.pwrite, [0]

    def pwrite(descriptor, data, offset):
        size = min(space[0], len(data))
        if size == 0:
            raise FULL
        space[0] -= size
        return real(descriptor, data[:size], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    path = tmp_path / "records"
    file, failures = RecordFile(path), 0
    for number in range(60):
        space[0] = (0, 3, 7, 1000)[number % 4] if 7 < number % 20 < 18 else 5
        try:
            file.append(f"record {number}\n".encode())
        except OSError:
            failures += 1
        lines = path.read_text().splitlines()
        assert lines == [f"record {index}" for index in range(len(lines))]
    assert len(lines) < 60 and 10 < failures < 60
    space[0] = 10_000
    file.close()
    assert path.read_text().splitlines()[-1] == "record 59"


@pytest.mark.slow
def test_a_closed_output_pipe_does_not_end_a_run(small_beton, tmp_path):
    folder = tmp_path / "run"
    process = start("--data", small_beton, "--run-dir", folder, "--save-every", 1)
    wait_for_step(process, folder, 2)
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert (folder / "encoder.safetensors").exists()


@pytest.mark.slow
def test_output_on_a_full_disk_does_not_end_a_run(small_beton, tmp_path):
    flags = ["--data", small_beton, "--run-dir", tmp_path / "run"]
    code = (  # the disk fills up when training begins
        "import os, sys\n"
        "from bt_fast import cli, train\n"
        "real = train.train\n"
        "def full(*arguments):\n"
        "    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "    return real(*arguments)\n"
        "train.train = full\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = run_python("-c", code, "pretrain", *TINY, *flags)
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "run" / "encoder.safetensors").exists()


def test_a_clock_set_back_changes_nothing(small_beton, finished, tmp_path, monkeypatch, capsys):
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    folder = tmp_path / "run"
    assert pretrain("--data", small_beton, "--run-dir", folder) == 0
    for record in metrics(folder):
        assert 0 < record.get("images_per_s", 1) < 1e6 and 0 < record.get("seconds", 1) < 600
    assert next(hours) > 3 and " h " not in capsys.readouterr().out
    assert same(learned(folder), learned(finished))
