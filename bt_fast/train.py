"""Pretraining, from a configuration to a trained encoder: one loop, read top to bottom.

Values are read back from the device only when a log line is due. A step whose loss or gradients
are not finite changes nothing: parameters, momentum and batch statistics stay, decided on the
device. Where a run stands is one number, the step; order and views follow from it.
"""

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from bt_fast import checkpoint, perf, pictures
from bt_fast.config import Config
from bt_fast.evaluate.knn import KnnData, choose_data, evaluate_knn
from bt_fast.lars import LARS
from bt_fast.log import RunLog, duration, summary_table
from bt_fast.loss import correlation_terms
from bt_fast.model import BarlowTwins, flatten_batch_statistics
from bt_fast.perf import Performance
from bt_fast.run_directory import RunDirectory
from bt_fast.schedule import learning_rate
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.crop import RandomResizedCrop
from pipelines.flags import usable_cores
from pipelines.loader import Batch, NativeLoader

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; start again with --resume


@dataclass(kw_only=True, slots=True)
class Job:
    """Everything a run is made of, built from its configuration."""

    config: Config
    performance: Performance
    reader: BetonReader
    loader: NativeLoader
    knn_data: KnnData | None
    model: BarlowTwins
    statistics: torch.Tensor  # all batch statistics of the model, one tensor
    optimizer: LARS
    last_step: int


def pretrain(settings: Config) -> int:
    """Train as configured; returns the process's exit status (0, or EXIT_STOPPED)."""
    console = Console(soft_wrap=True)
    job = build(settings)
    seconds_per_step = rehearse(job)
    console.print(summary_table("bt-fast pretrain", describe(job, seconds_per_step)))
    if settings.dry_run:
        return 0
    with RunDirectory(settings) as run:
        step = resume(job, run, console)
        with RunLog(console, run.path, step, job.last_step) as log:
            log.say(f"run directory: {run.path}")
            run.record_environment(job.performance)
            status = train(job, run, log, step)
            pictures.curves(run.path / "metrics.jsonl", run.path / "curves.png")
            if status == 0:
                log.say(f"done: {export_encoder(job.model, run.path)}")
            else:
                log.say(f"stopped; continue with: bt-fast pretrain --resume {run.path}")
    return status


def train(job: Job, run: RunDirectory, log: RunLog, step: int) -> int:
    """The loop. Returns 0 when the last step is done, EXIT_STOPPED after a signal."""
    settings, device = job.config, job.performance.device
    steps_per_epoch = job.loader.steps_per_epoch
    save_every = settings.save_every or steps_per_epoch
    stop = StopFlag()
    skipped = torch.zeros((), dtype=torch.int32, device=device)  # steps since the last log line
    window_start, window_steps = time.perf_counter(), 0

    if step == 0:
        probe(job, log, step)
    for batch in job.loader.batches(step, job.last_step):
        views = augmented(batch, job)
        if step == 0:
            pictures.contact_sheet(*views, run.path / "views.png")

        # One update.
        rates = set_learning_rates(job, step)
        invariance, redundancy, applied = update(job, views)
        skipped += ~applied
        step += 1
        window_steps += 1

        # Once in a while: log, save, probe.
        epoch_ends = step % steps_per_epoch == 0
        if step % settings.log_every == 0 or step in (1, job.last_step):
            terms = torch.stack([invariance, redundancy, skipped.float()]).tolist()
            seconds = time.perf_counter() - window_start
            log.training(
                {
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "loss": terms[0] + settings.lambd * terms[1],
                    "invariance": terms[0],
                    "redundancy": terms[1],
                    **rates,
                    "images_per_s": window_steps * settings.batch_size / seconds,
                    "skipped": int(terms[2]),
                }
            )
            report_skipped(log, step, int(terms[2]), window_steps)
            skipped.zero_()
            window_start, window_steps = time.perf_counter(), 0
        due = step % save_every == 0 or step == job.last_step or stop.requested
        if due:
            save(job, run, step)
        if epoch_ends and probe_is_due(settings, step // steps_per_epoch, step == job.last_step):
            probe(job, log, step)
        if due or epoch_ends:
            window_start, window_steps = time.perf_counter(), 0
        if stop.requested:
            return EXIT_STOPPED
    return 0


def update(job: Job, views: tuple[torch.Tensor, torch.Tensor]):
    """Forward, backward and optimizer step -> (invariance, redundancy, applied), on the device."""
    before = job.statistics.clone()
    with job.performance.autocast():
        z_a, z_b = job.model(views[0]), job.model(views[1])  # BN sees one view at a time
    invariance, redundancy = correlation_terms(z_a, z_b)
    loss = invariance + job.config.lambd * redundancy
    (loss * job.config.grad_scale).backward()

    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    applied = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    job.optimizer.step(apply=applied)
    job.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        job.statistics.copy_(torch.where(applied, job.statistics, before))
    return invariance.detach(), redundancy.detach(), applied


def augmented(batch: Batch, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Both views on the training device, as the encoder takes them: [n, 3, H, W] each."""
    branches = (job.config.view_a, job.config.view_b)
    views = [
        augment.apply(
            images.to(job.performance.device, non_blocking=True),
            augment.draw(branch, keys),
            dtype=job.performance.view_dtype,
        )
        for images, branch, keys in zip(batch.views, branches, batch.keys, strict=True)
    ]
    return views[0], views[1]


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


def report_skipped(log: RunLog, step: int, skipped: int, steps: int) -> None:
    """Say that updates were skipped; give up when a whole log interval of them was."""
    if not skipped:
        return
    log.warn(
        f"{skipped} of the last {steps} updates skipped before step {step}: the loss or its"
        " gradients were not finite"
    )
    if skipped == steps and step > 1:
        raise ValueError(
            f"the loss was not finite for {steps} steps in a row; the last checkpoint is healthy,"
            " resume from it or start again with lower --lr-weights and --lr-biases"
        )


def probe_is_due(settings: Config, epoch: int, is_last: bool) -> bool:
    return settings.probe_every > 0 and (is_last or epoch % settings.probe_every == 0)


def probe(job: Job, log: RunLog, step: int) -> None:
    """kNN accuracy of the encoder as it is now."""
    if job.knn_data is None or job.config.probe_every == 0:
        return
    started = time.perf_counter()
    scores = evaluate_knn(
        job.model.encoder,
        job.knn_data,
        job.performance,
        size=job.config.size,
        crop=job.config.probe_crop,
        num_threads=job.config.workers or usable_cores(),
    )
    log.probe(
        {
            "step": step,
            "epoch": step / job.loader.steps_per_epoch,
            **scores,
            "seconds": time.perf_counter() - started,
        }
    )


def build(settings: Config) -> Job:
    """Everything but the run directory. Raises ValueError for what cannot be trained."""
    if settings.gpus not in (None, 1):
        raise ValueError(f"--gpus {settings.gpus}: only one process is supported so far")
    if settings.loader not in ("auto", "native"):
        raise ValueError(f"--loader {settings.loader} is not available yet; use native")
    performance = perf.choose(settings.device, settings.precision, settings.compile)
    perf.apply(performance)

    reader = open_data(settings.data, "--data")
    val = open_val(settings.data, settings.val_data)
    loader = NativeLoader(
        reader,
        RandomResizedCrop(size=settings.size, scale=(settings.min_scale, 1.0)),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_threads=settings.workers or usable_cores(),
        pin_memory=performance.device.type == "cuda",
    )

    torch.manual_seed(settings.seed)  # the initialisation; drawn on the CPU, alike everywhere
    model = BarlowTwins(settings.encoder, settings.projector, small_images=settings.small_images)
    perf.prepare(model, performance)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return Job(
        config=settings,
        performance=performance,
        reader=reader,
        loader=loader,
        knn_data=choose_data(reader, val, settings.seed, settings.probe_images),
        model=model,
        statistics=flatten_batch_statistics(model),
        optimizer=LARS(
            [{"params": matrices}, {"params": vectors}],
            lr=0.0,
            weight_decay=settings.weight_decay,
        ),
        last_step=min(
            settings.epochs * loader.steps_per_epoch,
            settings.max_steps if settings.max_steps is not None else 2**62,
        ),
    )


def open_data(path: Path, flag: str) -> BetonReader:
    if not path.exists():
        raise ValueError(
            f"{flag} {path} does not exist; make it with: bt-convert IMAGE_FOLDER {path}"
        )
    return BetonReader(path)


def open_val(data: Path, val_data: Path | None) -> BetonReader | None:
    """The held-out images: the ones named, else what bt-convert left beside the training file."""
    if val_data is not None:
        return open_data(val_data, "--val-data")
    beside = data.with_suffix(f".val{data.suffix}")
    return BetonReader(beside) if beside.exists() else None


def rehearse(job: Job) -> float:
    """Run forward and backward on noise and forget it -> expected seconds per step.

    Compiles, allocates, and finds out before the run starts whether a step fits in memory. A CPU
    rehearses with a small batch and scales the time up.
    """
    settings, device = job.config, job.performance.device
    n = settings.batch_size if device.type == "cuda" else min(settings.batch_size, 16)
    noise = torch.randn(n, 3, settings.size, settings.size, device=device)
    noise = noise.to(job.performance.view_dtype, memory_format=torch.channels_last)
    before = job.statistics.clone()
    try:
        for _ in range(2):
            perf.synchronise(device)
            started = time.perf_counter()
            with job.performance.autocast():
                z_a, z_b = job.model(noise), job.model(noise)
            invariance, redundancy = correlation_terms(z_a, z_b)
            (invariance + redundancy).backward()
            job.optimizer.zero_grad(set_to_none=True)
            perf.synchronise(device)
            seconds = time.perf_counter() - started
    except torch.OutOfMemoryError:
        raise ValueError(
            f"--batch-size {settings.batch_size} does not fit into the memory of the"
            f" {device.type} device; choose a smaller one"
        ) from None
    with torch.no_grad():
        job.statistics.copy_(before)
    for name, buffer in job.model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return seconds * settings.batch_size / n


def describe(job: Job, seconds_per_step: float) -> dict[str, str]:
    """The rows of the table shown before a run starts."""
    settings, performance = job.config, job.performance
    parameters = [sum(p.numel() for p in part.parameters()) / 1e6 for part in job.model.children()]
    schedule = f"{settings.epochs} epochs x {job.loader.steps_per_epoch} steps"
    if job.last_step < settings.epochs * job.loader.steps_per_epoch:
        schedule += f", stopping after {job.last_step}"
    warmup = f"{settings.effective_warmup_epochs:g} epochs"
    if settings.effective_warmup_epochs != settings.warmup_epochs:
        warmup += f" (--warmup-epochs {settings.warmup_epochs:g} is not shorter than the run)"
    projector = "-".join(map(str, settings.projector))
    return {
        "recipe": settings.recipe,
        "data": f"{len(job.reader)} images, {job.reader.num_classes} classes in {settings.data}",
        "views": f"2 x {settings.size} px, crops from {settings.min_scale:g} of the area",
        "model": f"{settings.encoder} ({parameters[0]:.1f} M) +"
        f" projector {projector} ({parameters[1]:.1f} M)",
        "batch": f"{settings.batch_size} images",
        "steps": schedule,
        "warm-up": warmup,
        "device": f"{performance.device.type}, {performance.precision},"
        f" {'compiled' if performance.compile else 'not compiled'},"
        f" {settings.workers or usable_cores()} decoding threads",
        "kNN probe": job.knn_data.description if job.knn_data else "none (no classes)",
        "estimated time": f"{duration(seconds_per_step * job.last_step)}"
        f" ({settings.batch_size / seconds_per_step:.0f} images/s, without data and probes)",
    }


def resume(job: Job, run: RunDirectory, console: Console) -> int:
    """Restore the newest valid checkpoint of a resumed run -> the step to go on from."""
    if not run.resumed:
        return 0
    found, problems = checkpoint.newest(run.path)
    for problem in problems:
        console.print(f"warning: checkpoint passed over: {problem}", style="yellow", markup=False)
    step = 0
    if found is not None:
        if found.facts["data"] != data_facts(job):
            raise ValueError(
                f"--data {job.config.data} is not what this run was trained on:"
                f" {data_facts(job)} now, {found.facts['data']} then"
            )
        found.restore(job.model, job.optimizer)
        step = found.step
    run.truncate_metrics(step)
    console.print(f"resuming {run.path} at step {step} of {job.last_step}", markup=False)
    return step


def data_facts(job: Job) -> dict[str, int | str | None]:
    """What must be the same for the order of a resumed run to mean the same."""
    return {"images": len(job.reader), "sha256": job.reader.sha256()}


def save(job: Job, run: RunDirectory, step: int) -> None:
    checkpoint.save(
        run.path,
        step,
        job.model,
        job.optimizer,
        {"data": data_facts(job), "config": dataclasses.asdict(job.config)["recipe"]},
        keep=job.config.keep,
    )


def export_encoder(model: BarlowTwins, folder: Path) -> Path:
    """Write the encoder with torchvision's names; returns the file."""
    path = folder / "encoder.safetensors"
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.encoder.state_dict().items()
    }
    save_file(tensors, path)
    return path


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, _frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
