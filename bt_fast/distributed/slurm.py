"""Slurm: the job of a run, starting ranks inside a job, and being one of its tasks.

The job of `--slurm` runs `bt-fast pretrain --resume RUN`, whose configuration was written at
submission. Before its time limit Slurm sends SIGUSR2 to the ranks; they save and exit with
EXIT_STOPPED, and the job requeues itself. A preempted or requeued job gets SIGTERM instead, which
ends the job's script, so that it is not requeued twice; the ranks have Slurm's KillWait to save.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from bt_fast.config import Config
from bt_fast.distributed.rendezvous import integer
from bt_fast.distributed.signals import EXIT_STOPPED

SCRIPT = "slurm.sbatch"
_NOTICE = 180  # seconds between SIGUSR2 and the time limit; Slurm may be a minute early
_GRACE_PERIOD = 60  # seconds for all tasks to end after the first has ended


def job_script(config: Config, world_size: int, partition: str, path: Path) -> str:
    """The sbatch script of a run in the folder `path`. Full nodes get all their cores and memory.

    Raises ValueError if the ranks do not fill their nodes.
    """
    per_node = min(config.gpus_per_node, world_size)
    full_nodes = per_node == config.gpus_per_node
    if world_size % per_node:
        raise ValueError(
            f"--gpus {world_size} does not fill nodes with {per_node} each; choose a multiple, or"
            " another --gpus-per-node"
        )
    options = {
        "job-name": path.name,
        "partition": partition,
        "nodes": world_size // per_node,
        "ntasks": world_size,
        "ntasks-per-node": per_node,
        "gres": f"gpu:{per_node}" if config.device != "cpu" else None,
        "exclusive": True if full_nodes else None,
        "mem": 0 if full_nodes else None,
        "cpus-per-task": None if full_nodes else config.workers,
        "time": config.time_limit,
        "output": path / "slurm.log",
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{_NOTICE}",
    }
    lines = [
        f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    if config.slurm_args:
        lines.append(config.slurm_args)
    command = [sys.executable, "-m", "bt_fast.cli", "pretrain"]
    command += ["--resume", str(path), "--gpus", str(world_size)]
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {line}\n" for line in lines)
        + "\n# Starts the ranks with srun. Submitting this file again continues from the newest"
        + f" checkpoint.\n{shlex.join(command)}\nstatus=$?\n\n"
        + f"# {EXIT_STOPPED}: the ranks have saved after a stop request.\n"
        + f'if [ $status = {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi\n'
        + "exit $status\n"
    )


def require_sbatch(partition: str) -> None:
    """Raise ValueError if this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            f"--slurm {partition}: this machine has no sbatch; submit where there is one, or print"
            " the job with --dry-run"
        )


def sbatch(script: Path, partition: str) -> str:
    """Submit a job script; returns the job's number. Raises ValueError with sbatch's message."""
    # The new job is not part of the job that this process may run in.
    prefixes = ("SLURM_", "SLURMD_", "SRUN_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(prefixes) or name == "SLURM_CONF"
    }
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"sbatch ended with status {done.returncode}"
        raise ValueError(f"--slurm {partition}: {message}")
    return done.stdout.strip().partition(";")[0]


def srun(world_size: int, *, on_gpus: bool) -> list[str] | None:
    """The srun command for ranks on the nodes of the Slurm job around this process.

    None outside a job, inside one of its steps, and if all ranks are processes of its only node.
    Raises ValueError if the job has too few GPUs or CPUs.
    """
    job = os.environ
    inside = "SLURM_JOB_ID" in job and "SLURM_STEP_ID" not in job and shutil.which("srun")
    if not inside:
        return None
    num_nodes = integer("SLURM_JOB_NUM_NODES", 1)
    num_tasks = integer("SLURM_NTASKS", num_nodes)
    if num_nodes == 1 and world_size != num_tasks:
        return None
    units = "GPUs" if on_gpus else "CPUs"
    available = job.get("SLURM_GPUS_ON_NODE" if on_gpus else "SLURM_JOB_CPUS_PER_NODE")
    # As in "8(x2),4": the smallest node counts. If Slurm does not state it, srun checks.
    counts = [int(n) for n in re.findall(r"\b\d+", available)] if available else [world_size]
    per_node = min(counts)
    if world_size % num_nodes or world_size > num_nodes * per_node:
        raise ValueError(
            f"--gpus {world_size} does not fit this Slurm job of {num_nodes} nodes with {per_node}"
            f" {units} each; choose a multiple of {num_nodes}, up to {num_nodes * per_node}"
        )
    words = f"srun --nodes={num_nodes} --ntasks={world_size}"
    words += f" --ntasks-per-node={world_size // num_nodes}"
    # After the first task ends, the others have a grace period; every rank may use all cores.
    words += f" --kill-on-bad-exit=0 --wait={_GRACE_PERIOD} --cpu-bind=none"
    return words.split() + (["--overcommit"] if world_size > num_tasks else [])


def adopt_environment() -> None:
    """Inside a step of several tasks, set torchrun's environment variables from Slurm's.

    In a terminal's shell (srun --pty), whose variables are those of its task, nothing is set: the
    commands that a user types there are no tasks.
    """
    job = os.environ
    size = integer("SLURM_STEP_NUM_TASKS", 1)
    if "RANK" in job or size == 1 or "SLURM_PROCID" not in job:
        return
    is_task = integer("SLURM_TASK_PID", os.getpid()) == os.getpid()
    if not is_task and any(name.startswith("SLURM_PTY_") for name in job):
        return
    job.update(RANK=str(integer("SLURM_PROCID")), WORLD_SIZE=str(size))
    if "SLURM_LOCALID" in job:
        job["LOCAL_RANK"] = job["SLURM_LOCALID"]
    if "SLURM_STEP_NODELIST" in job:
        job.setdefault("MASTER_ADDR", first_host(job["SLURM_STEP_NODELIST"]))
    # Identical on all ranks, rarely in use, and below the ephemeral ports.
    step = 31 * integer("SLURM_JOB_ID", 0) + integer("SLURM_STEP_ID", 0)
    job.setdefault("MASTER_PORT", str(20_000 + step % 10_000))


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: "gpu[03-05,9],x" -> "gpu03"."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    return name + rest.partition("]")[0].partition(",")[0].partition("-")[0]
