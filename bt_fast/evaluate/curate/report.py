"""The pictures and tables of `bt-fast curate` as one HTML file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bt_fast.evaluate.curate.findings import KINDS, Findings
from bt_fast.evaluate.options import Curate
from pipelines.common import html_report
from pipelines.common.atomic import write_text
from pipelines.loading.datasets import ImageDataset

_NUM_SHOWN = 24  # pairs, outliers, images of the subset
_NUM_CLUSTERS, _NUM_OF_CLUSTER = 12, 8  # shown: the largest and the smallest, and images of each


def write_report(
    path: Path,
    train: ImageDataset,
    val: ImageDataset | None,
    findings: Findings,
    kept: np.ndarray | None,
    options: Curate,
) -> None:
    """Write the file, which opens offline. kept: sorted indices of the subset, if there is one."""
    page = html_report.page(
        f"Curation of {train.path}",
        [
            html_report.section("Summary", html_report.table((), _summary(train, val, findings))),
            *(_pairs(kind, train, val, findings, options.threshold) for kind in findings.pairs),
            _outliers(train, findings),
            _clusters(train, findings),
            _subset(train, findings, kept, options),
        ],
    )
    write_text(path, page, overwrite=True)


def _summary(
    train: ImageDataset, val: ImageDataset | None, findings: Findings
) -> Iterable[tuple[str, str]]:
    yield "training images", f"{len(train):,}"
    if val is not None:
        yield "held-out images", f"{len(val):,} in {val.path}"
    yield from findings.rows().items()


def _pairs(
    kind: str,
    train: ImageDataset,
    val: ImageDataset | None,
    findings: Findings,
    threshold: float,
) -> str:
    """The most similar pairs, then those nearest to the threshold, where errors would be."""
    pairs, (ours, theirs) = findings.pairs[kind], findings.sides(train, val)[kind]
    title = f"Near duplicates: {KINDS[kind]}"
    if not len(pairs):
        text = f"No two images have a similarity of {threshold:g}."
        return html_report.section(title, html_report.paragraph(text))
    text = (
        f"{len(pairs):,} pairs of a cosine similarity of at least {threshold:g}, among the"
        " nearest neighbours of each image. All of them are in pairs.csv."
    )
    chosen = {"The most similar": pairs[: _NUM_SHOWN // 2]}
    if len(pairs) > _NUM_SHOWN // 2:
        chosen["The least similar of them"] = pairs[_NUM_SHOWN // 2 :][-_NUM_SHOWN // 2 :]
    sheets = []
    for heading, some in chosen.items():
        pictures = []
        for first, second, similarity in some.tolist():
            pictures += _pictures(ours, [first], f"{similarity:.3f}")
            pictures += _pictures(theirs, [second], f"{similarity:.3f}")
        sheets += [html_report.subheading(heading), html_report.sheet(pictures)]
    return html_report.section(title, html_report.paragraph(text), *sheets)


def _outliers(train: ImageDataset, findings: Findings) -> str:
    values = findings.similarity_to_neighbours
    order = np.argsort(values, kind="stable")[:_NUM_SHOWN].tolist()
    pictures = [p for i in order for p in _pictures(train, [i], f"{values[i]:.3f}")]
    return html_report.section(
        "Outliers",
        html_report.paragraph(
            "Training images with the smallest mean similarity to their nearest neighbours. All"
            " images are in outliers.csv."
        ),
        html_report.row(html_report.histogram("similarity to the nearest neighbours", values)),
        html_report.sheet(pictures),
    )


def _clusters(train: ImageDataset, findings: Findings) -> str:
    clusters = findings.clusters
    order = np.argsort(-clusters.sizes, kind="stable")
    order = order[clusters.sizes[order] > 0]
    shown = {"largest": order[:_NUM_CLUSTERS], "smallest": order[_NUM_CLUSTERS:][-_NUM_CLUSTERS:]}
    parts = [html_report.row(html_report.histogram("images of a cluster", clusters.sizes))]
    for heading, numbers in shown.items():
        for number in numbers.tolist():
            members = np.flatnonzero(clusters.assignment == number)
            typical = members[np.argsort(-clusters.similarity[members], kind="stable")]
            parts += [
                html_report.subheading(f"Among the {heading}: {len(members):,} images"),
                html_report.sheet(_pictures(train, typical[:_NUM_OF_CLUSTER].tolist())),
            ]
    text = f"{len(order):,} clusters of similar training images, each with its most typical ones."
    return html_report.section("Clusters", html_report.paragraph(text), *parts)


def _subset(
    train: ImageDataset, findings: Findings, kept: np.ndarray | None, options: Curate
) -> str:
    if kept is None:
        return ""
    dropped = np.setdiff1d(np.arange(len(train)), kept)
    rows = [("kept", len(kept)), ("dropped", len(dropped))]
    parts = [html_report.table(("images", "number"), rows)]
    names = train.class_names or []
    if names:
        before, after = (
            np.bincount(labels[labels >= 0], minlength=len(names))
            for labels in (train.labels, train.labels[kept])
        )
        counts = zip(names, before.tolist(), after.tolist(), strict=True)
        parts.append(html_report.table(("class", "images", "kept"), counts))
    for heading, some in (("kept", kept), ("dropped", dropped)):
        step = max(len(some) // _NUM_SHOWN, 1)
        pictures = _pictures(train, some[::step][:_NUM_SHOWN].tolist())
        if pictures:
            parts += [
                html_report.subheading(f"Some that are {heading}"),
                html_report.sheet(pictures),
            ]
    return html_report.section(f"Subset: {options.by}", *parts)


def _pictures(
    images: ImageDataset, indices: Iterable[int], note: str = ""
) -> list[html_report.Picture]:
    """Thumbnails with the images' names; an image without a JPEG, as FFCV may store, has none."""
    return [
        html_report.Picture(
            html_report.thumbnail(images.image(index).tobytes()),
            f"{note} {images.name(index)}".strip(),
        )
        for index in indices
        if not images.is_raw(index)
    ]
