"""Environments of launchers: complete, partial, wrong; and ranks that are missing."""

import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from ranks import free_port

from bt_fast import runtime
from bt_fast.cli import main
from bt_fast.distributed import ranks, rendezvous, slurm
from bt_fast.distributed.collectives import World

PREFIXES = ("RANK", "WORLD_", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC", "CUDA_", "OMPI_")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets a launcher's variables, in an environment that has no others."""
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ranks, "_stores", [])

    def define(text: str) -> None:
        for name, _, value in (word.partition("=") for word in text.split()):
            monkeypatch.setenv(name, value)

    yield define
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]  # set by `slurm.adopt_environment`


@pytest.fixture
def port() -> int:
    """A port on which nothing listens."""
    return free_port()


PAIR = "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1"
STORE = "MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
TASK = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0"


@pytest.mark.parametrize("command", ["pretrain --data none.beton", "eval knn none"])
@pytest.mark.parametrize(
    "variables,message",
    [
        ("RANK=0", "RANK is set, but not WORLD_SIZE: start the ranks with torchrun or srun"),
        ("WORLD_SIZE=2", "WORLD_SIZE is 2, but RANK is not set"),
        ("OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE is 4, but RANK is not set"),
        ("RANK=x WORLD_SIZE=2", "the environment variable RANK is 'x', but must be a number"),
        ("RANK=0 WORLD_SIZE=two", "the environment variable WORLD_SIZE is 'two'"),
        ("RANK=-1 WORLD_SIZE=2", "the environment variable RANK is '-1'"),
        ("RANK=2 WORLD_SIZE=2", "RANK is 2, but must be below WORLD_SIZE, which is 2"),
        ("RANK=0 WORLD_SIZE=2", "but not MASTER_ADDR and MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h", "RANK is set, but not MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=p", "variable MASTER_PORT is 'p'"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=70000", "MASTER_PORT is 70000, but must"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=a", "the environment variable LOCAL_RANK is 'a'"),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK is 2, but must be"),
        ("SLURM_STEP_NUM_TASKS=2(x1) SLURM_PROCID=0", "variable SLURM_STEP_NUM_TASKS is '2(x1)'"),
        (
            "SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 SLURM_JOB_ID=7",
            "RANK is set, but not MASTER_ADDR",
        ),
        (TASK.replace("ID=7", "ID=7_1"), "the environment variable SLURM_JOB_ID is '7_1'"),
    ],
)
def test_a_wrong_environment_is_one_line(command, variables, message, environment, capsys):
    environment(variables)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "variables,what",
    [
        (f"{PAIR} {STORE}", "the missing ranks 1 of 2, expected at 127.0.0.1:{port}"),
        (
            f"RANK=0 WORLD_SIZE=4 {STORE}",
            "the missing ranks 1, 2, 3 of 4, expected at 127.0.0.1:{port}",
        ),
        (f"RANK=1 WORLD_SIZE=2 {STORE}", "rank 0 at 127.0.0.1:{port}: Connection refused"),
        (
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=no.such.host MASTER_PORT={port}",
            "the host no.such.host (MASTER_ADDR), which is unknown here: ",
        ),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a..b MASTER_PORT={port}",
            "the host a..b (MASTER_ADDR), which is unknown here: it is no name of a host",
        ),
        (
            f"{TASK} {STORE}",
            "the missing ranks 1 of 2, expected at 127.0.0.1:{port}; to run alone in a shell of"
            " this Slurm step, set SLURM_STEP_NUM_TASKS=1",
        ),
    ],
)
def test_missing_ranks_are_named_at_once_and_at_the_end(
    variables, what, environment, port, capsys, monkeypatch
):
    monkeypatch.setattr(rendezvous, "_NOTICE_AFTER", 0.0)
    if "no.such.host" in variables:  # without a server of names
        unknown = socket.gaierror(-2, "Name or service not known")
        monkeypatch.setattr(socket, "create_connection", mock.Mock(side_effect=unknown))
    environment(variables.format(port=port))
    assert main(["pretrain", "--timeout", "0.5", "--data", "none.beton"]) == 2
    notice, error = capsys.readouterr().err.splitlines()
    what = what.format(port=port)
    assert notice.startswith(f"bt-fast: waiting up to 0.5 s (--timeout) for {what}")
    assert error.startswith(f"bt-fast pretrain: waited 0.5 s (--timeout) for {what}")


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_of_another_program_is_named(rank, answer, environment, capfd, monkeypatch):
    monkeypatch.setattr(rendezvous, "_CONNECT_LIMIT", 0.5)
    environment(f"RANK={rank} WORLD_SIZE=2")
    with socket.create_server(("0.0.0.0", 0)) as other:

        def serve() -> None:
            while answer is not None:
                try:
                    connection, _ = other.accept()
                    connection.sendall(answer)
                except OSError:  # the end of the test
                    return

        port = other.getsockname()[1]
        environment(STORE.format(port=port))
        threading.Thread(target=serve, daemon=True).start()
        assert main(["pretrain", "--timeout", "0.1", "--data", "none.beton"]) == 2
        error = capfd.readouterr().err.splitlines()
    for thread in threading.enumerate():
        if thread.name == "store":  # it ends, not without a message, when the other program does
            thread.join()
    expected = f"rank 0 at 127.0.0.1:{port}, where another program answers"
    expected = f"MASTER_PORT {port} is in use on this machine" if rank == 0 else expected
    assert expected in error[-1] and len(error) <= 2


def test_a_master_address_of_another_machine_is_named(environment, port, capfd, monkeypatch):
    monkeypatch.setattr(rendezvous, "_CONNECT_LIMIT", 0.5)
    environment(f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=192.0.2.1 MASTER_PORT={port}")
    assert main(["pretrain", "--data", "none.beton"]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"rank 0 does not reach 192.0.2.1:{port}; MASTER_ADDR must be" in error


@pytest.mark.parametrize(
    "variables,place",
    [
        ("RANK=0 WORLD_SIZE=1", (0, 1, 0, 1)),  # Kubeflow's PyTorchJob
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=3", (0, 1, 3, 4)),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=3 LOCAL_WORLD_SIZE=8", (0, 1, 3, 8)),
    ],
)
def test_one_rank_needs_no_more(variables, place, environment):
    environment(variables)
    assert ranks.adopt_rank()
    world = ranks.meet(1.0, "1 s")
    assert (world.rank, world.size, world.local_rank, world.local_size) == place
    assert world.group is None


@pytest.mark.parametrize(
    "hosts,rank,place",
    [("aabb", 0, (0, 2)), ("aabb", 3, (1, 2)), ("abab", 2, (1, 2)), ("abc", 2, (0, 1))],
)
def test_local_ranks_are_counted_from_the_hosts(hosts, rank, place, environment):
    assert rendezvous.local_rank_and_size(rank, list(hosts)) == place


JOINS = """
import sys
from bt_fast.distributed import ranks
world = ranks.meet(300, "300 s")
ranks.join(world, 300, on_gpu=False)
print(world.local_rank, world.local_size, world.group.size())
sys.stdout.flush()
ranks.leave()
"""


def test_ranks_without_local_variables_meet(environment, port):
    environment(f"WORLD_SIZE=2 {STORE}".format(port=port))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            env={**os.environ, "RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert outputs == ["0 2 2\n", "1 2 2\n"]


@pytest.mark.parametrize(
    "variables,is_task",
    [
        (TASK, True),
        (f"{TASK} SLURM_PTY_PORT=9 SLURM_TASK_PID={os.getpid()}", True),
        (f"{TASK} SLURM_PTY_PORT=9 SLURM_TASK_PID=1", False),  # typed in the task's shell
        (f"{TASK} SLURM_TASK_PID=1", True),  # a script started it
        (TASK.replace("TASKS=2", "TASKS=1"), False),
    ],
)
def test_a_command_typed_into_a_shell_of_a_step_is_no_task(variables, is_task, environment):
    environment(variables)
    slurm.adopt_environment()
    assert ("RANK" in os.environ) == is_task == ranks.adopt_rank()


@pytest.mark.parametrize(
    "visible,count,local_rank,index",
    [
        (None, 8, 3, 3),
        ("0,1", 2, 1, 1),
        ("5", 1, 3, 0),  # as with srun --gpus-per-task=1
        ("GPU-8d5f", 1, 0, 0),
        (None, 1, 1, "LOCAL_RANK is 1, but there are 1 GPUs"),
        ("0,1", 2, 2, r"there are 2 GPUs \(CUDA_VISIBLE_DEVICES is 0,1\); start one rank per GPU"),
    ],
)
def test_the_gpu_of_a_rank(visible, count, local_rank, index, environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is not None:
        environment(f"CUDA_VISIBLE_DEVICES={visible}")
    if isinstance(index, int):
        assert runtime.gpu_index(local_rank) == index
    else:
        with pytest.raises(ValueError, match=index):
            runtime.gpu_index(local_rank)


def test_two_ranks_of_the_same_gpu_are_refused(environment, monkeypatch):
    environment("CUDA_VISIBLE_DEVICES=0")
    monkeypatch.setattr(ranks, "_stores", [torch.distributed.HashStore()])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(uuid="c1-48")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.distributed, "init_process_group", mock.Mock())
    worlds = [World(rank=rank, size=3, local_rank=rank, local_size=3) for rank in range(3)]
    ranks.join(worlds[0], 1.0, on_gpu=True)
    with pytest.raises(ValueError, match="two ranks have the same GPU, cuda:0 of"):
        ranks.join(worlds[1], 1.0, on_gpu=True)
    gpu.uuid = "c1-49"  # as where the launcher shows every rank its own
    ranks.join(worlds[2], 1.0, on_gpu=True)
