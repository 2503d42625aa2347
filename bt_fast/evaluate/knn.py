"""`bt-fast eval knn`: what is near what among the features, how many dimensions they use, and
whether the embeddings have collapsed."""

from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.collapse import centred_rank, collapse_report, effective_rank
from bt_fast.evaluate.features import extract_features, outputs
from bt_fast.evaluate.knn_classifier import SETTINGS, KnnData, choose_data, knn_scores
from bt_fast.evaluate.options import EvalOptions, Subject, open_data_and_val, open_subject
from bt_fast.run.console import summary_table
from pipelines.augment import VIEW_A, VIEW_B

_VIEW_EPOCH = -1  # of the augmented views: none of pretraining's
_RANK_IMAGES = 25_600  # as many as RankMe takes


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalKnn(EvalOptions):
    """Weighted kNN accuracy of an encoder, and the rank of its features."""

    augmented: bool = False
    """Also classify held-out images after pretraining's augmentation, once per branch."""
    collapse: bool = False
    """Also report on the embeddings of the projector, which a run's checkpoint holds."""


def run_knn(options: EvalKnn, world: World = ALONE) -> int:
    """Print the accuracies; returns the exit status."""
    subject = open_subject(options, projector=options.collapse, world=world)
    train, val = open_data_and_val(options, subject)
    data = choose_data(train, val, subject.seed)
    if data is None:
        raise ValueError(f"--data {train.path} has no two classes to tell apart")
    rows = {
        "encoder": subject.description,
        "data": f"{data.description} of {train.path}",
        **measure_knn(subject, data, augmented=options.augmented)[1],
    }
    if options.collapse:
        rows |= measure_collapse(subject, data)
    Console(soft_wrap=True).print(summary_table("bt-fast eval knn", rows))
    return 0


def measure_knn(
    subject: Subject, data: KnnData, *, augmented: bool = False
) -> tuple[float, dict[str, str]]:
    """(accuracy with k = 20, rows of the table)."""
    bank, queries = (
        extract_features(
            subject.encoder, subject.views(images), samples, subject.crop, subject.world
        )
        for images, samples in ((data.bank, data.bank_samples), (data.queries, data.query_samples))
    )
    plain = knn_scores(bank, queries, data)
    rows = {
        f"kNN, k = {k}, T = {temperature}": f"{100 * plain[f'knn_{k}']:.2f} %"
        for k, temperature in SETTINGS
    }
    if augmented:
        for number, letter in enumerate("AB"):
            seen = augmented_outputs(subject, subject.encoder, data, number)
            found = knn_scores(bank, seen, data)
            values = ", ".join(f"{100 * found[f'knn_{k}']:.2f} %" for k, _ in SETTINGS)
            rows[f"held-out images as view {letter}"] = values
    some = queries[:_RANK_IMAGES]
    rows["rank of the features"] = (
        f"RankMe {effective_rank(some):.1f}, centred {centred_rank(some):.1f}, of {min(some.shape)}"
    )
    return plain[f"knn_{SETTINGS[0][0]}"], rows


def measure_collapse(subject: Subject, data: KnnData) -> dict[str, str]:
    """Rows on the embeddings of the held-out images' two views, in evaluation mode."""
    if subject.projector is None:
        raise ValueError(
            "--collapse needs the projector: give a run with checkpoints, or a full checkpoint"
        )
    model = torch.nn.Sequential(subject.encoder, subject.projector)
    z_a, z_b = (augmented_outputs(subject, model, data, number) for number in (0, 1))
    some = z_a[:_RANK_IMAGES]
    return {
        "rank of the embeddings": f"RankMe {effective_rank(some):.1f},"
        f" centred {centred_rank(some):.1f}, of {min(some.shape)}",
        **collapse_report(z_a, z_b).rows,
    }


def augmented_outputs(
    subject: Subject, model: torch.nn.Module, data: KnnData, view: int
) -> torch.Tensor:
    """The model's outputs for one of pretraining's two views of the held-out images."""
    branches = (VIEW_A, VIEW_B)
    if subject.config is not None:
        branches = (subject.config.view_a, subject.config.view_b)
    batches = partial(
        subject.views(data.queries).random,
        min_scale=subject.min_scale,
        seed=subject.seed,
        epoch=_VIEW_EPOCH,
        branch=branches[view],
        view=view,
    )
    return outputs(model, data.query_samples, batches, subject.runtime, subject.world)
