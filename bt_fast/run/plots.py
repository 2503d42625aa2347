"""Plots of a run: a contact sheet of both views, and the curves of its metrics."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bt_fast.run.directory import read_metrics
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD
from pipelines.common.atomic import atomic_file

# Title, {key of the metrics: (style, its name in a legend)}, factor.
_PANELS = (
    ("Barlow Twins loss", {"loss": ("-", "")}, 1),
    (
        "terms of the loss",
        {
            "on_diagonal": ("-", "on-diagonal"),
            "off_diagonal": ("--", "off-diagonal"),
            "probe_on_diagonal": ("o", "on-diagonal, probe (running statistics)"),
            "probe_off_diagonal": ("x", "off-diagonal, probe (running statistics)"),
        },
        1,
    ),
    ("readouts, %", {"knn_20": ("-", "kNN, k = 20"), "linear": ("--", "linear")}, 100),
    ("effective rank of the features", {"rank": ("-", "in probes")}, 1),
    ("learning rate (weights)", {"lr_weights": ("-", "")}, 1),
    ("images/s", {"images_per_s": ("-", "")}, 1),
)
_LOGARITHMIC = ("Barlow Twins loss", "terms of the loss")  # if all values are positive


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


def curves(runs: Mapping[str, Sequence[Path]], path: Path) -> None:
    """Draw the curves of runs over epochs; panels without values are left out, and a picture
    without any.

    runs: {name: the metrics.jsonl of one run, or of several, which have the same colour}.
    """
    records = {name: [_records(file) for file in files] for name, files in runs.items()}
    logged = {key for each in records.values() for run in each for r in run for key in r}
    panels = [panel for panel in _PANELS if logged & panel[1].keys()]
    if not panels:
        path.unlink(missing_ok=True)
        return
    columns = -(-len(panels) // 2)
    figure = _figure(5 * columns, 7)
    axes = figure.subplots(2, columns, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (title, styles, factor) in zip(axes, panels, strict=False):
        named, starts = {}, False  # styles for the legend, and whether a line marks the start
        for number, each in enumerate(records.values()):
            color = f"C{number}"
            for (key, (style, name)), run in itertools.product(styles.items(), each):
                points = [(r["epoch"], factor * r[key]) for r in run if key in r]
                if not points:
                    continue
                named[name] = style
                axis.plot(*zip(*points, strict=True), style, color=color)
                if points[0][0] == 0 and style in ("-", "--"):  # a probe
                    axis.axhline(points[0][1], color=color, linestyle=":", linewidth=0.8)
                    starts = True
        if starts:
            named["before training"] = ":"
        values = [value for line in axis.get_lines() for value in line.get_ydata()]
        if title in _LOGARITHMIC and min(values, default=0) > 0:
            axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if len(named) > 1:
            lines = [axis.plot([], [], style, color="grey")[0] for style in named.values()]
            axis.legend(lines, named, fontsize="small")
    if len(runs) > 1:
        lines = [axis.plot([], [], color=f"C{number}")[0] for number in range(len(runs))]
        figure.legend(lines, runs, loc="outside lower center")
    _write(figure, path, dpi=110)


def _records(metrics: Path) -> list[dict]:
    """The records of a metrics.jsonl, without values that were not finite."""
    return [{k: v for k, v in r.items() if v is not None} for _, r in read_metrics(metrics)]


def _figure(width: float, height: float):
    """An empty figure, in inches. matplotlib is imported here: benchmarks run without it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _write(figure, path: Path, dpi: int) -> None:
    """Write a PNG atomically."""
    with atomic_file(path, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=dpi)
