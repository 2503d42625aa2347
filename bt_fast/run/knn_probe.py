"""The kNN probe of a run: when it is due, what it finds, and what that comes to at the end."""

import time
from pathlib import Path

from bt_fast.build import TrainingSetup
from bt_fast.distributed.collectives import copy_from_first
from bt_fast.evaluate.knn_classifier import evaluate_knn
from bt_fast.run.console import RunLog
from bt_fast.run.directory import RunDirectory, read_metrics


def probe_is_due(setup: TrainingSetup, step: int) -> bool:
    """Before the first step, after the last, and every `probe_every` epochs."""
    epoch, batch = divmod(step, setup.loader.steps_per_epoch)
    every = setup.config.probe_every
    return every > 0 and (step in (0, setup.last_step) or (batch == 0 and epoch % every == 0))


def probed(run: RunDirectory, step: int) -> bool:
    records = read_metrics(run.path / "metrics.jsonl")
    return any(r["kind"] == "probe" and r["step"] == step for _, r in records)


def probe(setup: TrainingSetup, log: RunLog, step: int) -> None:
    """kNN accuracy of the encoder as it is now. All ranks call it, and share its images."""
    if setup.knn_data is None:
        return
    started = time.perf_counter()
    # With --bn-group they differ; the encoder that is measured is the one that is saved.
    copy_from_first([setup.statistics.running], setup.world.group)
    scores = evaluate_knn(
        setup.model.encoder,
        setup.knn_data,
        setup.runtime,
        size=setup.config.size,
        crop=setup.config.probe_crop,
        num_threads=setup.num_threads,
        world=setup.world,
    )
    log.probe(
        {
            "step": step,
            "epoch": step / setup.loader.steps_per_epoch,
            **scores,
            "seconds": time.perf_counter() - started,
        }
    )


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
