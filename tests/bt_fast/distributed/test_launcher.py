"""Launching all ranks with one command, and recovery from faults of one of them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, learned, metrics, pretrain, same, start, wait_for_step, wait_until

from bt_fast.cli import main
from bt_fast.config import Config
from bt_fast.distributed import fault_injection
from bt_fast.distributed.collectives import World
from bt_fast.distributed.launcher import Placement, several_machines
from bt_fast.distributed.signals import EXIT_STOPPED
from bt_fast.plan.dry_run import count_costs

pytestmark = pytest.mark.slow
# Beside those of every tiny run: what makes ranks comparable.
FLAGS = [
    "--workers=1", "--probe-every=0", "--log-every=1", "--lr-weights=0.5",
]  # fmt: skip


def start_two(data, folder, *flags, **options) -> subprocess.Popen:
    shared = ["--data", data, "--run-dir", folder, "--gpus", 2]
    return start(*FLAGS, *shared, *flags, **options)


def with_fault(fault: str) -> dict[str, str]:
    return {**os.environ, "BT_FAST_FAULT": fault}


@pytest.fixture(scope="module")
def two_ranks(small_beton, tmp_path_factory):
    """An uninterrupted run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done = start_two(small_beton, folder)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert output.count("step 12/12") == 1 and "8 on each of 2 ranks" in output
    return folder


def test_one_command_trains_on_two_ranks_as_one_process_does(two_ranks, small_beton, tmp_path):
    assert pretrain(*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "one", "--gpus", 1) == 0
    losses = [
        [record["loss"] for record in metrics(folder)] for folder in (two_ranks, tmp_path / "one")
    ]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=2e-3)


def ranks_of(process) -> list[int]:
    """Process ids of the ranks that a supervisor started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(
    two_ranks, small_beton, tmp_path
):
    folder = tmp_path / "run"
    process = start_two(small_beton, folder, "--save-every", 1)
    wait_for_step(process, folder, 3)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resuming" in output
    assert same(learned(folder), learned(two_ranks))


def test_a_signal_to_any_rank_stops_all_at_the_same_step(two_ranks, small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ["--save-every", 1]
    process = start_two(small_beton, folder, *flags)
    for step, rank, number in ((3, 1, signal.SIGTERM), (7, 0, signal.SIGUSR2)):
        wait_for_step(process, folder, step)
        os.kill(ranks_of(process)[rank], number)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == EXIT_STOPPED, output
        assert f"bt-fast pretrain --resume {folder}" in output
        process = start("--resume", folder, "--gpus", 2, tiny=False)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert same(learned(folder), learned(two_ranks))


def test_a_stop_request_before_the_first_step_leaves_nothing(small_beton, tmp_path):
    process = start(*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "run")
    catches = 1 << (signal.SIGUSR1 - 1)

    def is_caught() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) & catches)

    wait_until(is_caught, process)
    process.send_signal(signal.SIGUSR1)  # while torch is being imported
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert "stopped before the first step" in output and not (tmp_path / "run").exists()


def test_torchrun_does_not_restart_after_a_stop_request(small_beton, tmp_path):
    folder, status = tmp_path / "run", tmp_path / "status"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--max-restarts=3", "--standalone", "-m", "bt_fast.cli", "pretrain"]
    torchrun += [*TINY, *FLAGS, "--data", small_beton, "--run-dir", folder, "--save-every=1"]
    process = subprocess.Popen(
        list(map(str, torchrun)), env={**os.environ, "BT_FAST_STATUS": str(status)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_step(process, folder, 3)
    os.kill(ranks_of(process)[-1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert int(status.read_text()) == EXIT_STOPPED
    assert "stopped; continue with" in output and "resuming" not in output


def test_a_restart_with_the_same_flags_resumes(small_beton, tmp_path, capsys, monkeypatch):
    flags = [*FLAGS, "--data", small_beton, "--run-dir", tmp_path / "run"]
    assert pretrain(*flags, "--max-steps", 2, "--save-every", 1) == 0
    assert pretrain(*flags) == 2  # another run
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert pretrain(*flags, "--max-steps", 3) == 0
    assert "at step 2 of 3" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gpus", "3"], "--batch-size 16 does not divide by 3 ranks"),
        (["--gpus", "16"], "is less than 2 for each of 16 ranks"),
        (["--gpus", "2", "--data", "nowhere.beton"], "--data nowhere.beton does not exist"),
    ],
)
def test_what_cannot_be_launched_is_one_line(small_beton, tmp_path, capsys, flags, message):
    where = ["--data", small_beton, "--run-dir", tmp_path / "r"]
    assert pretrain(*FLAGS, *where, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_another_number_of_ranks_than_torchruns_is_refused(small_beton, capsys, monkeypatch):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert pretrain(*FLAGS, "--data", small_beton, "--gpus", 2) == 2
    assert "--gpus 2, but 4 ranks were started" in capsys.readouterr().err


def test_more_gpus_than_a_machine_has_prints_the_command(small_beton, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    flags = ["--data", str(small_beton), "--gpus", "32", "--batch-size", "64"]
    assert main(["pretrain", *flags, "--device=auto"]) == 2
    error = capsys.readouterr().err
    assert "torchrun --nnodes 4 --nproc-per-node 8" in error and "each of 4 machines" in error


def test_a_command_for_any_number_of_gpus():
    def command(num_ranks: int, *arguments: str) -> str:
        placement = Placement(num_ranks=num_ranks, num_local_gpus=8, srun=None, on_gpus=True)
        return several_machines(arguments, placement, gpus_per_machine=4)

    nine = command(9, "--gpus", "9", "--data", "my photos.beton")
    assert "--nnodes 3 --nproc-per-node 3" in nine and "'my photos.beton' --run-dir" in nine
    assert "--run-dir" not in command(16, "--gpus", "16", "--resume", "run")


def test_32_gpus_elsewhere_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--gpus", "32"]) == 2
    error = capsys.readouterr().err
    assert "run this on each of 4 machines with 8 GPUs each" in error and "--gpus 32" in error
    assert not list(tmp_path.iterdir())


def test_the_plan_of_any_number_of_ranks(tmp_path, monkeypatch, capsys, small_beton):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--gpus", "32", "--norm", "compiled", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in (
        "32, with 64 of 2048 images each", "assuming ImageNet-1k", "1281167 images",
        "1000 epochs x 625",
        "gram method over 2048 x 8192", "gradients 1,353 MB, embeddings 65.0 MB", "not measured",
        "activations 5.6", "GPUs of 24 GB up to 176 images per GPU",
        "RTX 4090", "A100 40 GB", "H100",
    ):  # fmt: skip
        assert part in " ".join(output.replace("│", " ").split()), part
    flags = ["--recipe", "demo", "--data", str(small_beton), "--batch-size", "16", "--gpus", "4"]
    assert main(["pretrain", "--dry-run", *flags]) == 0
    assert "4, with 4 of 16 images each" in capsys.readouterr().out
    assert main(["pretrain", "--dry-run", "--gpus", "7"]) == 2
    assert "does not divide by 7 ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_what_the_paper_says():
    counted = count_costs(Config(norm="compiled"))
    assert counted.num_parameters == 174_535_744 and counted.num_norm_layers == 55
    assert counted.num_projector_parameters == 151_027_712
    view = 3 * 2 * (4.09e9 + 0.151e9)  # FLOP, both ways
    assert counted.flop / 2 == pytest.approx(view, rel=0.03)


@pytest.mark.parametrize("kind", ["exit", "exception", "kill", "hang"])
def test_a_run_survives_a_fault_of_one_rank(two_ranks, small_beton, tmp_path, kind):
    folder = tmp_path / "run"
    flags, fault = ["--save-every", 1], f"1:5:{kind}"
    if kind == "hang":
        flags += ["--timeout", 15]  # seconds: more than a step takes on a busy machine
    done = start_two(small_beton, folder, *flags, env=with_fault(fault))
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert f"BT_FAST_FAULT=1:5:{kind}: now" in output and "resuming" in output
    if kind == "hang":
        assert "ranks [1] do not respond" in output
    assert same(learned(folder), learned(two_ranks))


def test_a_rank_out_of_memory_is_not_restarted(small_beton, tmp_path):
    process = start_two(small_beton, tmp_path / "run", env=with_fault("1:5:memory"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "rank 1 failed: not enough memory; choose a smaller --batch-size" in output
    assert "restarting" not in output


def test_nan_on_one_rank_skips_the_update_on_all(small_beton, tmp_path):
    folder = tmp_path / "run"
    done = start_two(small_beton, folder, env=with_fault("1:5:nan"))
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert [record["skipped"] for record in metrics(folder)] == [0] * 5 + [1] + [0] * 6


def test_an_unknown_fault_is_refused(monkeypatch):
    monkeypatch.setenv("BT_FAST_FAULT", "1:now:kill")
    with pytest.raises(ValueError, match="RANK:STEP"):
        fault_injection.inject(torch.zeros(1), 0, World(rank=0, size=1, local_rank=0, local_size=1))
