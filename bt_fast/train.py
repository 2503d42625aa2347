"""Pretraining, from a configuration to a trained encoder: one loop, read top to bottom.

Values are read back from the device only when a log line is due. A step whose loss or gradients
are not finite changes nothing: parameters, momentum and batch statistics stay, decided on the
device. Where a run stands is one number, the step; order and views follow from it.
"""

import contextlib
import functools
import time
from pathlib import Path

import torch
from rich.console import Console

from bt_fast import checkpoint, faults, pictures
from bt_fast.config import Config
from bt_fast.dist import (
    ALONE,
    Vote,
    World,
    copy_from_first,
    from_first,
    of_all,
    require_same_weights,
    wait_for_all,
)
from bt_fast.evaluate.knn import evaluate_knn
from bt_fast.feed import feed
from bt_fast.job import Job, build, describe, rehearse
from bt_fast.log import Clock, RunLog, summary_table
from bt_fast.model import BarlowTwins
from bt_fast.perf import synchronise
from bt_fast.run_directory import RunDirectory, choose_path, read_metrics
from bt_fast.schedule import learning_rate
from bt_fast.signals import EXIT_STOPPED, StopFlag

MAX_SKIPPED = 10  # updates skipped in a row before a run gives up


def pretrain(settings: Config, world: World = ALONE) -> int:
    """Train as configured, as one of the ranks; returns the exit status (0, or EXIT_STOPPED).

    The first rank writes the run directory and prints; what it decides the others are told.
    """
    console = Console(soft_wrap=True, quiet=not world.is_first)
    path = from_first(choose_path(settings) if world.is_first else None, world.group)
    job = build(settings, world)
    if from_first(job.data_facts, world.group) != job.data_facts:
        raise ValueError(f"--data {settings.data} of rank {world.rank} is not that of rank 0")
    seconds_per_step = rehearse(job)
    console.print(summary_table("bt-fast pretrain", describe(job, seconds_per_step)))
    if settings.dry_run:
        return 0
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunDirectory(path)) if world.is_first else None
        step = resume(job, run, console)
        log = stack.enter_context(RunLog(console, path if run else None, step, job.last_step))
        stop = stack.enter_context(StopFlag())
        log.say(f"run directory: {path}")
        if run:
            run.record_start(job.config, job.performance)
        status = train(job, run, log, stop, step)
        if run:
            finish(job, run, log, status)
        wait_for_all(world.group)
    return status


def finish(job: Job, run: RunDirectory, log: RunLog, status: int) -> None:
    """Leave curves and encoder behind and say what was learned, or how to go on."""
    metrics = run.path / "metrics.jsonl"
    pictures.curves(metrics, run.path / "curves.png")
    if status == 0:
        log.say(learned(metrics))
        log.say(f"done: {export_encoder(job.model, run.path)}")
    else:
        log.say(f"stopped; continue with: bt-fast pretrain --resume {run.path}")


def train(job: Job, run: RunDirectory | None, log: RunLog, stop: StopFlag, step: int) -> int:
    """The loop. Returns 0 when the last step is done, EXIT_STOPPED after a signal to any rank.

    run: the run directory, on the rank that has it.
    """
    settings = job.config
    steps_per_epoch = job.loader.steps_per_epoch
    save_every = settings.save_every or steps_per_epoch
    # Also what a run did not get to between its last checkpoint and the kill.
    if run and probe_is_due(job, step) and not probed(run, step):
        probe(job, log, step)

    # Since the last log line: its step, seconds spent training, updates skipped.
    settle = functools.partial(synchronise, job.performance.device)
    logged_step, clock = step, Clock(settle)
    skipped = torch.zeros((), dtype=torch.int32, device=job.performance.device)
    skipped_in_a_row = 0
    vote = Vote(job.world.group)
    batches = job.loader.batches(step, job.last_step)
    for views in feed(batches, (settings.view_a, settings.view_b), job.performance):
        if run and step == 0:
            with clock.paused():
                pictures.contact_sheet(views, run.path / "views.png")

        # One update.
        rates = set_learning_rates(job, step)
        invariance, redundancy, applied = update(job, faults.inject(views, step, job.world))
        skipped += ~applied
        step += 1
        stopping = vote.ask(stop.requested)  # by any rank, and the same on all

        # Once in a while: log, save, probe.
        is_last = step == job.last_step
        if step % settings.log_every == 0 or step == 1 or is_last:
            terms = torch.stack([invariance, redundancy, skipped.float()]).tolist()
            num_steps, num_skipped = step - logged_step, int(terms[2])
            log.training(
                {
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "loss": terms[0] + settings.lambd * terms[1],
                    "invariance": terms[0],
                    "redundancy": terms[1],
                    **rates,
                    "images_per_s": num_steps * settings.batch_size / clock.seconds(),
                    "skipped": num_skipped,
                }
            )
            skipped_in_a_row = skipped_in_a_row + num_steps if num_skipped == num_steps else 0
            report_skipped(log, step, num_skipped, num_steps, skipped_in_a_row)
            logged_step, clock = step, Clock(settle)
            skipped.zero_()
        if step % save_every == 0 or is_last or stopping:
            with clock.paused():
                require_same_weights(job.model, job.world.group)
                save(job, run, step)
        if stopping and not is_last:
            return EXIT_STOPPED
        if run and probe_is_due(job, step):
            with clock.paused():
                probe(job, log, step)
    return 0


def update(job: Job, views: torch.Tensor):
    """Forward, backward and optimizer step on views [2 n, 3, H, W], view A first.

    Returns (invariance, redundancy, applied): scalars on the device.
    """
    before = job.statistics.clone()
    with job.performance.autocast():
        z_a, z_b = job.embed(views).chunk(2)  # [n, D] each
    invariance, redundancy = job.objective(z_a, z_b)
    loss = invariance + job.config.lambd * redundancy
    # Ranks' gradients are averaged, and this rank's are its share of the true one.
    (loss * job.config.grad_scale * job.world.size).backward()

    applied = job.optimizer.step(guard=loss.detach())
    assert applied is not None
    job.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        job.statistics.copy_(torch.where(applied, job.statistics, before))
    return invariance.detach(), redundancy.detach(), applied


def set_learning_rates(job: Job, step: int) -> dict[str, float]:
    """Set this step's rates; returns them by name."""
    settings = job.config
    rates = {}
    for name, base_lr, group in zip(
        ("lr_weights", "lr_biases"),
        (settings.lr_weights, settings.lr_biases),
        job.optimizer.param_groups,
        strict=True,
    ):
        rates[name] = group["lr"] = learning_rate(
            step,
            steps_per_epoch=job.loader.steps_per_epoch,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            base_lr=base_lr,
            warmup_epochs=settings.effective_warmup_epochs,
        )
    return rates


def report_skipped(log: RunLog, step: int, skipped: int, steps: int, in_a_row: int) -> None:
    """Say that updates were skipped; give up when nothing else has happened for a while."""
    if not skipped:
        return
    log.warn(
        f"{skipped} of the last {steps} updates skipped before step {step}: the loss or its"
        " gradients were not finite"
    )
    if in_a_row >= MAX_SKIPPED:
        raise ValueError(
            f"the loss was not finite for {in_a_row} steps in a row. No checkpoint has seen them:"
            " resume, or start again with lower --lr-weights and --lr-biases"
        )


def probe_is_due(job: Job, step: int) -> bool:
    """Before the first step, after the last, and every `probe_every` epochs."""
    epoch, batch = divmod(step, job.loader.steps_per_epoch)
    every = job.config.probe_every
    return every > 0 and (step in (0, job.last_step) or (batch == 0 and epoch % every == 0))


def probed(run: RunDirectory, step: int) -> bool:
    records = read_metrics(run.path / "metrics.jsonl")
    return any(r["kind"] == "probe" and r["step"] == step for _, r in records)


def probe(job: Job, log: RunLog, step: int) -> None:
    """kNN accuracy of the encoder as it is now."""
    if job.knn_data is None:
        return
    started = time.perf_counter()
    scores = evaluate_knn(
        job.model.encoder,
        job.knn_data,
        job.performance,
        size=job.config.size,
        crop=job.config.probe_crop,
        num_threads=job.num_threads,
    )
    log.probe(
        {
            "step": step,
            "epoch": step / job.loader.steps_per_epoch,
            **scores,
            "seconds": time.perf_counter() - started,
        }
    )


def resume(job: Job, run: RunDirectory | None, console: Console) -> int:
    """Restore the newest valid checkpoint of a resumed run -> the step to go on from.

    The first rank reads it and sends it to the others.
    """
    if job.config.resume is None:
        return 0
    step, readers = 0, []
    if run:
        found, problems = checkpoint.newest(run.path, set_aside=True)
        for problem in problems:
            console.print(
                f"warning: checkpoint passed over: {problem}", style="yellow", markup=False
            )
        if found is not None:
            if found.facts["data"] != job.data_facts:
                raise ValueError(
                    f"--data {job.config.data} is not what this run was trained on:"
                    f" {job.data_facts} now, {found.facts['data']} then"
                )
            found.restore(job.model, job.optimizer)
            step, readers = found.step, found.facts.get("readers", [])
        run.truncate_metrics(step)
        (run.path / "encoder.safetensors").unlink(missing_ok=True)  # of an earlier, shorter end
    step, readers = from_first((step, readers), job.world.group)
    if warning := job.loader.steps.restore(readers):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    momenta = [job.optimizer.momentum(p) for p in job.model.parameters()]
    copy_from_first([*job.model.state_dict().values(), *momenta], job.world.group)
    console.print(f"resuming {job.config.resume} at step {step} of {job.last_step}", markup=False)
    return step


def save(job: Job, run: RunDirectory | None, step: int) -> None:
    """All ranks call it: where each one's reader stands is in the checkpoint, too."""
    readers = of_all(job.loader.steps.state(step), job.world.group)
    if run:
        facts = {"data": job.data_facts, "readers": readers}
        checkpoint.save(run.path, step, job.model, job.optimizer, facts, keep=job.config.keep)


def learned(metrics: Path) -> str:
    """One line: what the first and the last probe of a run found."""
    records = [record for _, record in read_metrics(metrics) if record["kind"] == "probe"]
    if len(records) < 2:
        return "no kNN probes to compare"
    scores = [
        f"k={name.removeprefix('knn_')}: {100 * records[0][name]:.1f} % ->"
        f" {100 * records[-1][name]:.1f} %"
        for name in records[0]
        if name.startswith("knn_")
    ]
    return f"kNN accuracy, epoch {records[0]['epoch']:g} -> {records[-1]['epoch']:g}: " + ", ".join(
        scores
    )


def export_encoder(model: BarlowTwins, folder: Path) -> Path:
    """Write the encoder with torchvision's names; returns the file."""
    path = folder / "encoder.safetensors"
    checkpoint.write_tensors(model.encoder.state_dict(), path)
    return path
