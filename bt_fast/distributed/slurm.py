"""Slurm: submitting a run, starting its ranks inside a job, and being one of them.

The job of `--slurm` runs `bt-fast pretrain --resume RUN`, whose configuration was written at
submission. Ahead of its time limit Slurm sends SIGUSR2 to the ranks; they save and end with
EXIT_STOPPED, and the job puts itself back into the queue. Preempted or requeued by others, it gets
SIGTERM instead, which ends the job's script, so that it is not requeued twice; the ranks have
Slurm's KillWait to save.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from bt_fast.config import Config
from bt_fast.distributed.signals import EXIT_STOPPED
from bt_fast.run.directory import RunDirectory

_NOTICE = 180  # seconds before the time limit; Slurm may be a minute early
_LEAVE = 60  # seconds in which all tasks must end after the first has
_JOB = "slurm.sbatch"


def script(config: Config, world_size: int, partition: str, path: Path) -> str:
    """The sbatch script of a run in the folder `path`.

    Whole nodes are asked for with all their cores and memory. Raises ValueError for ranks that do
    not fill their nodes.
    """
    per_node = min(config.gpus_per_node, world_size)
    whole = per_node == config.gpus_per_node
    if world_size % per_node:
        raise ValueError(
            f"--gpus {world_size} does not fill nodes with {per_node} each; choose a multiple, or"
            " another --gpus-per-node"
        )
    asked = {
        "job-name": path.name,
        "partition": partition,
        "nodes": world_size // per_node,
        "ntasks": world_size,
        "ntasks-per-node": per_node,
        "gres": f"gpu:{per_node}" if config.device != "cpu" else None,
        "exclusive": True if whole else None,
        "mem": 0 if whole else None,
        "cpus-per-task": None if whole else config.workers,
        "time": config.time_limit,
        "output": path / "slurm.log",
        "open-mode": "append",
        "requeue": True,
        "signal": f"USR2@{_NOTICE}",
    }
    lines = [
        f"--{name}" if value is True else f"--{name}={shlex.quote(str(value))}"
        for name, value in asked.items()
        if value is not None
    ]
    if config.slurm_args:
        lines.append(config.slurm_args)
    run = [sys.executable, "-m", "bt_fast.cli", "pretrain"]
    run += ["--resume", str(path), "--gpus", str(world_size)]
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {line}\n" for line in lines)
        + "\n# Starts the ranks with srun. Submitting this file again goes on from the newest"
        + f" checkpoint.\n{shlex.join(run)}\nstatus=$?\n\n"
        + f"# {EXIT_STOPPED}: a signal asked the ranks to stop, and they have saved.\n"
        + f'if [ $status = {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi\n'
        + "exit $status\n"
    )


def submit(config: Config, script: str, path: Path) -> None:
    """Write configuration and script into the run's folder and hand the script to sbatch.

    Raises ValueError where there is no sbatch, or with what it says; then no new folder is left.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            f"--slurm {config.slurm}: this machine has no sbatch; submit where there is one, or"
            " see the job with --dry-run"
        )
    is_new = not path.exists()
    with RunDirectory(path) as run:
        run.record_settings(config)
        run.write(_JOB, script)
    # The new job is not part of the one we may be in.
    environment = {name: value for name, value in os.environ.items() if not _of_a_job(name)}
    done = subprocess.run(
        ["sbatch", "--parsable", str(path / _JOB)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        if is_new:
            shutil.rmtree(path)
        elif config.resume is None:
            for name in ("config.json", _JOB, ".lock"):
                (path / name).unlink(missing_ok=True)
        said = " ".join(done.stderr.split()) or f"sbatch ended with status {done.returncode}"
        raise ValueError(f"--slurm {config.slurm}: {said}")
    job = done.stdout.strip().partition(";")[0]
    print(script)
    print(f"submitted as job {job}: {path / _JOB}; its output: {path / 'slurm.log'}")
    print(f"scancel {job} ends it; scancel --signal=USR2 {job} lets it save and queue again")


def _of_a_job(name: str) -> bool:
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"


def srun(world_size: int, *, on_gpus: bool) -> list[str] | None:
    """The words that start so many ranks on the nodes of the Slurm job around this process.

    None outside of a job, inside of one of its steps, and where all ranks are processes of its only
    node. Raises ValueError if they do not fit.
    """
    job = os.environ
    inside = "SLURM_JOB_ID" in job and "SLURM_STEP_ID" not in job and shutil.which("srun")
    if not inside:
        return None
    num_nodes = int(job.get("SLURM_JOB_NUM_NODES", "1"))
    num_tasks = int(job.get("SLURM_NTASKS", num_nodes))
    if num_nodes == 1 and world_size != num_tasks:
        return None
    what = "GPUs" if on_gpus else "CPUs"
    room = job.get("SLURM_GPUS_ON_NODE" if on_gpus else "SLURM_JOB_CPUS_PER_NODE")
    # As in "8(x2),4": the smallest node counts. Without a word of it srun will know.
    per_node = min(int(n) for n in re.findall(r"\b\d+", room)) if room else world_size
    if world_size % num_nodes or world_size > num_nodes * per_node:
        raise ValueError(
            f"--gpus {world_size} does not fit this Slurm job of {num_nodes} nodes with {per_node}"
            f" {what} each; choose a multiple of {num_nodes}, up to {num_nodes * per_node}"
        )
    words = f"srun --nodes={num_nodes} --ntasks={world_size}"
    words += f" --ntasks-per-node={world_size // num_nodes}"
    # One rank's end is everyone's, once they have left or said why; all cores for all ranks.
    words += f" --kill-on-bad-exit=0 --wait={_LEAVE} --cpu-bind=none"
    return words.split() + (["--overcommit"] if world_size > num_tasks else [])


def adopt() -> None:
    """Inside a step of several tasks, say what torchrun would say in the environment."""
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
    # Alike on all ranks, and seldom taken: between the steps' number and the ephemeral ports.
    step = 31 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20_000 + step % 10_000))


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: "gpu[03-05,9],x" -> "gpu03"."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    return name + rest.partition("]")[0].partition(",")[0].partition("-")[0]
