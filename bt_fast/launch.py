"""From one command to all ranks.

`--gpus N` is the number of ranks in the whole run. Who starts them:

    torchrun or srun did       this process is a rank: it joins, and refuses another N
    they fit on this machine   started here, as torchrun would, and started again from the newest
                               checkpoint when one dies
    otherwise                  what to type on every machine is printed, and the exit status is 2
"""

import dataclasses
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bt_fast import dist
from bt_fast.config import Config
from bt_fast.job import open_data
from bt_fast.log import summary_table
from bt_fast.plan import plan
from bt_fast.run_directory import choose_path
from bt_fast.train import pretrain
from pipelines.loader import require_full_batches

MAX_RESTARTS = 3
_STATUS = "BT_FAST_STATUS"  # file for the ranks' exit status, set by whoever starts them here


def launch(settings: Config, arguments: Sequence[str]) -> int:
    """Run `bt-fast pretrain`; `arguments` are its flags, for the ranks. Returns the exit status."""
    adopt_slurm()
    if "RANK" in os.environ:
        return run_rank(settings)
    num_here = torch.cuda.device_count() if settings.device != "cpu" else 0
    wanted = settings.gpus or max(num_here, 1)
    if settings.dry_run and (wanted > 1 or not settings.data.exists()):
        rows = {"recipe": settings.recipe} | plan(settings, wanted)
        Console(soft_wrap=True).print(summary_table("bt-fast pretrain, the plan", rows))
        return 0
    if wanted == 1:
        return pretrain(settings)
    if settings.device != "cpu" and wanted > num_here:
        print(elsewhere(arguments, wanted, num_here), file=sys.stderr)
        return 2
    check(settings, wanted)
    return start_here(settings, arguments, wanted)


def check(settings: Config, wanted: int) -> None:
    """What every rank would complain about, said once."""
    reader = open_data(settings.data, "--data")
    require_full_batches(settings.batch_size, wanted, len(reader), settings.data)
    if settings.batch_size < 2 * wanted:
        raise ValueError(
            f"--batch-size {settings.batch_size} is less than 2 for each of {wanted} ranks"
        )
    dist.require_equal_groups(wanted, settings.bn_group)


def run_rank(settings: Config) -> int:
    """Be one of the ranks that torchrun or srun started."""
    world = dist.described()
    if settings.gpus not in (None, world.size):
        raise ValueError(
            f"--gpus {settings.gpus}, but {world.size} ranks were started; leave --gpus out or"
            " start as many"
        )
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    run_dir = settings.run_dir
    if restarted and settings.resume is None and run_dir and (run_dir / "config.json").exists():
        settings = dataclasses.replace(settings, resume=run_dir)
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if on_gpu else torch.device("cpu")
    if not on_gpu and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(torch.get_num_threads() // world.local_size, 1))
    world = dist.join(device, settings.patience)
    try:
        status = pretrain(settings, world)
    except RuntimeError as error:
        if world.size > 1:
            silent = dist.silent_ranks(world)
            told = f"; ranks {silent} do not answer" if silent else ""
            reason = str(error).strip().partition("\n")[0]
            print(f"bt-fast pretrain: rank {world.rank} stops: {reason}{told}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # what hangs would hang the way out too
        raise
    finally:
        dist.leave()
    if _STATUS in os.environ:  # torchrun would take a stop for a failure, and start again
        if world.is_first:
            Path(os.environ[_STATUS]).write_text(str(status))
        return 0
    return status


def start_here(settings: Config, arguments: Sequence[str], wanted: int) -> int:
    """Start the ranks on this machine and see them through."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    arguments = list(arguments)
    if settings.resume is None:  # a name that outlives a restart
        arguments += ["--run-dir", str(choose_path(settings))]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=wanted,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        monitor_interval=0.5,
    )
    with tempfile.NamedTemporaryFile() as status:
        os.environ[_STATUS] = status.name
        try:
            elastic_launch(config, sys.executable)("-m", "bt_fast.cli", "pretrain", *arguments)
        except SignalException as stop:
            return int(Path(status.name).read_text() or 128 + stop.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == 2:  # it has said why
                return 2
            what = f"exit status {failure.exitcode}"
            if failure.exitcode < 0:
                what = signal.Signals(-failure.exitcode).name
            raise ValueError(
                f"rank {rank} ended with {what}, and so did {MAX_RESTARTS} restarts"
            ) from None
        return int(Path(status.name).read_text())


def elsewhere(arguments: Sequence[str], wanted: int, num_here: int) -> str:
    """What to type where, for more GPUs than this machine has."""
    here = max(num_here, 1)
    machines = -(-wanted // here)
    command = (
        f"torchrun --nnodes {machines} --nproc-per-node {here} --rdzv-backend c10d"
        f" --rdzv-endpoint FIRST_MACHINE:29500 --rdzv-id bt-fast --max-restarts {MAX_RESTARTS}"
        f" -m bt_fast.cli pretrain {' '.join(arguments)} --run-dir SHARED_FOLDER"
    )
    return (
        f"bt-fast pretrain: --gpus {wanted}, but this machine has {num_here}; type this on each of"
        f" {machines} machines with {here} each:\n  {command}"
    )


def adopt_slurm() -> None:
    """Under srun, say what torchrun would say in the environment."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    if "SLURM_PROCID" not in os.environ:
        return
    size, per_node = os.environ["SLURM_STEP_NUM_TASKS"], os.environ["SLURM_STEP_TASKS_PER_NODE"]
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=size,
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=per_node.partition("(")[0].partition(",")[0],
    )
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    # Alike on all ranks, and seldom taken: between the job's number and the ephemeral ports.
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: "gpu[03-05,9],x" -> "gpu03"."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    return name + rest.partition("]")[0].partition(",")[0].partition("-")[0]
