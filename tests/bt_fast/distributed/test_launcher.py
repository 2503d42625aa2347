"""Launching all ranks with one command, and recovery from faults of one of them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import TINY, learned, metrics, pretrain, same, start, wait_for_step, wait_until

from bt_fast.distributed.signals import EXIT_STOPPED

pytestmark = pytest.mark.slow
# Beside those of every tiny run: what makes ranks comparable.
FLAGS = ["--workers=1", "--probe-every=0", "--log-every=1", "--lr-weights=0.5"]


def start_two(data, folder, *flags, **options) -> subprocess.Popen:
    shared = ["--data", data, "--run-dir", folder, "--gpus", 2]
    return start(*FLAGS, *shared, *flags, **options)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for a run that must end with a status; returns its output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def with_fault(fault: str) -> dict[str, str]:
    return {**os.environ, "BT_FAST_FAULT": fault}


@pytest.fixture(scope="module")
def two_ranks(small_beton, tmp_path_factory):
    """An uninterrupted run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    output = finish(start_two(small_beton, folder))
    assert output.count("step 12/12") == 1 and "8 on each of 2 ranks" in output
    return folder


def test_one_command_trains_on_two_ranks_as_one_process_does(two_ranks, small_beton, tmp_path):
    assert pretrain(*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "one", "--gpus", 1) == 0
    folders = two_ranks, tmp_path / "one"
    losses = [[record["loss"] for record in metrics(folder)] for folder in folders]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=2e-3)


def ranks_of(process) -> list[int]:
    """Process ids of the ranks that a supervisor started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def test_a_signal_to_any_rank_stops_all_at_the_same_step(two_ranks, small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ["--save-every", 1]
    process = start_two(small_beton, folder, *flags)
    for step, rank, number in ((3, 1, signal.SIGTERM), (7, 0, signal.SIGUSR2)):
        wait_for_step(process, folder, step)
        os.kill(ranks_of(process)[rank], number)
        output = finish(process, EXIT_STOPPED)
        assert f"bt-fast pretrain --resume {folder}" in output
        process = start("--resume", folder, "--gpus", 2, tiny=False)
    finish(process)
    assert same(learned(folder), learned(two_ranks))


def test_a_stop_request_before_the_first_step_leaves_nothing(small_beton, tmp_path):
    process = start(*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "run")
    catches = 1 << (signal.SIGUSR1 - 1)

    def is_caught() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & catches)

    wait_until(is_caught, process)
    process.send_signal(signal.SIGUSR1)  # while torch is being imported
    output = finish(process, EXIT_STOPPED)
    assert "stopped before the first step" in output and not (tmp_path / "run").exists()


def test_torchrun_does_not_restart_after_a_stop_request(small_beton, tmp_path):
    folder, status = tmp_path / "run", tmp_path / "status"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--max-restarts=3", "--standalone", "-m", "bt_fast.cli", "pretrain"]
    torchrun += [*TINY, *FLAGS, "--data", small_beton, "--run-dir", folder, "--save-every=1"]
    process = tiny_runs.start_command(torchrun, env={**os.environ, "BT_FAST_STATUS": str(status)})
    wait_for_step(process, folder, 3)
    os.kill(ranks_of(process)[-1], signal.SIGUSR1)
    output = finish(process)
    assert int(status.read_text()) == EXIT_STOPPED
    assert "stopped; continue with" in output and "resuming" not in output


def test_a_restart_with_the_same_flags_resumes(small_beton, tmp_path, capsys, monkeypatch):
    flags = [*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "run"]
    assert pretrain(*flags, "--max-steps", 2, "--save-every", 1) == 0
    assert pretrain(*flags) == 2  # another run
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert pretrain(*flags, "--max-steps", 3) == 0
    assert "at step 2 of 3" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["exit", "exception", "kill", "hang"])
def test_a_run_survives_a_fault_of_one_rank(two_ranks, small_beton, tmp_path, kind):
    folder = tmp_path / "run"
    flags, fault = ["--save-every", 1], f"1:5:{kind}"
    if kind == "hang":
        flags += ["--timeout", 15]  # seconds: more than a step takes on a busy machine
    output = finish(start_two(small_beton, folder, *flags, env=with_fault(fault)))
    assert f"BT_FAST_FAULT=1:5:{kind}: now" in output and "resuming" in output
    if kind == "hang":
        assert "ranks [1] do not respond" in output
    assert same(learned(folder), learned(two_ranks))


def test_a_rank_out_of_memory_is_not_restarted(small_beton, tmp_path):
    output = finish(start_two(small_beton, tmp_path / "run", env=with_fault("1:5:memory")), 2)
    assert "rank 1 failed: not enough memory; choose a smaller --batch-size" in output
    assert "restarting" not in output


def test_nan_on_one_rank_skips_the_update_on_all(small_beton, tmp_path):
    folder = tmp_path / "run"
    finish(start_two(small_beton, folder, env=with_fault("1:5:nan")))
    assert [record["skipped"] for record in metrics(folder)] == [0] * 5 + [1] + [0] * 6
