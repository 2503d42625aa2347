"""The kNN probe of a run, and its summary at the end."""

import time
from functools import partial
from pathlib import Path

from bt_fast.build import TrainingSetup
from bt_fast.distributed.collectives import broadcast_tensors
from bt_fast.evaluate.knn_classifier import extract_knn_features, knn_scores
from bt_fast.evaluate.views import Views
from bt_fast.finite import NotFinite
from bt_fast.run.console import RunLog
from bt_fast.run.directory import RunDirectory, read_metrics


def has_probe(run: RunDirectory, step: int) -> bool:
    """Whether the metrics contain a probe at this step."""
    records = read_metrics(run.path / "metrics.jsonl")
    return any(r["kind"] == "probe" and r["step"] == step for _, r in records)


def probe(setup: TrainingSetup, log: RunLog, step: int) -> None:
    """Log the kNN accuracy of the present encoder, or warn that its features are not finite. All
    ranks call it, and divide the images."""
    if setup.knn_data is None:
        return
    started = time.perf_counter()
    # With --bn-group statistics differ; the first rank's are saved.
    broadcast_tensors([setup.statistics.running], setup.world.group)
    config = setup.config
    open_views = partial(
        Views, runtime=setup.runtime, size=config.size, num_threads=setup.num_threads
    )
    try:
        features = extract_knn_features(
            setup.model.encoder, setup.knn_data, open_views, config.probe_crop, setup.world
        )
    except NotFinite as error:
        log.warn(f"no kNN probe at step {step}: {error}")
        return
    log.probe(
        {
            "step": step,
            "epoch": step / setup.loader.steps_per_epoch,
            **knn_scores(*features, setup.knn_data),
            "seconds": time.perf_counter() - started,
        }
    )


def probe_summary(metrics: Path) -> str:
    """One line with the accuracies of the first and the last probe of a run."""
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
