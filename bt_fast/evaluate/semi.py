"""`bt-fast eval semi`: fine-tune everything on 1 % or 10 % of the labels (appendix B.2).

paper     20 epochs, encoder 0.002 and classifier 0.5, both x 0.2 after epochs 12 and 16, no decay
released  the same, but encoder 0.005 and a cosine: the command in the README of the authors' code

The published subsets (one file name per line) are given by `--train-list`. Without it, the same
percentage of every class is drawn from the seed.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from bt_fast.distributed.collectives import World
from bt_fast.evaluate.eval_setup import EvalSetup, run_protocol
from bt_fast.evaluate.options import EvalSemi
from bt_fast.evaluate.subset import Subset, labelled_subset
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from pipelines.common.console import plural
from pipelines.loading.datasets import ImageDataset
from pipelines.order import epoch_order

_SUBSET_EPOCH = -3  # `epoch_order`'s epoch for the subset: no training epoch has this order


def run_semi(options: EvalSemi, world: World) -> int:
    """Print the accuracies; returns the exit status."""
    return run_protocol("semi", options, measure_semi, world)


def measure_semi(
    options: EvalSemi, setup: EvalSetup, train: ImageDataset, val: ImageDataset
) -> tuple[float, dict[str, str]]:
    """(top-1, rows of the table). Changes the encoder."""
    if options.train_list is not None:
        samples = listed_samples(train, options.train_list)
        selection = f"those in {options.train_list}"
    else:
        samples = class_balanced(train.labels, options.percent, options.seed)
        selection = f"{options.percent:g} % of every class"
    train_subset, val_subset = Subset(train, samples), labelled_subset(val)
    released = options.protocol == "released"
    default_lr = 0.005 if released else 0.002
    protocol = Protocol(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr_head=options.lr_head,
        lr_encoder=default_lr if options.lr_encoder is None else options.lr_encoder,
        drops=() if released else (round(0.6 * options.epochs), round(0.8 * options.epochs)),
        factor=0.2,
        min_scale=setup.min_scale if options.min_scale is None else options.min_scale,
        seed=options.seed,
    )
    result = train_classifier(setup, "semi", train_subset, val_subset, protocol)
    return result["top1"], {
        "labels": f"{len(samples)} images, {selection}",
        "protocol": f"{options.protocol}: encoder {protocol.lr_encoder:g},"
        f" classifier {protocol.lr_head:g}, {plural(protocol.epochs, 'epoch')}",
        **accuracy_rows(result, train_subset, val_subset),
    }


def class_balanced(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """`percent` of every class's samples, at least one, drawn from the seed: int64 [n], sorted."""
    order = epoch_order(len(labels), seed, _SUBSET_EPOCH)
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(len(members) * percent / 100))])
    return np.sort(np.concatenate(chosen))


def listed_samples(images: ImageDataset, file: Path) -> np.ndarray:
    """The samples named in `file`, one per line, by path or unique file name: int64 [n], sorted.

    Raises ValueError if a name does not belong to exactly one image.
    """
    try:
        lines = {line.strip() for line in file.read_text().splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--train-list {file} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"--train-list {file} is empty")
    indices: dict[str, list[int]] = defaultdict(list)  # of the images with this name
    for index in range(len(images)):
        path = PurePosixPath(images.name(index))
        for name in {str(path), path.name}:
            indices[name].append(index)
    unresolved = sorted(line for line in lines if len(indices.get(line, ())) != 1)
    if unresolved:
        raise ValueError(
            f"--train-list {file}: {len(unresolved)} of its names (first: {unresolved[0]}) do not"
            f" belong to exactly one image of {images.path}"
        )
    samples = np.sort(np.array([indices[line][0] for line in lines], np.int64))
    if (images.labels[samples] < 0).any():
        raise ValueError(f"--train-list {file}: some of its images have no class")
    return samples
