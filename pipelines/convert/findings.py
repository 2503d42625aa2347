"""What the stored images of a split show: duplicates, blank and grey images, sides, channels.

Everything is computed once, when a split is complete, from `ImageTable` and from a few images that
are read again from the output. Lists are of the first `MAX_LISTED`, and state the total.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from pipelines.convert.data_report import MAX_LISTED, Report
from pipelines.convert.image_table import BLANK, DECODED, GREY

MAX_OF_GROUP = 10  # names of identical images that are listed
IMAGES_PER_SAMPLE, MIN_SAMPLE, MAX_SAMPLE = 256, 16, 512  # of the channels' statistics
SAMPLE_SIDE = 256  # at most so many of an image's rows or columns
SEED = 0
MARKS = {"blank": BLANK, "grey": GREY}


class Group(NamedTuple):
    """Images that are identical to `original`, and their number without it."""

    num_members: int
    members: list[int]  # indices of the first of them
    original: int  # an index too, of another split for overlaps


def find(report: Report, val: Report | None = None) -> dict:
    """The findings on a split, for JSON. val: the report on the validation images."""
    table, rows = report.images, report.images.rows
    copies, overlaps = groups(table.duplicates), groups(report.overlaps)
    marked = {kind: marked_images(report, flag) for kind, flag in MARKS.items()}
    indices = [i for group in (*copies, *overlaps) for i in group.members]
    indices += [group.original for group in copies]
    names = report.names(indices + [i for _, listed in marked.values() for i in listed])
    findings = {"duplicates": _counts(table.duplicates, rows, rows)}
    findings["duplicates"]["groups"] = [
        {"num_images": g.num_members + 1, "names": [names[i] for i in (g.original, *g.members)]}
        for g in copies
    ]
    if val is not None:
        names_in_val = val.names(g.original for g in overlaps)
        findings["in_val"] = _counts(report.overlaps, rows, val.images.rows)
        findings["in_val"]["groups"] = [
            {
                "num_images": g.num_members,
                "val": names_in_val[g.original],
                "names": [names[i] for i in g.members],
            }
            for g in overlaps
        ]
    for kind, (count, listed) in marked.items():
        findings[kind] = {"num_images": count, "names": [names[i] for i in listed]}
    if report.name == "train":
        findings["channels"] = _channels(report)
    return findings | {
        "not_decoded": int((rows["flags"] & DECODED == 0).sum()),
        "similar_classes": similar(report.manifest.class_names),
        "sides": {side: _spread(rows[side]) for side in ("height", "width")},
    }


def marked_images(report: Report, flag: int) -> tuple[int, list[int]]:
    """The number of images with this flag, and the indices of the first of them."""
    found = np.flatnonzero(report.images.rows["flags"] & flag)
    return len(found), found[:MAX_LISTED].tolist()


def groups(pairs: Iterable[int]) -> list[Group]:
    """The first groups of identical images of pairs (index, index of the image it equals)."""
    table = np.asarray(pairs, np.int64).reshape(-1, 2)
    members, originals = table[np.argsort(table[:, 1], kind="stable")].T
    columns = np.unique(originals, return_index=True, return_counts=True)
    return [
        Group(count, members[start : start + min(count, MAX_OF_GROUP)].tolist(), original)
        for original, start, count in zip(*(c[:MAX_LISTED].tolist() for c in columns), strict=True)
    ]


def _counts(pairs: Iterable[int], rows: np.ndarray, others: np.ndarray) -> dict:
    """The number of pairs of identical images, and of those whose classes differ."""
    table = np.asarray(pairs, np.int64).reshape(-1, 2)
    differ = rows["label"][table[:, 0]] != others["label"][table[:, 1]]
    return {"num_images": len(table), "num_of_other_class": int(differ.sum())}


def similar(class_names: list[str]) -> list[list[str]]:
    """Classes whose names differ in case, spaces, _ and - only: perhaps one class."""
    found = defaultdict(list)
    for name in class_names:
        if key := re.sub(r"[\s_-]", "", name).casefold():
            found[key].append(name)
    return [names for names in found.values() if len(names) > 1][:MAX_LISTED]


def sample(num_images: int, count: int) -> list[int]:
    """Sorted indices of at most `count` random images, the same for equal arguments."""
    chosen = np.random.default_rng(SEED).choice(num_images, min(count, num_images), replace=False)
    return sorted(chosen.tolist())


def _spread(values: np.ndarray) -> dict:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def _channels(report: Report) -> dict:
    """Mean and standard deviation of red, green and blue in [0, 1], over a sample of images."""
    num_images = len(report.images)
    counts, num_decoded = np.zeros((3, 256), np.int64), 0
    count = min(max(num_images // IMAGES_PER_SAMPLE, MIN_SAMPLE), MAX_SAMPLE)
    for index in sample(num_images, count):
        with suppress(ValueError):  # of images that conversion did not decode
            pixels = simplejpeg.decode_jpeg(report.images.read(index), "RGB", strict=False)
            step = min(pixels.shape[:2]) // SAMPLE_SIDE + 1
            some = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step]))
            counts += np.reshape(some.histogram(), (3, 256))
            num_decoded += 1
    values, num_pixels = np.arange(256) / 255, max(counts[0].sum(), 1)
    mean = counts @ values / num_pixels
    variance = counts @ values**2 / num_pixels - mean**2
    deviation = np.sqrt(variance.clip(0))  # of one colour, it may be rounded below 0
    return {
        "num_images": num_decoded,
        "mean": mean.round(4).tolist(),
        "std": deviation.round(4).tolist(),
    }


def note(report: Report) -> str:
    """What is to be looked at, as one line; empty if there is nothing."""
    found = report.findings
    counts = {
        "also in val": found.get("in_val", {"num_images": 0})["num_images"],
        "exact duplicates": found["duplicates"]["num_images"],
        "duplicates of another class": found["duplicates"]["num_of_other_class"],
        "blank": found["blank"]["num_images"],
        "grey": found["grey"]["num_images"],
        "pairs of similar class names": len(found["similar_classes"]),
    }
    texts = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"{report.name}: {', '.join(texts)}" if texts else ""
