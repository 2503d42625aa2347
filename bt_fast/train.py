"""Pretraining, from a configuration to a trained encoder: one loop, read top to bottom.

Values are read from the device only when a log line is due, and then a few steps late (`deferred`),
so that the host never waits for the device. A step whose loss or gradients are not finite changes
nothing: parameters, momentum and batch statistics stay, decided on the device. The state of a run
is one number, the step; order and views are functions of it.
"""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote

import torch
from rich.console import Console

from bt_fast.build import TrainingSetup, build, describe, learning_rates
from bt_fast.config import Config, load_config
from bt_fast.deferred import Deferred
from bt_fast.distributed import collectives, fault_injection
from bt_fast.distributed.collectives import (
    ALONE,
    StopRequest,
    World,
    broadcast_object,
    broadcast_tensors,
)
from bt_fast.distributed.signals import EXIT_STOPPED, EXIT_UNSAVED, StopFlag
from bt_fast.export.encoder_files import describe_encoder
from bt_fast.loss import weighted_sum
from bt_fast.models.networks import BarlowTwins
from bt_fast.plan import gpus
from bt_fast.plan.dry_run import count_costs, memory_and_rate_rows
from bt_fast.prefetch import prefetch
from bt_fast.run import checkpoint, plots
from bt_fast.run.async_checkpoint import AsyncCheckpoints
from bt_fast.run.console import Clock, RunLog, reason, summary_table
from bt_fast.run.directory import RunDirectory, choose_path, make_folder
from bt_fast.run.probe import has_probe, probe, probe_summary
from bt_fast.run.tracker import require_wandb
from bt_fast.step import compute_gradients, measure_step_seconds
from pipelines.common.console import printable

MAX_SKIPPED = 10  # consecutive skipped updates before a run gives up


def pretrain(config: Config, stop: StopFlag, world: World = ALONE) -> int:
    """Train as configured, as one of the ranks; returns the exit status (0, or one of `signals`).

    The first rank writes the run directory and prints; its decisions are broadcast.
    """
    console = Console(soft_wrap=True, quiet=not world.is_first)
    if world.is_first:
        choose_path(config)  # raises now, before minutes of preparation
        if config.tracker == "wandb":
            require_wandb()
    setup = build(config, world)
    if broadcast_object(setup.data_identity, world.group) != setup.data_identity:
        raise ValueError(f"--data {config.data} of rank {world.rank} is not that of rank 0")
    if config.dry_run and config.device != "cpu":  # first: the step below may not fit
        memory = memory_and_rate_rows(config, count_costs(config), 1, gpus.first_gpu())
        console.print(summary_table("bt-fast pretrain --dry-run", memory))
    rows = describe(setup, measure_step_seconds(setup))
    console.print(summary_table("bt-fast pretrain", rows))
    if config.dry_run:
        return 0
    if collectives.any_rank(stop.requested, world.group):
        console.print("stopped before the first step")
        return EXIT_STOPPED
    stop.training = True
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(RunDirectory(make_folder(config))) if world.is_first else None
        step, skipped_in_a_row = resume(setup, run, console)
        if run:
            run.record_start(setup.config, setup.runtime)
        folder = run.path if run else None
        log = RunLog(console, folder, step, setup.last_step, setup.config)
        if run:
            stack.push(functools.partial(draw_curves, run, log))  # however the run ends
        stack.enter_context(log)
        if run:
            log.info(f"run directory: {run.path}")
        log.skipped_in_a_row = skipped_in_a_row
        if step == setup.last_step:
            log.info("nothing is left to train; --resume RUN --extend EPOCHS trains longer")
        deferred = Deferred(setup.runtime.device)
        with AsyncCheckpoints(setup, run, log, deferred) as checkpoints:
            step = train(setup, run, log, stop, checkpoints, deferred, step)
        if step == setup.last_step:
            require_applied(log, step, fewer_than=1)
        status = 0 if step == setup.last_step else EXIT_STOPPED
        if run:
            status = finish(setup, run, log, step, checkpoints.saved)
        return broadcast_object(status, world.group)


def finish(setup: TrainingSetup, run: RunDirectory, log: RunLog, step: int, saved: bool) -> int:
    """Write the encoder, print the result or how to continue; returns the exit status.

    saved: whether the checkpoint of `step` was written.
    """
    complete = step == setup.last_step
    if complete:
        log.info(probe_summary(run.path / "metrics.jsonl"))
        try:  # even without a checkpoint: it is smaller
            log.info(f"done: {export_encoder(setup.model, setup.config, run.path)}")
        except OSError as error:
            log.warn(f"encoder.safetensors was not written: {reason(error)}")
            saved = False
    if not saved:
        found, _ = checkpoint.newest(run.path)
        newest = f"of step {found.step}" if found else "none"
        log.info(
            f"not everything was saved at step {step} of {setup.last_step}; the newest checkpoint"
            f" is {newest}. Free disk space, then: bt-fast pretrain --resume {quote(str(run.path))}"
        )
        return EXIT_UNSAVED
    if not complete:
        log.info(f"stopped; continue with: bt-fast pretrain --resume {quote(str(run.path))}")
        return EXIT_STOPPED
    return 0


def draw_curves(run: RunDirectory, log: RunLog, kind: type | None, *_: object) -> None:
    """Draw what the run has logged, unless the exception that ends it is an interrupt."""
    if kind is KeyboardInterrupt:
        return
    try:
        with log.optional_output("curves.png"):
            plots.curves({"": [run.path / "metrics.jsonl"]}, run.path / "curves.png")
    except Exception as error:  # which must not replace the one that ends the run
        log.warn(f"curves.png cannot be drawn: {error}")


def train(
    setup: TrainingSetup,
    run: RunDirectory | None,
    log: RunLog,
    stop: StopFlag,
    checkpoints: AsyncCheckpoints,
    deferred: Deferred,
    step: int,
) -> int:
    """The loop. Returns the step it reached, whose checkpoint is being written: the last step, or
    an earlier one after a stop request to any rank.
    """
    config, device, group = setup.config, setup.runtime.device, setup.world.group
    steps_per_epoch = setup.loader.steps_per_epoch
    save_every = config.save_every or steps_per_epoch
    # Also the probe that a killed run missed after its last checkpoint.
    if probe_is_due(setup, step) and not broadcast_object(run and has_probe(run, step), group):
        probe(setup, log, step)
    probed = time.monotonic()

    logged_step, clock = step, Clock(device)  # the last log line, seconds of training since then
    # Skipped updates: since the last log line, and without an applied one between them.
    skipped = torch.tensor([0, log.skipped_in_a_row], dtype=torch.int32, device=device)
    stop_request = StopRequest(group)
    batches = setup.loader.batches(step, setup.last_step)
    views_of_steps = prefetch(batches, (config.view_a, config.view_b), setup.runtime)
    for views in fault_injection.inject(views_of_steps, step, setup.world):
        if run and step == 0:
            with clock.paused(), log.optional_output("views.png"):
                plots.contact_sheet(views, run.path / "views.png")

        # One update.
        rates = set_learning_rates(setup, step)
        setup.drop_paths.draw(step, len(views) // 2)
        on_diagonal, off_diagonal, applied = update(setup, views)
        is_skipped = ~applied
        skipped += is_skipped
        skipped[1] *= is_skipped
        step += 1
        if deferred.pending:  # nothing is called in a step in which nothing is due
            deferred.run(step)
        if checkpoints.writing:
            checkpoints.check()
        give_up = not checkpoints.saved and config.if_save_fails == "stop"
        stopping = stop_request.any_rank(stop.requested or give_up)  # the same on all ranks

        # Log, save, probe.
        is_last = step == setup.last_step
        if step % config.log_every == 0 or step == 1 or is_last:
            values = torch.stack([on_diagonal, off_diagonal, *skipped.float()])
            values = values.to("cpu", non_blocking=True)  # page-locked if it comes from a GPU
            since = step - logged_step
            write = functools.partial(write_log_line, setup, log, step, since, rates)
            deferred.add(step, functools.partial(write, values, clock.lap()))
            logged_step = step
            skipped[0].zero_()
        if step % save_every == 0 or is_last or stopping:
            with clock.paused():
                checkpoints.begin(step, skipped[1])
        if stopping and not is_last:
            break
        if probe_is_due(setup, step) or time_for_probe(setup, step, probed):
            deferred.flush()
            with clock.paused():
                probe(setup, log, step)
            probed = time.monotonic()
    deferred.flush()
    return step


def probe_is_due(setup: TrainingSetup, step: int) -> bool:
    """Before the first step, after the last, and every `probe_every` epochs."""
    epoch, batch = divmod(step, setup.loader.steps_per_epoch)
    every = setup.config.probe_every
    if step in (0, setup.last_step):
        return every > 0 or setup.config.probe_minutes > 0
    return every > 0 and batch == 0 and epoch % every == 0


def time_for_probe(setup: TrainingSetup, step: int, since: float) -> bool:
    """Whether --probe-minutes have passed on the first rank; asked at the ends of epochs."""
    minutes = setup.config.probe_minutes
    if not minutes or step % setup.loader.steps_per_epoch:
        return False
    return broadcast_object(time.monotonic() - since >= 60 * minutes, setup.world.group)


def update(
    setup: TrainingSetup, views: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward, backward and optimizer step on views [2 n, 3, H, W], view A first.

    Returns (on-diagonal term, off-diagonal term, applied): scalars on the device.
    """
    on_diagonal, off_diagonal, loss = compute_gradients(setup, views)
    applied = setup.optimizer.step(guard=loss)
    assert applied is not None
    setup.optimizer.zero_grad(set_to_none=True)
    setup.statistics.update(applied)
    return on_diagonal, off_diagonal, applied


def set_learning_rates(setup: TrainingSetup, step: int) -> dict[str, float]:
    """Set the learning rates of this step; returns them by name."""
    rates = {}
    for group in setup.optimizer.param_groups:
        name = group["name"]
        rates[f"lr_{name}"] = group["lr"] = setup.schedules[name](step)
    return rates


def write_log_line(
    setup: TrainingSetup,
    log: RunLog,
    step: int,
    num_steps: int,
    rates: dict[str, float],
    values: torch.Tensor,
    seconds: Callable[[], float],
) -> None:
    """Log the steps since the previous line. Raises ValueError after too many skipped updates.

    step: the last of these steps. seconds: returns the time that they took.
    values: float [4], on the CPU: on-diagonal and off-diagonal term, `skipped` of `train`.
    """
    config = setup.config
    on_diagonal, off_diagonal, num_skipped, in_a_row = values.tolist()
    log.training(
        {
            "step": step,
            "epoch": step / setup.loader.steps_per_epoch,
            "loss": weighted_sum(on_diagonal, off_diagonal, config.lambd),
            "on_diagonal": on_diagonal,
            "off_diagonal": off_diagonal,
            **rates,
            "images_per_s": num_steps * config.batch_size / seconds(),
            "skipped": int(num_skipped),
        }
    )
    log.skipped_in_a_row = int(in_a_row)
    if num_skipped:
        log.warn(
            f"{int(num_skipped)} of the last {num_steps} updates skipped before step {step}: the"
            " loss or its gradients were not finite"
        )
    require_applied(log, step, fewer_than=MAX_SKIPPED)


def require_applied(log: RunLog, step: int, *, fewer_than: int) -> None:
    """Raise ValueError unless fewer of the last updates up to `step` were skipped."""
    count = log.skipped_in_a_row
    if count < fewer_than:
        return
    start = step - count  # the step whose checkpoint led there
    way_out = "start again in a new folder with lower --lr-weights and --lr-biases"
    # Of the other ranks, which have no folder, one may be the first to report.
    if log.folder is None or checkpoint.exists(log.folder, before=start):
        way_out += (
            f", or remove the checkpoints from step {start} on and"
            f"{'' if log.folder else ', if one is left,'} resume with --extend EPOCHS --peak 0.5"
        )
    raise ValueError(
        f"the loss or its gradients were not finite in the last {count} steps, whose updates were"
        f" skipped: {way_out}"
    )


def resume(setup: TrainingSetup, run: RunDirectory | None, console: Console) -> tuple[int, int]:
    """Restore a resumed run's newest valid checkpoint on all ranks -> (its step, how many of the
    last updates before it were skipped)."""
    if not broadcast_object(setup.config.resume is not None, setup.world.group):
        return 0, 0
    step, skipped_in_a_row = 0, 0
    if run:
        found, problems = checkpoint.newest(run.path, set_aside=True)
        for problem in problems:
            warning = f"warning: skipped a damaged checkpoint: {problem}"
            console.print(warning, style="yellow", markup=False)
        if found is not None:
            now, then = setup.data_identity, found.facts.get("data") or {}
            if now != then | ({} if then.get("sha256") else {"sha256": now["sha256"]}):
                raise ValueError(
                    f"--data {setup.config.data} is not what this run was trained on:"
                    f" {now['images']} images with SHA-256 {str(now['sha256'])[:8]} now,"
                    f" {then.get('images', '?')} with {str(then.get('sha256', '?'))[:8]} then"
                )
            if found.step > setup.last_step:
                raise ValueError(
                    f"--max-steps {setup.config.max_steps}: {setup.config.resume} is at step"
                    f" {found.step} already; pass a larger value or omit it"
                )
            found.restore(setup.model, setup.optimizer)
            step, skipped_in_a_row = found.step, found.facts.get("skipped_in_a_row", 0)
        elif (run.path / "encoder.safetensors").exists():
            raise ValueError(
                f"--resume {setup.config.resume}: no intact checkpoint is left, and starting at"
                " step 0 would delete the run's encoder; start a new run, from its encoder by"
                f" --init {setup.config.resume}"
            )
        before = load_config(run.path, "--resume")
        if before.epochs != setup.config.epochs and step >= setup.last_step:
            raise ValueError(
                f"--extend {setup.config.epochs}: the run would still end at step"
                f" {setup.last_step}; give a larger --max-steps, too, or --max-steps None"
            )
        run.truncate_metrics(step)
        (run.path / "encoder.safetensors").unlink(missing_ok=True)  # of an earlier, shorter end
    step, skipped_in_a_row = broadcast_object((step, skipped_in_a_row), setup.world.group)
    state = checkpoint.state(setup.model, setup.optimizer)
    broadcast_tensors([tensor for part in state for tensor in part.values()], setup.world.group)
    if run and before.epochs != setup.config.epochs:
        rates = [
            learning_rates(config, setup.loader.steps_per_epoch)["weights"](step)
            for config in (before, setup.config)
        ]
        console.print(
            f"the schedule has {setup.config.epochs} epochs instead of {before.epochs}: the"
            f" learning rate of the next step is {rates[1]:.4g} instead of {rates[0]:.4g}"
        )
    position = f"{setup.config.resume} at step {step} of {setup.last_step}"
    console.print(f"resuming {printable(position, console.encoding)}", markup=False)
    return step, skipped_in_a_row


def export_encoder(model: BarlowTwins, config: Config, folder: Path) -> Path:
    """Write the encoder with its library's names, and what the names do not tell; returns the
    file."""
    path = folder / "encoder.safetensors"
    weights = checkpoint.copied(model.encoder.state_dict())
    metadata = describe_encoder(config.encoder, config.stem, config.size)
    checkpoint.write_tensors(weights, path, {"format": "pt", **metadata})
    return path
