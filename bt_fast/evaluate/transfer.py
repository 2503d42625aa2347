"""`bt-fast eval transfer`: the frozen encoder on other data sets (appendix C.1).

Places-205 and iNaturalist 2018: a linear classifier, 14 and 84 epochs, learning rate 0.01, divided
by 10 at two equally spaced points, weight decay 5e-4. VOC07: linear SVMs, see `voc.py`. Any other
data set, a .beton or a folder of class folders, by the protocol of Places-205.
"""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.options import EvalOptions, labelled, open_pair, open_subject
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from bt_fast.evaluate.transfer_datasets import inat18, places205
from bt_fast.evaluate.voc07 import measure_voc
from bt_fast.run.console import summary_table

_EPOCHS = {"places205": 14, "inat18": 84, "folder": 14}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalTransfer(EvalOptions):
    """Measure the frozen encoder on another data set."""

    dataset: Literal["places205", "inat18", "voc07", "folder"] = "folder"
    """What --data holds, in its published layout; folder: class folders, or a .beton."""
    epochs: int | None = None
    """Passes over the images. Default: 84 for inat18, else 14."""
    batch_size: int = 256
    """Images per step."""
    lr: float = 0.01
    """Learning rate of the classifier, divided by 10 after a third and two thirds."""
    weight_decay: float = 5e-4
    """On weights and bias."""
    min_scale: float = 0.08
    """Smallest random crop, share of the image's area."""
    seed: int = 0
    """Of the classifier's start, the order and the crops."""


def run_transfer(options: EvalTransfer, world: World = ALONE) -> int:
    """Print the accuracies; returns the exit status."""
    if options.data is None:
        raise ValueError("--data is needed: the folder of the data set to transfer to")
    if not options.data.exists():
        raise ValueError(f"--data {options.data} does not exist")
    if options.dataset != "folder" and options.val_data is not None:
        raise ValueError(f"--val-data: {options.dataset} has its own held-out images; leave it out")
    subject = open_subject(options, world=world)
    rows = {"encoder": subject.description, "data": f"{options.dataset}, {options.data}"}
    if options.dataset == "voc07":
        found = measure_voc(subject, options.data)
        rows |= {name: f"{100 * one['ap']:.2f} %" for name, one in found["classes"].items()}
        rows["mean average precision"] = f"{100 * found['map']:.2f} %"
    else:
        rows |= _classify(options, subject)
    Console(soft_wrap=True).print(summary_table("bt-fast eval transfer", rows))
    return 0


def _classify(options: EvalTransfer, subject) -> dict[str, str]:
    """Rows of a linear classifier's accuracies."""
    assert options.data is not None
    if options.dataset == "folder":
        train, val = open_pair(options, subject)
    else:
        train, val = {"places205": places205, "inat18": inat18}[options.dataset](options.data)
    epochs = _EPOCHS[options.dataset] if options.epochs is None else options.epochs
    protocol = Protocol(
        epochs=epochs,
        batch_size=options.batch_size,
        lr_head=options.lr,
        weight_decay=options.weight_decay,
        drops=tuple(max(1, round(part * epochs / 3)) for part in (1, 2)),
        factor=0.1,
        min_scale=options.min_scale,
        seed=options.seed,
    )
    name = f"transfer-{options.dataset}"
    part, held_out = labelled(train), labelled(val)
    result = train_classifier(subject, name, part, held_out, protocol)
    return {
        "images": f"{len(part)}, {max(train.num_classes, val.num_classes)} classes",
        "protocol": f"lr {options.lr:g}, wd {options.weight_decay:g}, {epochs} epochs",
        **accuracy_rows(result, held_out),
    }
