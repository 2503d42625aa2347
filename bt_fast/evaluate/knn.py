"""`bt-fast eval knn`: weighted kNN accuracy, rank of the features, collapse of the embeddings."""

import torch

from bt_fast.config import Config
from bt_fast.distributed.collectives import World
from bt_fast.evaluate.collapse import collapse_report, effective_rank
from bt_fast.evaluate.eval_setup import EvalSetup, build_setup, open_splits
from bt_fast.evaluate.features import two_view_outputs
from bt_fast.evaluate.knn_classifier import (
    SETTINGS,
    KnnData,
    choose_data,
    knn_scores,
    missing_classes,
)
from bt_fast.evaluate.options import EvalKnn
from bt_fast.evaluate.overlap import warn_of_overlap
from bt_fast.evaluate.subset import Subset
from bt_fast.run.console import print_summary
from pipelines.order import epoch_order

_ORDER_EPOCH = -1  # of random samples, which pretraining never reaches
_MAX_RANK_IMAGES = 25_600  # RankMe's number of images


def run_knn(options: EvalKnn, world: World) -> int:
    """Print the accuracies; returns the exit status."""
    setup = build_setup(options, projector=options.collapse, world=world)
    if options.collapse and setup.projector is None:
        raise ValueError(
            "--collapse needs the trained projector: give a run with checkpoints, or a full"
            " checkpoint, without --random"
        )
    train, val = open_splits(options, setup.config)
    if val is not None and world.is_first:
        warn_of_overlap(train, val)
    data = choose_data(train, val, setup.seed)
    rows = {"encoder": setup.description}
    if data is not None:
        queries = data.queries
        rows["data"] = f"{data.description} of {train.path}"
        rows |= measure_knn(setup, data, augmented=options.augmented)[1]
    elif options.augmented:
        raise ValueError(f"--augmented needs images with classes: {missing_classes(train, val)}")
    else:
        images = train if val is None else val
        order = epoch_order(len(images), setup.seed, _ORDER_EPOCH)
        queries = Subset(images, order[:_MAX_RANK_IMAGES])
        rows["data"] = f"{len(queries)} images of {images.path}"
        rows["kNN"] = f"none: {missing_classes(train, val)}"
        rows["rank of the features"] = _ranks(_features(setup, queries))
    if options.collapse:
        rows |= measure_collapse(setup, queries)
    print_summary("bt-fast eval knn", rows)
    return 0


def _features(setup: EvalSetup, subset: Subset) -> torch.Tensor:
    return setup.features(setup.views(subset.images), subset.samples)


def measure_knn(
    setup: EvalSetup, data: KnnData, *, augmented: bool = False
) -> tuple[float, dict[str, str]]:
    """(accuracy with k = 20, rows of the table)."""
    bank, queries = (_features(setup, subset) for subset in (data.bank, data.queries))
    scores = knn_scores(bank, queries, data)
    rows = {
        f"kNN, k = {min(k, len(bank))}, T = {temperature}": f"{100 * scores[f'knn_{k}']:.2f} %"
        for k, temperature in SETTINGS
        if f"knn_{k}" in scores
    }
    if augmented:
        for letter, outputs in zip(
            "AB", _two_views(setup, setup.encoder, data.queries), strict=True
        ):
            view_scores = knn_scores(bank, outputs, data)
            values = ", ".join(f"{100 * score:.2f} %" for score in view_scores.values())
            rows[f"held-out images as view {letter}"] = values
    rows["rank of the features"] = _ranks(queries)
    return scores[f"knn_{SETTINGS[0][0]}"], rows


def measure_collapse(setup: EvalSetup, queries: Subset) -> dict[str, str]:
    """Rows on the embeddings of the images' two views, in evaluation mode."""
    assert setup.projector is not None
    model = torch.nn.Sequential(setup.encoder, setup.projector)
    z_a, z_b = _two_views(setup, model, queries)
    return {"rank of the embeddings": _ranks(z_a), **collapse_report(z_a, z_b).rows}


def _two_views(
    setup: EvalSetup, model: torch.nn.Module, queries: Subset
) -> tuple[torch.Tensor, torch.Tensor]:
    config, views = setup.config or Config(), setup.views(queries.images)
    return two_view_outputs(model, views, queries.samples, config, setup.world)


def _ranks(features: torch.Tensor) -> str:
    """Cell of the table: effective ranks of the first features; features [n, D]."""
    features = features[:_MAX_RANK_IMAGES]
    centred = effective_rank(features - features.mean(0))
    return f"RankMe {effective_rank(features):.1f}, centred {centred:.1f}, of {min(features.shape)}"
