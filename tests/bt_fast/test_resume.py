"""Runs that are killed, stopped or damaged resume and equal an uninterrupted run."""

import os
import pty
import random
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import write_beton
from tiny_runs import TINY, comparable, learned, metrics, pretrain, same, start, wait_for_step

from bt_fast import train
from bt_fast.cli import main
from bt_fast.config import load_config
from bt_fast.distributed.signals import EXIT_STOPPED


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(small_beton, finished, tmp_path):
    folder = tmp_path / "killed"
    step = random.randint(1, 9)
    process = start("--data", small_beton, "--run-dir", folder, "--save-every", 1)
    wait_for_step(process, folder, step)
    time.sleep(random.random() * 0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 1')  # a line the kill tore

    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert same(learned(finished), learned(folder)), f"killed at {step}"

    assert comparable(metrics(folder)) == comparable(metrics(finished))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_optimizers_resume_exactly(small_beton, tmp_path, optimizer):
    flags = ["--data", small_beton, "--optimizer", optimizer, "--probe-every", 0]
    flags += ["--lr-weights", 0.01, "--lr-biases", 0.01]
    assert pretrain(*flags, "--run-dir", tmp_path / "whole", "--max-steps", 5) == 0
    assert pretrain(*flags, "--run-dir", tmp_path / "parts", "--max-steps", 3) == 0
    assert main(["pretrain", "--resume", str(tmp_path / "parts"), "--max-steps", "5"]) == 0
    assert same(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [5, 12])  # in the middle, and at the end
def test_a_longer_schedule_continues_a_run(small_beton, tmp_path, capsys, stopped_at):
    """Up to the extension the short schedule's rates, then those of a run of 5 epochs."""
    run, flags = tmp_path / "run", ["--data", small_beton, "--probe-every", 0, "--log-every", 1]
    assert pretrain(*flags, "--run-dir", run, "--max-steps", stopped_at) == 0
    resume = ["pretrain", "--resume", str(run), "--max-steps", "15"]
    assert main([*resume, "--epochs", "5"]) == 2
    assert "or continue with a longer schedule: --extend N" in capsys.readouterr().err
    assert main([*resume, "--extend", "2"]) == 2
    assert main([*resume, "--peak", "2"]) == 2
    capsys.readouterr()
    assert main([*resume, "--extend", "5", "--peak", "0.5"]) == 0
    output = capsys.readouterr().out
    assert pretrain(*flags, "--run-dir", tmp_path / "long", "--epochs", 5, "--max-steps", 15) == 0
    rates = {record["step"]: record["lr_weights"] for record in metrics(run)}
    long_rates = {record["step"]: record["lr_weights"] for record in metrics(tmp_path / "long")}
    after = range(stopped_at + 1, 16)
    assert [rates[step] for step in after] == [0.5 * long_rates[step] for step in after]
    assert "the schedule has 5 epochs instead of 3: the learning rate of the next" in output
    # A restart with the same arguments, as a launcher does, changes nothing more.
    assert main([*resume[:3], "--max-steps", "16", "--extend", "5", "--peak", "0.5"]) == 0
    assert {record["step"]: record["lr_weights"] for record in metrics(run)}[15] == rates[15]
    assert load_config(run, "RUN").lr_weights == 1.5  # of the recipe's 3
    assert main([*resume[:3], "--max-steps", "16", "--extend", "6"]) == 2  # it is at step 16
    assert "--extend 6: the run would still end at step 16" in capsys.readouterr().err
    assert main([*resume[:3], "--max-steps", "17", "--extend", "6"]) == 0
    assert load_config(run, "RUN").lr_weights == 1.5


@pytest.mark.slow
def test_a_probe_lost_to_a_kill_is_repeated(small_beton, finished, tmp_path, monkeypatch):
    real, folder = train.probe, tmp_path / "run"

    def killed(job, log, step):
        if step == 8:
            raise RuntimeError("killed between checkpoint and probe")
        real(job, log, step)

    monkeypatch.setattr(train, "probe", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain("--data", small_beton, "--run-dir", folder)
    monkeypatch.setattr(train, "probe", real)
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert comparable(metrics(folder)) == comparable(metrics(finished))


@pytest.mark.slow
def test_damaged_checkpoints_do_not_count_as_kept(small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ("--data", small_beton, "--run-dir", folder, "--save-every", 1, "--probe-every", 0)
    assert pretrain(*flags, "--max-steps", 6) == 0
    for path in (folder / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"torn")
    resume = ["pretrain", "--resume", str(folder), "--max-steps", "2"]
    assert main(resume) == 2
    (folder / "encoder.safetensors").unlink()  # as if the run had not ended
    assert main(resume) == 0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-00000001", "step-00000002", "step-00000005.damaged"} <= names


@pytest.mark.slow
def test_a_signal_saves_and_prints_how_to_resume(small_beton, finished, tmp_path):
    folder = tmp_path / "stopped"
    process = start("--data", small_beton, "--run-dir", folder, "--save-every", 1)
    wait_for_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED
    assert f"bt-fast pretrain --resume {folder}" in output
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert same(learned(folder), learned(finished))


@pytest.mark.slow
def test_a_run_whose_terminal_closes_can_be_resumed(small_beton, finished, hang_up, tmp_path):
    """SIGHUP is a stop request, and output fails."""
    folder, (ours, theirs) = tmp_path / "stopped", pty.openpty()
    command = [sys.executable, "-m", "bt_fast.cli", "pretrain", *TINY, "--save-every", "1"]
    command += ["--data", str(small_beton), "--run-dir", str(folder)]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    closing = threading.Event()
    reader = threading.Thread(target=_read, args=(ours, closing))
    reader.start()
    try:
        wait_for_step(process, folder, 2)
    finally:
        closing.set()
        reader.join()
        os.close(ours)
    assert process.wait(timeout=300) == EXIT_STOPPED
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert same(learned(folder), learned(finished))


def _read(terminal: int, closing: threading.Event) -> None:
    while not closing.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(
    small_beton, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "torn"
    flags = ("--data", small_beton, "--run-dir", folder, "--save-every", 1, "--max-steps", 6)
    assert pretrain(*flags) == 0
    (folder / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"torn")
    monkeypatch.chdir(tmp_path)  # a run can be continued from any folder
    assert main(["pretrain", "--resume", str(folder), "--max-steps", "12"]) == 0
    output = capsys.readouterr().out
    assert "skipped a damaged checkpoint: step-00000006" in output and "at step 5 of 12" in output
    assert same(learned(folder), learned(finished))


def test_resuming_with_other_data_is_refused(small_beton, finished, tmp_path, capsys):
    other = write_beton(tmp_path / "other.beton", 32)
    assert main(["pretrain", "--resume", str(finished), "--data", str(other)]) == 2
    assert "is not what this run was trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_views_that_grow_train_and_resume(small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ("--data", small_beton, "--run-dir", folder, "--resolution", "32:64")
    assert pretrain(*flags, "--max-steps", 6) == 0
    assert main(["pretrain", "--resume", str(folder), "--max-steps", "12"]) == 0
    assert pretrain(*flags[:-4], "--run-dir", tmp_path / "whole", "--resolution", "32:64") == 0
    assert same(learned(folder), learned(tmp_path / "whole"))
