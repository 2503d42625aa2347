"""`bt-fast pretrain`: from the configuration to a plan, a Slurm job, or ranks."""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bt_fast.config import Config
from bt_fast.distributed import launcher, slurm
from bt_fast.distributed.collectives import ALONE, World, require_divisible_batch
from bt_fast.distributed.ranks import adopt_rank, run_rank
from bt_fast.distributed.rendezvous import num_restarts
from bt_fast.distributed.signals import EXIT_REFUSED, EXIT_STOPPED, StopFlag
from bt_fast.run.console import print_summary
from bt_fast.run.directory import RunDirectory, choose_path, make_folder
from pipelines.loading.datasets import open_data, require_equal_shares, require_full_batches

_STATUS = "BT_FAST_STATUS"  # a file for the exit status, which torchrun does not pass on


def run_pretrain(config: Config, arguments: Sequence[str], stop: StopFlag) -> int:
    """Run `bt-fast pretrain`; `arguments` are its flags, for the ranks. Returns the exit status."""
    if config.slurm is not None:
        return submit(config, config.slurm)
    config = continue_after_restart(config)
    if adopt_rank():
        return run_rank(
            "bt-fast pretrain",
            lambda world: _exit_status(_train(config, stop, world), world),
            device=config.device,
            gpus=config.gpus,
            timeout=config.timeout,
        )
    placement = launcher.place_ranks(config.gpus, config.device, use_srun=not config.dry_run)
    num_ranks = placement.num_ranks
    if config.dry_run and (num_ranks > 1 or not config.data.exists()):
        from bt_fast.plan.dry_run import plan

        rows = {"recipe": config.title} | plan(config, num_ranks)
        print_summary("bt-fast pretrain, the plan", rows)
        return 0
    if placement.srun is None and num_ranks == 1:
        return _train(config, stop, ALONE)
    if not placement.fits:
        require_equal_shares(config.batch_size, num_ranks)
        require_divisible_batch(config.batch_size, num_ranks, config.bn_group, config.accumulate)
        print(
            launcher.several_machines(arguments, placement, config.gpus_per_node), file=sys.stderr
        )
        return EXIT_REFUSED
    check(config, num_ranks)
    folder = config.resume or make_folder(config)
    if config.resume is None:  # restarts continue in the same folder
        arguments = [*arguments, "--run-dir", str(folder)]
    status = launcher.start_ranks(placement, ["pretrain", *arguments], stop)
    if status == EXIT_REFUSED:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
    return status


def submit(config: Config, partition: str) -> int:
    """Submit the run to Slurm, or print the job with `--dry-run`.

    Raises ValueError with Slurm's message if it refuses the job, and restores the run directory.
    """
    if config.gpus is None:
        raise ValueError(f"--slurm {partition} needs --gpus, the number of ranks")
    path = choose_path(config).absolute()
    script = slurm.job_script(config, config.gpus, partition, path)
    if config.data.exists() or not config.dry_run:
        check(config, config.gpus)
    if config.dry_run:
        print(script, end="")
        return 0
    slurm.require_sbatch(partition)
    is_new = not path.exists()
    paths = [path / name for name in ("config.json", slurm.SCRIPT, ".lock")]
    before = {file: file.read_bytes() for file in paths if file.exists()}
    with RunDirectory(path) as run:
        run.record_config(config)
        run.write(slurm.SCRIPT, script)
    try:
        job = slurm.sbatch(path / slurm.SCRIPT, partition)
    except ValueError:
        for file in paths:
            file.unlink(missing_ok=True)
            if file in before:
                file.write_bytes(before[file])
        if is_new:
            shutil.rmtree(path)
        raise
    print(script)
    print(f"submitted as job {job}: {path / slurm.SCRIPT}; its output: {path / 'slurm.log'}")
    print(f"scancel {job} ends it; scancel --signal=USR2 {job} lets it save and queue again")
    return 0


def continue_after_restart(config: Config) -> Config:
    """After a restart with the same flags, resume the run that the first start began."""
    path = config.run_dir
    if path is None or config.resume is not None or not num_restarts():
        return config
    if (path / "config.json").exists():
        return dataclasses.replace(config, resume=path)
    return config


def check(config: Config, num_ranks: int) -> None:
    """Raise ValueError for what every rank would refuse, so that it is reported once."""
    dataset = open_data(config.data, "--data")
    require_full_batches(config.batch_size, num_ranks, len(dataset), config.data)
    require_divisible_batch(config.batch_size, num_ranks, config.bn_group, config.accumulate)
    if config.resume is not None:
        RunDirectory(config.resume).close()


def _train(config: Config, stop: StopFlag, world: World) -> int:
    from bt_fast.train import pretrain  # a plan needs no trainer

    return pretrain(config, stop, world)


def _exit_status(status: int, world: World) -> int:
    """The exit status for the launcher; torchrun, which would restart a stopped run, gets 0."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return status
    if world.is_first and _STATUS in os.environ:
        Path(os.environ[_STATUS]).write_text(f"{status}\n")
    return 0 if status == EXIT_STOPPED else status
