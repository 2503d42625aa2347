"""`bt-fast eval knn`: weighted kNN accuracy, rank of the features, collapse of the embeddings."""

from functools import partial

import torch
from rich.console import Console

from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.collapse import centred_rank, collapse_report, effective_rank
from bt_fast.evaluate.eval_setup import EvalSetup, build_setup, open_splits
from bt_fast.evaluate.features import model_outputs
from bt_fast.evaluate.knn_classifier import (
    SETTINGS,
    KnnData,
    choose_data,
    extract_knn_features,
    knn_scores,
)
from bt_fast.evaluate.options import EvalKnn
from bt_fast.run.console import summary_table

_VIEW_EPOCH = -1  # epoch of the augmented views, which pretraining never reaches
_MAX_RANK_IMAGES = 25_600  # RankMe's number of images


def run_knn(options: EvalKnn, world: World = ALONE) -> int:
    """Print the accuracies; returns the exit status."""
    setup = build_setup(options, projector=options.collapse, world=world)
    if options.collapse and setup.projector is None:
        raise ValueError(
            "--collapse needs the trained projector: give a run with checkpoints, or a full"
            " checkpoint, without --random"
        )
    train, val = open_splits(options, setup.config)
    data = choose_data(train, val, setup.seed)
    if data is None:
        raise ValueError(f"--data {train.path} has fewer than two classes")
    rows = {
        "encoder": setup.description,
        "data": f"{data.description} of {train.path}",
        **measure_knn(setup, data, augmented=options.augmented)[1],
    }
    if options.collapse:
        rows |= measure_collapse(setup, data)
    Console(soft_wrap=True).print(summary_table("bt-fast eval knn", rows))
    return 0


def measure_knn(
    setup: EvalSetup, data: KnnData, *, augmented: bool = False
) -> tuple[float, dict[str, str]]:
    """(accuracy with k = 20, rows of the table)."""
    bank, queries = extract_knn_features(setup.encoder, data, setup.views, setup.crop, setup.world)
    scores = knn_scores(bank, queries, data)
    rows = {
        f"kNN, k = {k}, T = {temperature}": f"{100 * scores[f'knn_{k}']:.2f} %"
        for k, temperature in SETTINGS
    }
    if augmented:
        for view, letter in enumerate("AB"):
            view_scores = knn_scores(
                bank, augmented_outputs(setup, setup.encoder, data, view), data
            )
            values = ", ".join(f"{100 * view_scores[f'knn_{k}']:.2f} %" for k, _ in SETTINGS)
            rows[f"held-out images as view {letter}"] = values
    rows["rank of the features"] = _ranks(queries)
    return scores[f"knn_{SETTINGS[0][0]}"], rows


def measure_collapse(setup: EvalSetup, data: KnnData) -> dict[str, str]:
    """Rows on the embeddings of the held-out images' two views, in evaluation mode."""
    assert setup.projector is not None
    model = torch.nn.Sequential(setup.encoder, setup.projector)
    z_a, z_b = (augmented_outputs(setup, model, data, view) for view in (0, 1))
    return {"rank of the embeddings": _ranks(z_a), **collapse_report(z_a, z_b).rows}


def _ranks(features: torch.Tensor) -> str:
    """Cell of the table: effective ranks of the first features; features [n, D]."""
    features = features[:_MAX_RANK_IMAGES]
    return (
        f"RankMe {effective_rank(features):.1f}, centred {centred_rank(features):.1f},"
        f" of {min(features.shape)}"
    )


def augmented_outputs(
    setup: EvalSetup, model: torch.nn.Module, data: KnnData, view: int
) -> torch.Tensor:
    """The model's outputs for one of pretraining's two views of the held-out images."""
    config = setup.config or Config()
    batches = partial(
        setup.views(data.queries).random,
        min_scale=setup.min_scale,
        seed=setup.seed,
        epoch=_VIEW_EPOCH,
        branch=(config.view_a, config.view_b)[view],
        view=view,
    )
    return model_outputs(model, data.query_samples, batches, setup.runtime, setup.world)
