"""Command lines of several ranks, Slurm's among them, for each message of docs/errors.md."""

import os
import sys

from error_list import Case, Place
from error_pretrain_cases import PRETRAIN, no_gpu, raises

from bt_fast.distributed.collectives import World
from bt_fast.distributed.rendezvous import RESTARTS

SLURM = PRETRAIN + " --slurm fast"


def ranks_started(place: Place) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        place.monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        place.monkeypatch.setenv(name, "2")


def one_of_two_ranks(place: Place, rank: int = 0) -> None:
    ranks_started(place)
    world = World(rank=rank, size=2, local_rank=rank, local_size=2)
    place.patch("bt_fast.distributed.rendezvous.join", lambda device, timeout: world)
    place.patch("bt_fast.distributed.rendezvous.leave", lambda: None)
    place.patch("os._exit", lambda status: raises(SystemExit(status))())


def failing_rank(place: Place) -> None:
    """The second of two ranks, whose collective fails."""
    one_of_two_ranks(place, 1)
    place.patch("bt_fast.distributed.rendezvous.unresponsive_ranks", lambda world: [0])
    place.patch("bt_fast.train.pretrain", raises(RuntimeError("connection closed\nby peer")))


def failing_ranks(place: Place) -> None:
    """Both die whenever they are started."""
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    place.patch("bt_fast.distributed.supervisor._rank_command", lambda arguments: command)
    place.monkeypatch.setenv(RESTARTS, "0")  # is counted up


def other_data(place: Place) -> None:
    place.patch(
        "bt_fast.train.broadcast_object", lambda value, group: {} if type(value) is dict else value
    )


def refusing_sbatch(place: Place) -> None:
    program = place.write("bin/sbatch", "#!/bin/sh\necho error: no such partition >&2\nexit 1\n")
    program.chmod(0o755)
    place.monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def two_nodes(place: Place) -> None:
    """Inside a Slurm job."""
    job = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_CPUS_PER_NODE": "4(x2)"}
    for name, value in job.items():
        place.monkeypatch.setenv(f"SLURM_{name}", value)
    place.patch("shutil.which", lambda name: name)


CASES = [
    Case("--gpus …, but this machine has … GPUs; add", "pretrain --gpus 32", no_gpu),
    Case("--gpus …, but … ranks were started", PRETRAIN + " --gpus 4", ranks_started),
    Case("--slurm … needs --gpus", SLURM),
    Case("--gpus … does not fill nodes", SLURM + " --gpus 12"),
    Case(
        "--slurm …: this machine has no sbatch",
        SLURM + " --gpus 2",
        lambda place: place.monkeypatch.setenv("PATH", ""),
    ),
    Case("--slurm …: …", SLURM + " --gpus 2", refusing_sbatch),
    Case("--gpus … does not fit this Slurm job", PRETRAIN + " --gpus 16", two_nodes),
    Case(
        "BT_FAST_FAULT=… is not",
        PRETRAIN,
        lambda place: place.monkeypatch.setenv("BT_FAST_FAULT", "now"),
    ),
    Case(
        "bt-fast: rank … ended with …; restarting all ranks", PRETRAIN + " --gpus 2", failing_ranks
    ),
    Case("rank … ended with …", PRETRAIN + " --gpus 2", failing_ranks),
    Case("rank … failed: …", PRETRAIN, failing_rank, status=1),
    Case("--data … of rank … is not that of rank 0", PRETRAIN, other_data),
]
