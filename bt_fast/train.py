"""Pretraining, from a configuration to a trained encoder: one loop, read top to bottom.

Values are read back from the device only when a log line is due, and then a few steps late
(`deferred`), so that nothing waits for the device. A step whose loss or gradients are not finite
changes nothing: parameters, momentum and batch statistics stay, decided on the device. Where a run
stands is one number, the step; order and views follow from it.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import torch
from rich.console import Console

from bt_fast.build import TrainingSetup, build, describe, rehearse
from bt_fast.config import Config
from bt_fast.deferred import Deferred
from bt_fast.distributed import collectives, fault_injection
from bt_fast.distributed.collectives import ALONE, Vote, World, copy_from_first, from_first
from bt_fast.distributed.signals import EXIT_STOPPED, EXIT_UNSAVED, StopFlag
from bt_fast.models.networks import BarlowTwins
from bt_fast.plan import gpus
from bt_fast.plan.dry_run import count, fits
from bt_fast.prefetch import feed
from bt_fast.run import checkpoint, plots
from bt_fast.run.async_checkpoint import Saving
from bt_fast.run.console import Clock, RunLog, reason, summary_table
from bt_fast.run.directory import RunDirectory, choose_path, make_folder
from bt_fast.run.knn_probe import learned, probe, probe_is_due, probed
from bt_fast.schedule import learning_rate
from pipelines.common.console import shown

MAX_SKIPPED = 10  # updates skipped in a row before a run gives up


def pretrain(config: Config, stop: StopFlag, world: World = ALONE) -> int:
    """Train as configured, as one of the ranks; returns the exit status (0, or one of `signals`).

    The first rank writes the run directory and prints; what it decides the others are told.
    """
    console = Console(soft_wrap=True, quiet=not world.is_first)
    if world.is_first:
        choose_path(config)  # complains now, before minutes of preparation
    setup = build(config, world)
    if from_first(setup.data_facts, world.group) != setup.data_facts:
        raise ValueError(f"--data {config.data} of rank {world.rank} is not that of rank 0")
    seconds_per_step = rehearse(setup)
    rows = describe(setup, seconds_per_step)
    if config.dry_run and config.device != "cpu":
        rows |= fits(config, count(config), 1, gpus.present())
    console.print(summary_table("bt-fast pretrain", rows))
    if config.dry_run:
        return 0
    if collectives.any_wish(stop.requested, world.group):
        console.print("stopped before the first step")
        return EXIT_STOPPED
    stop.training = True
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunDirectory(make_folder(config))) if world.is_first else None
        step = resume(setup, run, console)
        if run:
            run.record_start(setup.config, setup.runtime)
        log = stack.enter_context(RunLog(console, run.path if run else None, step, setup.last_step))
        if run:
            log.say(f"run directory: {run.path}")
        deferred = Deferred(setup.runtime.device)
        with Saving(setup, run, log, deferred) as saving:
            step = train(setup, run, log, stop, saving, deferred, step)
        status = 0 if step == setup.last_step else EXIT_STOPPED
        if run:
            status = finish(setup, run, log, step, saving.saved)
        return from_first(status, world.group)


def finish(setup: TrainingSetup, run: RunDirectory, log: RunLog, step: int, saved: bool) -> int:
    """Leave curves and encoder behind and say what was learned, or how to go on.

    saved: whether the disk has taken the checkpoint of `step`. Returns the exit status.
    """
    metrics = run.path / "metrics.jsonl"
    with log.can_do_without("curves.png"):
        plots.curves(metrics, run.path / "curves.png")
    complete = step == setup.last_step
    if complete:
        log.say(learned(metrics))
        try:  # even without a checkpoint: it is smaller
            log.say(f"done: {export_encoder(setup.model, run.path)}")
        except OSError as error:
            log.warn(f"encoder.safetensors was not written: {reason(error)}")
            saved = False
    if not saved:
        found, _ = checkpoint.newest(run.path)
        newest = f"of step {found.step}" if found else "none"
        log.say(
            f"not everything was saved at step {step} of {setup.last_step}; the newest checkpoint"
            f" is {newest}. Make room, then: bt-fast pretrain --resume {quote(str(run.path))}"
        )
        return EXIT_UNSAVED
    if not complete:
        log.say(f"stopped; continue with: bt-fast pretrain --resume {quote(str(run.path))}")
        return EXIT_STOPPED
    return 0


def train(
    setup: TrainingSetup,
    run: RunDirectory | None,
    log: RunLog,
    stop: StopFlag,
    saving: Saving,
    deferred: Deferred,
    step: int,
) -> int:
    """The loop. Returns the step it got to, which is being saved: the last step, or an earlier one
    after a request to stop to any rank.

    run: the run directory, on the rank that has it.
    """
    config = setup.config
    steps_per_epoch = setup.loader.steps_per_epoch
    save_every = config.save_every or steps_per_epoch
    # Also what a run did not get to between its last checkpoint and the kill.
    if probe_is_due(setup, step) and not from_first(run and probed(run, step), setup.world.group):
        probe(setup, log, step)

    # Since the last log line: its step, seconds spent training, updates skipped.
    device = setup.runtime.device
    logged_step, clock = step, Clock(device)
    skipped = torch.zeros((), dtype=torch.int32, device=device)
    skipped_in_a_row = SkippedInARow()
    vote = Vote(setup.world.group)
    batches = setup.loader.batches(step, setup.last_step)
    for views in feed(batches, (config.view_a, config.view_b), setup.runtime):
        if run and step == 0:
            with clock.paused(), log.can_do_without("views.png"):
                plots.contact_sheet(views, run.path / "views.png")

        # One update.
        rates = set_learning_rates(setup, step)
        on_diagonal, off_diagonal, applied = update(
            setup, fault_injection.inject(views, step, setup.world)
        )
        skipped += ~applied
        step += 1
        deferred.run(step)
        saving.look()
        give_up = not saving.saved and config.if_save_fails == "stop"
        stopping = vote.ask(stop.requested or give_up)  # by any rank, and the same on all

        # Once in a while: log, save, probe.
        is_last = step == setup.last_step
        if step % config.log_every == 0 or step == 1 or is_last:
            values = torch.stack([on_diagonal, off_diagonal, skipped.float()])
            values = values.to("cpu", non_blocking=True)  # page-locked, of a GPU's
            line = LogLine(step, step - logged_step, rates, values, clock.lap())
            write = functools.partial(write_log_line, setup, log, skipped_in_a_row, line)
            deferred.add(step, write)
            logged_step = step
            skipped.zero_()
        if step % save_every == 0 or is_last or stopping:
            with clock.paused():
                saving.begin(step)
        if stopping and not is_last:
            break
        if probe_is_due(setup, step):
            deferred.flush()
            with clock.paused():
                probe(setup, log, step)
    deferred.flush()
    return step


@dataclass(frozen=True, slots=True)
class LogLine:
    """The steps since the line before, when they were queued."""

    step: int  # the last of them
    num_steps: int
    rates: dict[str, float]
    values: torch.Tensor  # [3], on the CPU: on-diagonal and off-diagonal term, updates skipped
    seconds: Callable[[], float]  # that these steps took


@dataclass(slots=True)
class SkippedInARow:
    """How many updates in a row were skipped up to the newest log line."""

    count: int = 0


def write_log_line(
    setup: TrainingSetup, log: RunLog, skipped: SkippedInARow, line: LogLine
) -> None:
    """Read the values and log them; give up when updates have only been skipped for a while."""
    config = setup.config
    on, off, num_skipped = line.values.tolist()
    log.training(
        {
            "step": line.step,
            "epoch": line.step / setup.loader.steps_per_epoch,
            "loss": on + config.lambd * off,
            "on_diagonal": on,
            "off_diagonal": off,
            **line.rates,
            "images_per_s": line.num_steps * config.batch_size / line.seconds(),
            "skipped": int(num_skipped),
        }
    )
    skipped.count = skipped.count + line.num_steps if num_skipped == line.num_steps else 0
    report_skipped(log, line.step, int(num_skipped), line.num_steps, skipped.count)


def update(setup: TrainingSetup, views: torch.Tensor):
    """Forward, backward and optimizer step on views [2 n, 3, H, W], view A first.

    Returns (on_diagonal, off_diagonal, applied): scalars on the device.
    """
    with setup.runtime.autocast():
        z_a, z_b = setup.embed(views).chunk(2)  # [n, D] each
    on_diagonal, off_diagonal = setup.objective(z_a, z_b)
    loss = on_diagonal + setup.config.lambd * off_diagonal
    # Ranks' gradients are averaged, and this rank's are its share of the true one.
    (loss * (setup.config.grad_scale * setup.world.size)).backward()

    applied = setup.optimizer.step(guard=loss.detach())
    assert applied is not None
    setup.optimizer.zero_grad(set_to_none=True)
    setup.statistics.update(applied)
    return on_diagonal.detach(), off_diagonal.detach(), applied


def set_learning_rates(setup: TrainingSetup, step: int) -> dict[str, float]:
    """Set this step's rates; returns them by name."""
    config = setup.config
    rates = {}
    for name, base_lr, group in zip(
        ("lr_weights", "lr_biases"),
        (config.lr_weights, config.lr_biases),
        setup.optimizer.param_groups,
        strict=True,
    ):
        rates[name] = group["lr"] = learning_rate(
            step,
            steps_per_epoch=setup.loader.steps_per_epoch,
            epochs=config.epochs,
            batch_size=config.batch_size,
            base_lr=base_lr,
            warmup_epochs=config.effective_warmup_epochs,
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


def resume(setup: TrainingSetup, run: RunDirectory | None, console: Console) -> int:
    """Restore the newest valid checkpoint of a resumed run -> the step to go on from.

    The first rank reads it and sends it to the others.
    """
    if not from_first(setup.config.resume is not None, setup.world.group):
        return 0
    step, readers = 0, []
    if run:
        found, problems = checkpoint.newest(run.path, set_aside=True)
        for problem in problems:
            console.print(
                f"warning: checkpoint passed over: {problem}", style="yellow", markup=False
            )
        if found is not None:
            if found.facts.get("data") != setup.data_facts:
                raise ValueError(
                    f"--data {setup.config.data} is not what this run was trained on:"
                    f" {setup.data_facts} now, {found.facts.get('data')} then"
                )
            if found.step > setup.last_step:
                raise ValueError(
                    f"--max-steps {setup.config.max_steps}: {setup.config.resume} is at step"
                    f" {found.step} already; give more or leave it out"
                )
            found.restore(setup.model, setup.optimizer)
            step, readers = found.step, found.facts.get("readers", [])
        run.truncate_metrics(step)
        (run.path / "encoder.safetensors").unlink(missing_ok=True)  # of an earlier, shorter end
    step, readers = from_first((step, readers), setup.world.group)
    if warning := setup.loader.steps.restore(readers):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    momenta = [setup.optimizer.momentum(p) for p in setup.model.parameters()]
    copy_from_first([*setup.model.state_dict().values(), *momenta], setup.world.group)
    where = shown(f"{setup.config.resume} at step {step} of {setup.last_step}", console.encoding)
    console.print(f"resuming {where}", markup=False)
    return step


def export_encoder(model: BarlowTwins, folder: Path) -> Path:
    """Write the encoder with torchvision's names; returns the file."""
    path = folder / "encoder.safetensors"
    checkpoint.write_tensors(checkpoint.copied(model.encoder.state_dict()), path)
    return path
