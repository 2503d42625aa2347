"""`bt-fast eval semi`: fine-tune everything on 1 % or 10 % of the labels (appendix B.2).

paper     20 epochs, encoder 0.002 and classifier 0.5, both x 0.2 after epochs 12 and 16, no decay
released  the same, but encoder 0.005 and a cosine: the command in the README of the authors' code

The published subsets (one file name per line) come from `--train-list`. Without one, each class
gives the same share of its images, drawn from the seed.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.options import Part, Subject, TrainedOptions, labelled, run_on_pair
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from bt_fast.evaluate.views import Images
from pipelines.order import epoch_order

_SUBSET_EPOCH = -3  # of `epoch_order`: an order that no training epoch has


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSemi(TrainedOptions):
    """Fine-tune the encoder on a part of the labels and classify the held-out images."""

    percent: float = 10
    """Share of the labels, the same in every class."""
    train_list: Path | None = None
    """File that names the labelled images instead, one per line, as the published subsets do."""
    protocol: Literal["paper", "released"] = "paper"
    """The paper's rates (0.002 / 0.5, in steps) or its code's (0.005 / 0.5, cosine)."""
    epochs: int = 20
    """Passes over the subset; the paper's steps are after 60 % and 80 % of them."""
    lr_encoder: float | None = None
    """Learning rate of the encoder. Default: the protocol's."""
    lr_head: float = 0.5
    """Learning rate of the classifier."""


def run_semi(options: EvalSemi, world: World = ALONE) -> int:
    """Print the accuracies; returns the exit status."""
    return run_on_pair("semi", options, measure_semi, world)


def measure_semi(
    options: EvalSemi, subject: Subject, train: Images, val: Images
) -> tuple[float, dict[str, str]]:
    """(top-1, rows of the table). The subject's encoder is changed."""
    if options.train_list is not None:
        samples, which = listed(train, options.train_list), f"those in {options.train_list}"
    else:
        samples = class_balanced(train.labels, options.percent, options.seed)
        which = f"{options.percent:g} % of every class"
    part, held_out = Part(images=train, samples=samples), labelled(val)
    released = options.protocol == "released"
    default_lr = 0.005 if released else 0.002
    protocol = Protocol(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr_head=options.lr_head,
        lr_encoder=default_lr if options.lr_encoder is None else options.lr_encoder,
        drops=() if released else (round(0.6 * options.epochs), round(0.8 * options.epochs)),
        factor=0.2,
        min_scale=options.smallest_crop(subject),
        seed=options.seed,
    )
    result = train_classifier(subject, "semi", part, held_out, protocol)
    return result["top1"], {
        "labels": f"{len(samples)} images, {which}",
        "protocol": f"{options.protocol}: encoder {protocol.lr_encoder:g},"
        f" classifier {protocol.lr_head:g}, {protocol.epochs} epochs",
        **accuracy_rows(result, held_out),
    }


def class_balanced(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """`percent` of every class's samples, at least one, drawn from the seed: int64 [n], sorted."""
    if not 0 < percent <= 100:
        raise ValueError(f"--percent must be in (0, 100], got {percent:g}")
    order = epoch_order(len(labels), seed, _SUBSET_EPOCH)
    chosen = []
    for label in np.unique(labels[labels >= 0]):
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(len(members) * percent / 100))])
    return np.sort(np.concatenate(chosen))


def listed(images: Images, file: Path) -> np.ndarray:
    """The samples that `file` names, one per line, by path or by a file name that is unique.

    Returns int64 [n], sorted. Raises ValueError if one of them is not among the images.
    """
    try:
        lines = {line.strip() for line in file.read_text().splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--train-list {file} cannot be read: {error}") from None
    found: dict[str, list[int]] = defaultdict(list)
    for index in range(len(images)):
        path = PurePosixPath(images.name(index))
        for name in {str(path), path.name}:
            found[name].append(index)
    unclear = sorted(line for line in lines if len(found.get(line, ())) != 1)
    if unclear or not lines:
        what = f"{len(unclear)} of its names, {unclear[0]} first," if unclear else "an empty list"
        raise ValueError(f"--train-list {file}: {what} cannot be found in {images.path}")
    samples = np.sort(np.array([found[line][0] for line in lines], np.int64))
    if (images.labels[samples] < 0).any():
        raise ValueError(f"--train-list {file}: it names images without a class")
    return samples
