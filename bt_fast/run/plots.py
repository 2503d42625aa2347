"""Plots of a run: a contact sheet of both views, and the curves of its metrics."""

from pathlib import Path

import numpy as np
import torch

from bt_fast.run.directory import read_metrics
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD
from pipelines.common.atomic import atomic_file


def contact_sheet(views: torch.Tensor, path: Path, count: int = 12) -> None:
    """Draw both views of some images: normalised [2 n, 3, H, W], view A first."""
    view_a, view_b = views.chunk(2)
    count = min(count, len(view_a))
    figure = _figure(1.3 * count, 3.1)
    axes = figure.subplots(2, count, squeeze=False)
    for row, (name, view) in enumerate((("view A", view_a), ("view B", view_b))):
        for column in range(count):
            axis = axes[row][column]
            axis.imshow(_pixels(view[column]), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(name)
    _write(figure, path, dpi=120)


def _pixels(view: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: [3, H, W] -> uint8 [H, W, 3]."""
    values = view.detach().float().cpu().permute(1, 2, 0).numpy()
    values = (values * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)) * 255
    return np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)


def curves(metrics: Path, path: Path) -> None:
    """Draw the curves of a metrics.jsonl: loss and its terms, kNN, learning rate and images/s."""
    records = [record for _, record in read_metrics(metrics)]
    train = [record for record in records if record["kind"] == "train"]
    probe = [record for record in records if record["kind"] == "probe"]
    if not train:
        return
    epochs = [record["epoch"] for record in train]
    panels = 4 if probe else 3
    figure = _figure(4 * panels, 3.6)
    axes = figure.subplots(1, panels)
    loss, rate, speed = axes[0], axes[-2], axes[-1]

    _terms(loss, train, {"loss": "loss", "on_diagonal": "on-diagonal"})
    twin = loss.twinx()
    _terms(twin, train, {"off_diagonal": "off-diagonal"}, color="C2")
    twin.set_ylabel("off-diagonal", color="C2")
    loss.legend()
    loss.set_title("Barlow Twins loss")

    for name in sorted({key for record in probe for key in record if key.startswith("knn_")}):
        values = [100 * record[name] for record in probe]
        label = f"k = {name.removeprefix('knn_')}"
        axes[1].plot([record["epoch"] for record in probe], values, marker="o", label=label)
        axes[1].legend()
        axes[1].set_title("kNN accuracy, %")

    rate.plot(epochs, [record["lr_weights"] for record in train])
    rate.set_title("learning rate (weights)")
    speed.plot(epochs, [record["images_per_s"] for record in train])
    speed.set_ylim(bottom=0)
    speed.set_title("images/s")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    _write(figure, path, dpi=110)


def _terms(axis, train: list[dict], labels: dict[str, str], **style) -> None:
    """Plot terms of the loss, on a logarithmic axis if all values are positive."""
    lines = {name: [record[name] for record in train] for name in labels}
    for name, values in lines.items():
        axis.plot([record["epoch"] for record in train], values, label=labels[name], **style)
    if all(value is None or value > 0 for values in lines.values() for value in values):
        axis.set_yscale("log")


def _figure(width: float, height: float):
    """An empty figure, in inches. matplotlib is imported here: benchmarks run without it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure, path: Path, dpi: int) -> None:
    """Write a PNG atomically."""
    with atomic_file(path, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=dpi)
