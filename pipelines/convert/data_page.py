"""The report on a conversion as one HTML file, on both splits: what was found, with pictures."""

from collections.abc import Iterable
from contextlib import suppress

import numpy as np

import pipelines
from pipelines.common import html_report as html
from pipelines.convert.data_report import MAX_LISTED, Report, account, class_sizes
from pipelines.convert.findings import MARKS, groups, marked_images, note, sample

NUM_RANDOM, NUM_CLASSES = 16, 24  # pictures of the sheets
NUM_PAIRS, NUM_WORST = 8, 6


def draw(source: str, reports: dict[str, Report]) -> str:
    """The HTML of the report. Reads the pictures it shows from the output."""
    contents = {name: report.content({}) for name, report in reports.items()}
    lines = [text for report in reports.values() if (text := note(report))]
    lines = lines or ["nothing unusual was found"]
    for name, report in reports.items():
        lines += [report.summary(), account(contents[name])]
    sections = [
        html.section("Account", *map(html.paragraph, lines)),
        _overlaps(reports, contents),
        *(_duplicates(report, contents[name]) for name, report in reports.items()),
        *(_marked(report, contents[name]) for name, report in reports.items()),
        _classes(contents),
        *(_sides(report, contents[name]) for name, report in reports.items()),
        _channels(contents["train"]["channels"]),
        *(_formats(name, content) for name, content in contents.items()),
        *(_lists(name, content) for name, content in contents.items()),
        *map(_sheets, reports.values()),
        html.paragraph(f"bt-convert {pipelines.__version__}"),
    ]
    return html.page(f"Conversion of {source}", sections)


def _pictures(report: Report, indices: Iterable[int], captions: Iterable[str] = ()) -> str:
    """A sheet of stored images; captions default to their names."""
    indices = list(indices)
    captions = list(captions) or [*map(report.names(indices).__getitem__, indices)]
    pictures = []
    for index, caption in zip(indices, captions, strict=True):
        with suppress(ValueError):  # an image that conversion did not decode
            thumbnail = html.thumbnail(report.images.read(index))
            pictures.append(html.Picture(thumbnail, caption))
    return html.sheet(pictures)


def _some(count: int, what: str, listed: int) -> str:
    return f"{count:,} {what}" + (f", of which {listed:,} are listed" if listed < count else "")


def _group_names(group: dict) -> str:
    names, count = group["names"], group["num_images"]
    return ", ".join(names) + (f" and {count - len(names):,} more" if count > len(names) else "")


def _overlaps(reports: dict[str, Report], contents: dict[str, dict]) -> str:
    found = contents["train"].get("in_val")
    if not found or not found["num_images"]:
        return ""
    some = groups(reports["train"].overlaps)[:NUM_PAIRS]
    return html.section(
        f"Training images that are validation images: {found['num_images']:,}",
        html.paragraph("Their bytes are equal; bt-convert --drop overlap leaves them out."),
        _other_class(found),
        html.subheading("Training images"),
        _pictures(reports["train"], [group.members[0] for group in some]),
        html.subheading("Validation images"),
        _pictures(reports["val"], [group.original for group in some]),
        html.table(["in val", "in train"], [(g["val"], _group_names(g)) for g in found["groups"]]),
    )


def _duplicates(report: Report, content: dict) -> str:
    found = content["duplicates"]
    if not found["num_images"]:
        return ""
    some = groups(report.images.duplicates)[:NUM_PAIRS]
    advice = "; bt-convert --drop exact keeps the first." if report.name == "train" else "."
    rows = [(group["num_images"], _group_names(group)) for group in found["groups"]]
    return html.section(
        f"Exact duplicates in {report.name}: {found['num_images']:,} beside the first of each",
        html.paragraph(f"Their bytes are equal{advice}"),
        _other_class(found),
        _pictures(report, [i for group in some for i in (group.original, group.members[0])]),
        html.table(["images", "names"], rows),
    )


def _other_class(found: dict) -> str:
    count = found["num_of_other_class"]
    what = "Images whose class differs from that of the identical image"
    return html.paragraph(f"{what}: {count:,}.") if count else ""


def _marked(report: Report, content: dict) -> str:
    parts = []
    for kind, flag in MARKS.items():
        count, names = content[kind]["num_images"], content[kind]["names"]
        if count:
            parts += [
                html.subheading(_some(count, f"{kind} images", len(names))),
                _pictures(report, marked_images(report, flag)[1][:NUM_WORST]),
                html.paragraph(", ".join(names)),
            ]
    if count := content["not_decoded"]:
        parts.append(html.paragraph(f"Not known of {count:,} images, which were not decoded."))
    return html.section(f"Blank and grey images in {report.name}", *parts)


def _classes(contents: dict[str, dict]) -> str:
    names = contents["train"]["classes"]
    if not names:
        return ""
    counts = {split: content["samples_per_class"] for split, content in contents.items()}
    rows = list(zip(names, *counts.values(), strict=True))[:MAX_LISTED]
    return html.section(
        _some(len(names), "classes", len(rows)),
        *(html.paragraph(f"{split}: {class_sizes(names, c)}") for split, c in counts.items()),
        html.row(*(html.histogram(f"images of a class, {s}", np.array(counts[s])) for s in counts)),
        html.table(["class", *counts], rows),
        html.table(
            ["names that differ in case, spaces, _ and - only"],
            [[", ".join(alike)] for alike in contents["train"]["similar_classes"]],
        ),
    )


def _sides(report: Report, content: dict) -> str:
    height, width = (report.images.rows[side] for side in ("height", "width"))
    return html.section(
        f"Sides in {report.name}, as stored",
        html.table(
            ["side", "smallest", "median", "largest"],
            [
                [side, s["min"], round(s["median"]), s["max"]]
                for side, s in content["sides"].items()
            ],
        ),
        html.row(
            html.histogram("width in pixels", width),
            html.histogram("height in pixels", height),
            html.histogram("width / height, logarithmic", width / height, log=True),
        ),
    )


def _channels(found: dict) -> str:
    rows = [[what, *found[key]] for what, key in (("mean", "mean"), ("deviation", "std"))]
    return html.section(
        f"Channels of {found['num_images']:,} random training images, from 0 to 1",
        html.table(["", "red", "green", "blue"], rows),
    )


def _formats(name: str, content: dict) -> str:
    actions = {what: count for what, count in content["actions"].items() if what != "reencoded"}
    rows = [("plain JPEG", what, count) for what, count in sorted(actions.items())]
    rows += [(why, "encoded again", count) for why, count in sorted(content["reencoded"].items())]
    return html.section(f"Formats in {name}", html.table(["format", "stored", "images"], rows))


def _lists(name: str, content: dict) -> str:
    """Reasons why entries are not stored, and the images that were repaired, rejected, dropped."""
    parts = [html.table(["ignored", "entries"], sorted(content["ignored"].items()))]
    for key, total in (
        ("rejects", len(content["rejects"])),
        ("dropped", sum(content["dropped_by_reason"].values())),
        ("repairs", content["num_repairs"]),
    ):
        listed = content[key][:MAX_LISTED]  # of the rejects, which the JSON lists all
        parts += [
            html.subheading(_some(total, key, len(listed))) if total else "",
            html.table(["image", "reason"], [list(entry.values()) for entry in listed]),
        ]
    return html.section(f"Not stored or repaired in {name}", *parts)


def _sheets(report: Report) -> str:
    rows, is_train = report.images.rows, report.name == "train"
    some = sample(len(rows), NUM_RANDOM if is_train else NUM_RANDOM // 2)
    parts = [html.subheading("A random sample"), _pictures(report, some)]
    labels, firsts = np.unique(rows["label"], return_index=True)
    labels, firsts = labels[labels >= 0], firsts[labels >= 0]
    if is_train and len(labels):
        some = sample(len(labels), NUM_CLASSES)
        names = [report.manifest.class_names[label] for label in labels[some]]
        parts += [
            html.subheading("One of each class"),
            _pictures(report, firsts[some].tolist(), names),
        ]
    if is_train:
        height, width = rows["height"].astype(np.float64), rows["width"].astype(np.float64)
        for title, badness in (
            ("The most extreme aspect ratios", np.abs(np.log(width / height))),
            ("The smallest", -height * width),
        ):
            worst = np.argsort(-badness, kind="stable")[:NUM_WORST].tolist()
            parts += [html.subheading(title), _pictures(report, worst)]
    return html.section(f"Images of {report.name}", *parts)
