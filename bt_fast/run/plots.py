"""Plots of a run: a contact sheet of both views, and the curves of its metrics."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from bt_fast.run.directory import read_metrics
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD
from pipelines.common.atomic import atomic_file

# Axes that are logarithmic, if all values are positive.
_LOGARITHMIC = ("Barlow Twins loss", "on- and off-diagonal term (dashed); dots: held-out images")
_TERMS = {
    "on_diagonal": "-",
    "off_diagonal": "--",
    "probe_on_diagonal": "o",
    "probe_off_diagonal": "o",
}


def contact_sheet(views: torch.Tensor, path: Path) -> None:
    """Draw both views of up to 12 images: normalised [2 n, 3, H, W], view A first."""
    view_a, view_b = views.chunk(2)
    count = min(12, len(view_a))
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


def curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the curves of runs, {name: its metrics.jsonl}: loss and its terms, readouts of the
    features, rank, learning rate and images/s over epochs. Dotted: a readout before training.
    """
    figure = _figure(15, 7)
    axes = figure.subplots(2, 3).flat
    panels = [
        (_LOGARITHMIC[0], {"loss": "-"}, 1),
        (_LOGARITHMIC[1], _TERMS, 1),
        ("kNN and linear readout (dashed), %", {"knn_20": "-", "linear": "--"}, 100),
        ("effective rank of the features", {"rank": "-"}, 1),
        ("learning rate (weights)", {"lr_weights": "-"}, 1),
        ("images/s", {"images_per_s": "-"}, 1),
    ]
    records = {name: [r for _, r in read_metrics(metrics)] for name, metrics in runs.items()}
    for axis, (title, styles, factor) in zip(axes, panels, strict=True):
        for number, (name, of_run) in enumerate(records.items()):
            for key, style in styles.items():
                points = [
                    (record["epoch"], factor * record[key])
                    for record in of_run
                    if record.get(key) is not None
                ]
                if not points:
                    continue
                label = name if key == next(iter(styles)) else None
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
                if points[0][0] == 0 and style != "o":  # a probe
                    axis.axhline(points[0][1], color=f"C{number}", linestyle=":", linewidth=0.8)
        values = [value for line in axis.get_lines() for value in line.get_ydata()]
        if title in _LOGARITHMIC and min(values, default=0) > 0:
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center")
    _write(figure, path, dpi=110)


def _figure(width: float, height: float):
    """An empty figure, in inches. matplotlib is imported here: benchmarks run without it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure, path: Path, dpi: int) -> None:
    """Write a PNG atomically."""
    with atomic_file(path, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=dpi)
