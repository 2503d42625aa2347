"""Probes of a run: what its features are good for, while it trains, and a summary at the end.

With classes: kNN accuracies, and a linear readout by ridge regression on the same features. Always:
the features' effective rank, and the loss's terms on two views of held-out images, as many as a
batch has.
"""

import time
from pathlib import Path

import torch

from bt_fast.build import TrainingSetup, average_statistics
from bt_fast.evaluate.collapse import effective_rank
from bt_fast.evaluate.features import extract_features, two_view_outputs
from bt_fast.evaluate.knn_classifier import knn_scores
from bt_fast.evaluate.ridge import ridge_accuracy
from bt_fast.finite import NotFinite
from bt_fast.loss import correlation_terms
from bt_fast.run.console import RunLog
from bt_fast.run.directory import RunDirectory, read_metrics

READOUTS = {"knn_20": "kNN (k = 20)", "knn_200": "kNN (k = 200)", "linear": "linear"}


def has_probe(run: RunDirectory, step: int) -> bool:
    """Whether the metrics contain a probe at this step."""
    records = read_metrics(run.path / "metrics.jsonl")
    return any(r["kind"] == "probe" and r["step"] == step for _, r in records)


def probe(setup: TrainingSetup, log: RunLog, step: int) -> None:
    """Log the readouts of the present encoder, or warn that its features are not finite or that an
    eigendecomposition fails. All ranks call it, and divide the images."""
    started = time.perf_counter()
    average_statistics(setup)
    try:
        readouts = measure(setup)
    except (NotFinite, torch.linalg.LinAlgError) as error:
        log.warn(f"no probe at step {step}: {error}")
        return
    epoch, seconds = step / setup.loader.steps_per_epoch, time.perf_counter() - started
    log.probe({"step": step, "epoch": epoch, **readouts, "seconds": seconds})


def measure(setup: TrainingSetup) -> dict[str, float]:
    """The readouts by name, the same on every rank."""
    config, world = setup.config, setup.world
    held_out = setup.held_out
    views = setup.held_out_views
    encoder, crop = setup.model.encoder, config.probe_crop
    features = extract_features(encoder, views, held_out.samples, crop, world)
    readouts: dict[str, float] = {}
    if len(held_out) >= 2:  # before what may fail on one rank alone: it has collectives
        samples = held_out.samples[: config.batch_size]
        z_a, z_b = two_view_outputs(setup.model, views, samples, config, world)
        on_diagonal, off_diagonal = correlation_terms(z_a, z_b)
        readouts["probe_on_diagonal"] = on_diagonal.item()
        readouts["probe_off_diagonal"] = off_diagonal.item()
    if (data := setup.knn_data) is not None:  # whose queries are the held-out images
        assert setup.bank_views is not None
        bank = extract_features(encoder, setup.bank_views, data.bank.samples, crop, world)
        readouts |= knn_scores(bank, features, data)
        labels, query_labels = (s.labels.to(bank.device) for s in (data.bank, data.queries))
        readouts["linear"] = ridge_accuracy(bank, labels, features, query_labels, data.num_classes)
    return readouts | {"rank": effective_rank(features)}


def probe_summary(metrics: Path) -> str:
    """One line with the readouts of the first and the last probe of a run."""
    records = [record for _, record in read_metrics(metrics) if record["kind"] == "probe"]
    if len(records) < 2:
        return "no probes to compare"
    first, last = records[0], records[-1]
    readouts = [
        f"{title} {100 * first[name]:.1f} % -> {100 * last[name]:.1f} %"
        for name, title in READOUTS.items()
        if name in first and name in last
    ]
    if "rank" in first:
        readouts.append(f"rank {first['rank']:.1f} -> {last['rank']:.1f}")
    return f"epoch {first['epoch']:g} -> {last['epoch']:g}: {', '.join(readouts)}"
