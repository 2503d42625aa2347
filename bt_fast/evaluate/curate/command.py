"""`bt-fast curate`: what the features of an encoder say about a data set, and a subset of it.

    OUT/report.html     near duplicates, of held-out and training images first; outliers; clusters
    OUT/pairs.csv       both names and the cosine similarity of every pair of near duplicates
    OUT/outliers.csv    every image's mean similarity to its neighbours, the lowest first
    OUT/overlap.txt     training images with a near duplicate among the held-out ones,
                        for bt-convert --exclude
    OUT/keep.txt        with --by: the images of the subset, for bt-convert --include
    OUT/features/       features, which the next command reuses if encoder and images are the same

Similarities are cosines of whitened features, see `neighbours.Whitening`.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from bt_fast.distributed.collectives import World
from bt_fast.evaluate.curate import subsets
from bt_fast.evaluate.curate.clusters import ITERATIONS, cluster
from bt_fast.evaluate.curate.findings import Findings
from bt_fast.evaluate.curate.neighbours import Whitening, nearest
from bt_fast.evaluate.curate.report import write_report
from bt_fast.evaluate.embed import unlocked, write_csv, write_features
from bt_fast.evaluate.eval_setup import build_setup, open_splits
from bt_fast.evaluate.options import Curate
from bt_fast.run.console import print_summary
from pipelines.common.atomic import locked, write_text
from pipelines.common.console import progress
from pipelines.convert.filters import list_text
from pipelines.loading.datasets import ImageDataset

NEIGHBOURS = 10  # of every image
RESULTS = ("report.html", "pairs.csv", "outliers.csv", "overlap.txt", "keep.txt")


def run_curate(options: Curate, world: World) -> int:
    """Lock and write the folder; returns the exit status."""
    setup = build_setup(options, world=world)
    train, val = open_splits(options, setup.config)
    for images in (train, val):
        if images is not None and len(images) < 2:
            raise ValueError(f"{images.path} has fewer than two images")
    out = options.out or setup.folder.with_name("curate")
    count = round((options.fraction or 1.0) * len(train))
    if count < 2:
        raise ValueError(f"--fraction {options.fraction} keeps fewer than two images")
    _require_names(train)
    if world.is_first:
        for name in RESULTS:
            if (out / name).exists() and not options.overwrite:
                raise ValueError(
                    f"--out {out} holds a {name}; choose another folder, or replace it: --overwrite"
                )
        out.mkdir(parents=True, exist_ok=True)
    with unlocked(out), locked(out) if world.is_first else contextlib.nullcontext():
        splits = {"train": train} | ({} if val is None else {"val": val})
        folders = {name: out / "features" / name for name in splits}
        for name, images in splits.items():
            if world.is_first:
                folders[name].mkdir(parents=True, exist_ok=True)
            write_features(setup, images, folders[name])
        if not world.is_first:
            return 0
        features = {
            name: np.load(folder / "features.npy", mmap_mode="r")
            for name, folder in folders.items()
        }
        device = setup.runtime.device
        findings = examine(features["train"], features.get("val"), options, device)
        kept = _choose(options, count, features["train"], findings)
        for name in RESULTS:
            (out / name).unlink(missing_ok=True)
        _write_lists(out, train, val, findings, kept)
        write_report(out / "report.html", train, val, findings, kept, options)
    rows = {"encoder": setup.description, "data": f"{train.path}, {len(train):,} images"}
    rows |= findings.rows()
    if kept is not None:
        rows["kept"] = f"{len(kept):,} of {len(train):,} by {options.by}: {out / 'keep.txt'}"
    rows["report"] = str(out / "report.html")
    print_summary("bt-fast curate", rows)
    return 0


def examine(
    train: np.ndarray, val: np.ndarray | None, options: Curate, device: torch.device
) -> Findings:
    """Near duplicates, outliers and clusters of features, float32 [n, d] and [m, d]."""
    whitening = Whitening.of(train, device)
    pairs = {}
    if val is not None:
        with progress("held-out against training", len(val)) as advance:
            found = nearest(val, train, NEIGHBOURS, whitening, advance)
        pairs["across"] = _pairs(*found, options.threshold)
        with progress("held-out images", len(val)) as advance:
            found = nearest(val, val, NEIGHBOURS, whitening, advance)
        pairs["val"] = _pairs(*found, options.threshold, both_ways=True)
    with progress("training images", len(train)) as advance:
        found = nearest(train, train, NEIGHBOURS, whitening, advance)
    pairs["train"] = _pairs(*found, options.threshold, both_ways=True)
    number = options.clusters or round(len(train) ** 0.5)
    with progress("clustering", ITERATIONS * len(train)) as advance:
        clusters = cluster(train, number, whitening, seed=options.seed, advance=advance)
    return Findings(
        pairs=pairs,
        similarity_to_neighbours=found[0].mean(axis=1),
        clusters=clusters,
        whitening=whitening,
    )


def _pairs(
    similarities: np.ndarray, rows: np.ndarray, threshold: float, both_ways: bool = False
) -> np.ndarray:
    """Pairs of at least the threshold among nearest neighbours, the most similar first.

    both_ways: rows and columns are the same images; each pair is listed once.
    Returns [("first", int64), ("second", int64), ("similarity", float32)].
    """
    first, column = np.nonzero(similarities >= threshold)
    second = rows[first, column]
    pairs = np.empty(len(first), [("first", "i8"), ("second", "i8"), ("similarity", "f4")])
    pairs["first"], pairs["second"] = first, second
    pairs["similarity"] = similarities[first, column]
    if both_ways:
        low, high = np.minimum(first, second), np.maximum(first, second)
        pairs["first"], pairs["second"] = low, high
        pairs = pairs[np.unique(low * len(similarities) + high, return_index=True)[1]]
    return pairs[np.lexsort((pairs["second"], pairs["first"], -pairs["similarity"]))]


def _choose(
    options: Curate, count: int, features: np.ndarray, findings: Findings
) -> np.ndarray | None:
    """Sorted indices of the training images to keep; None without --by."""
    if options.by is None:
        return None
    if options.by == "random":
        return subsets.random_subset(len(features), count, options.seed)
    if options.by == "balanced":
        return subsets.balanced(findings.clusters, count, options.seed)
    with progress("redundancy", len(features)) as advance:
        redundancy = subsets.redundancy(features, findings.clusters, findings.whitening, advance)
    if options.fraction is None:
        return np.flatnonzero(redundancy < options.threshold)
    return subsets.least_redundant(redundancy, count)


def _require_names(images: ImageDataset) -> None:
    """Raise ValueError unless a list with a name on each line means these images."""
    names = {images.name(index) for index in range(len(images))}
    if len(names) < len(images):
        raise ValueError(f"{images.path}: several images have the same name, which a list needs")
    for name in names:
        if list_text([name]).splitlines() != [name] or name.startswith("#") or name != name.strip():
            raise ValueError(f"{images.path}: the name {name!r} does not fit into one line")


def _write_lists(
    out: Path,
    train: ImageDataset,
    val: ImageDataset | None,
    findings: Findings,
    kept: np.ndarray | None,
) -> None:
    def rows() -> Iterable[tuple]:
        sides = findings.sides(train, val)
        for kind, pairs in findings.pairs.items():
            ours, theirs = sides[kind]
            for first, second, similarity in pairs.tolist():
                yield kind, ours.name(first), theirs.name(second), f"{similarity:.4f}"

    write_csv(out / "pairs.csv", ("images", "first", "second", "similarity"), rows())
    order = np.argsort(findings.similarity_to_neighbours, kind="stable").tolist()
    values = findings.similarity_to_neighbours
    write_csv(
        out / "outliers.csv",
        ("name", "similarity"),
        ((train.name(index), f"{values[index]:.4f}") for index in order),
    )
    if val is not None:
        _write_names(out / "overlap.txt", train, findings.overlap())
    if kept is not None:
        _write_names(out / "keep.txt", train, kept)


def _write_names(path: Path, images: ImageDataset, indices: np.ndarray) -> None:
    write_text(path, list_text(map(images.name, indices.tolist())))
