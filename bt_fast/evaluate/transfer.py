"""`bt-fast eval transfer`: the frozen encoder on other data sets (appendix C.1).

Places-205 and iNaturalist 2018: a linear classifier, 14 and 84 epochs, learning rate 0.01, divided
by 10 at two equally spaced points, weight decay 5e-4. VOC07: linear SVMs, see `voc07.py`. The
protocol of Places-205 applies to any other data set, a .beton or a folder of class folders.
"""

from bt_fast.distributed.collectives import World
from bt_fast.evaluate.eval_setup import EvalSetup, build_setup, open_labelled_splits
from bt_fast.evaluate.options import EvalTransfer
from bt_fast.evaluate.overlap import warn_of_overlap
from bt_fast.evaluate.subset import count_classes, labelled_subset
from bt_fast.evaluate.supervised import Protocol, accuracy_rows, train_classifier
from bt_fast.evaluate.transfer_datasets import inat18, places205
from bt_fast.evaluate.voc07 import measure_voc
from bt_fast.run.console import print_summary
from pipelines.common.console import plural


def run_transfer(options: EvalTransfer, world: World) -> int:
    """Print the accuracies; returns the exit status."""
    if options.data is None:
        raise ValueError("--data is required: the folder of the data set to transfer to")
    if not options.data.exists():
        raise ValueError(f"--data {options.data} does not exist")
    if options.dataset != "folder" and options.val_data is not None:
        raise ValueError(f"--val-data: {options.dataset} has its own held-out images; leave it out")
    setup = build_setup(options, world=world)
    rows = {"encoder": setup.description, "data": f"{options.dataset}, {options.data}"}
    if options.dataset == "voc07":
        result = measure_voc(setup, options.data)
        for name, class_result in result["classes"].items():
            rows[name] = f"{100 * class_result['ap']:.2f} %"
        rows["mean average precision"] = f"{100 * result['map']:.2f} %"
    else:
        rows |= _classify(options, setup)
    print_summary("bt-fast eval transfer", rows)
    return 0


def _classify(options: EvalTransfer, setup: EvalSetup) -> dict[str, str]:
    """Train and test a linear classifier; returns rows of the table."""
    assert options.data is not None
    if options.dataset == "folder":
        train, val = open_labelled_splits(options, setup.config)
    elif options.dataset == "places205":
        train, val = places205(options.data)
    else:
        train, val = inat18(options.data)
    if setup.world.is_first:
        warn_of_overlap(train, val)
    epochs = options.epochs or (84 if options.dataset == "inat18" else 14)
    protocol = Protocol(
        epochs=epochs,
        batch_size=options.batch_size,
        lr_head=options.lr,
        weight_decay=options.weight_decay,
        drops=(max(1, round(epochs / 3)), max(1, round(2 * epochs / 3))),
        factor=0.1,
        min_scale=options.min_scale,
        seed=options.seed,
    )
    train_subset, val_subset = labelled_subset(train), labelled_subset(val)
    name = f"transfer-{options.dataset}"
    result = train_classifier(setup, name, train_subset, val_subset, protocol)
    return {
        "images": f"{len(train_subset)}, {count_classes(train_subset, val_subset)} classes",
        "protocol": f"lr {options.lr:g}, wd {options.weight_decay:g}, {plural(epochs, 'epoch')}",
        **accuracy_rows(result, train_subset, val_subset),
    }
