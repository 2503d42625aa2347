"""The report on a conversion as one HTML file, on both splits: what was found, with pictures."""

from collections.abc import Iterable
from contextlib import suppress

import numpy as np

import pipelines
from pipelines.common import html_report as html
from pipelines.convert.data_report import MAX_LISTED, Report, account
from pipelines.convert.findings import MARKS, groups, marked_images, note, sample

MAX_CLASSES = 1000  # that have a bar
NUM_RANDOM, NUM_CLASSES = 16, 24  # pictures of the sheets
NUM_PAIRS, NUM_WORST = 8, 6


def draw(source: str, reports: dict[str, Report]) -> str:
    """The HTML of the report. Reads the pictures it shows from the output."""
    contents = {name: report.content({}) for name, report in reports.items()}
    notes = [text for report in reports.values() if (text := note(report))]
    sections = [
        html.section(
            "Account",
            *(html.paragraph(text) for text in notes or ["nothing unusual was found"]),
            html.table(
                ["split", "found", "stored", "rejected", "ignored", "classes", "MB"],
                [
                    [
                        name,
                        content["found"],
                        content["num_images"],
                        len(content["rejects"]),
                        sum(content["ignored"].values()),
                        content["num_classes"],
                        round(content["bytes_out"] / 1e6),
                    ]
                    for name, content in contents.items()
                ],
            ),
            *(html.paragraph(account(content)) for content in contents.values()),
        ),
        _overlaps(reports, contents),
        *(_duplicates(report, contents[name]) for name, report in reports.items()),
        *(_marked(report, contents[name]) for name, report in reports.items()),
        _classes(contents),
        *(_sides(report, contents[name]) for name, report in reports.items()),
        _channels(contents["train"]["channels"]),
        *(_formats(name, content) for name, content in contents.items()),
        *(_lists(name, content) for name, content in contents.items()),
        *(_sheets(report) for report in reports.values()),
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


def _group_names(names: list[str], count: int) -> str:
    return ", ".join(names) + (f" and {count - len(names):,} more" if count > len(names) else "")


def _overlaps(reports: dict[str, Report], contents: dict[str, dict]) -> str:
    found = contents["train"].get("in_val")
    if not found or not found["num_images"]:
        return ""
    report, val = reports["train"], reports["val"]
    pairs = [(g.members[0], g.original) for g in groups(report.overlaps)[:NUM_PAIRS]]
    rows = [(g["val"], _group_names(g["names"], g["num_images"])) for g in found["groups"]]
    return html.section(
        f"Training images that are validation images: {found['num_images']:,}",
        html.paragraph("Their bytes are equal; bt-convert --drop overlap leaves them out."),
        _other_class(found),
        html.subheading("Training images"),
        _pictures(report, [index for index, _ in pairs]),
        html.subheading("Validation images"),
        _pictures(val, [index for _, index in pairs]),
        html.table(["in val", "in train"], rows),
    )


def _duplicates(report: Report, content: dict) -> str:
    found = content["duplicates"]
    if not found["num_images"]:
        return ""
    pairs = [
        i for g in groups(report.images.duplicates)[:NUM_PAIRS] for i in (g.original, g.members[0])
    ]
    rows = [(g["num_images"], _group_names(g["names"], g["num_images"])) for g in found["groups"]]
    return html.section(
        f"Exact duplicates in {report.name}: {found['num_images']:,} beside the first of each",
        html.paragraph(
            "Their bytes are equal"
            + ("; bt-convert --drop exact keeps the first." if report.name == "train" else ".")
        ),
        _other_class(found),
        _pictures(report, pairs),
        html.table(["images", "names"], rows),
    )


def _other_class(found: dict) -> str:
    count = found["num_of_other_class"]
    what = "Images whose class differs from that of the identical image"
    return html.paragraph(f"{what}: {count:,}.") if count else ""


def _marked(report: Report, content: dict) -> str:
    parts = []
    for kind, flag in MARKS.items():
        if count := content[kind]["num_images"]:
            names = content[kind]["names"]
            indices = marked_images(report, flag)[1][:NUM_WORST]
            parts += [
                html.subheading(_some(count, f"{kind} images", len(names))),
                _pictures(report, indices),
                html.paragraph(", ".join(names)),
            ]
    if count := content["not_decoded"]:
        parts.append(html.paragraph(f"Not known of {count:,} images, which were not decoded."))
    return html.section(f"Blank and grey images in {report.name}", *parts)


def _classes(contents: dict[str, dict]) -> str:
    names = contents["train"]["classes"]
    parts = []
    for split, content in contents.items() if names else ():
        counts = content["samples_per_class"]
        smallest, largest = (names[counts.index(value)] for value in (min(counts), max(counts)))
        parts += [
            html.subheading(
                f"{split}: {min(counts):,} images ({smallest}) to {max(counts):,} ({largest}),"
                f" median {float(np.median(counts)):,.0f}"
            ),
            html.bars(list(zip(names, counts, strict=True))[:MAX_CLASSES]),
        ]
    if len(names) > MAX_CLASSES:
        parts.append(html.paragraph(f"The first {MAX_CLASSES:,} of {len(names):,} classes."))
    if alike := contents["train"]["similar_classes"]:
        parts.append(html.subheading("Names of classes that differ in case or spaces only"))
        parts.append(html.table(["classes"], [[", ".join(group)] for group in alike]))
    return html.section("Classes", *parts)


def _sides(report: Report, content: dict) -> str:
    height, width = (report.images.rows[side] for side in ("height", "width"))
    sides = content["sides"]
    return html.section(
        f"Sides in {report.name}, as stored",
        html.table(
            ["side", "smallest", "median", "largest"],
            [[side, s["min"], round(s["median"]), s["max"]] for side, s in sides.items()],
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
    num_dropped = sum(content["dropped_by_reason"].values())
    for key, total in (
        ("rejects", len(content["rejects"])),
        ("dropped", num_dropped),
        ("repairs", content["num_repairs"]),
    ):
        listed = content[key][:MAX_LISTED]  # of the rejects, which the JSON lists all
        parts += [
            html.subheading(_some(total, key, len(listed))) if total else "",
            html.table(["image", "reason"], [list(entry.values()) for entry in listed]),
        ]
    return html.section(f"Not stored or repaired in {name}", *parts)


def _sheets(report: Report) -> str:
    rows, names = report.images.rows, report.manifest.class_names
    labels, firsts = np.unique(rows["label"], return_index=True)
    labels, firsts = labels[labels >= 0], firsts[labels >= 0]
    some = [labels[i] for i in sample(len(labels), NUM_CLASSES)] if len(labels) else []
    per_class = {names[label]: int(firsts[np.searchsorted(labels, label)]) for label in some}
    area = rows["height"].astype(np.uint32) * rows["width"]
    ratio = np.abs(np.log(rows["width"] / rows["height"]))
    smallest = np.argsort(area, kind="stable")[:NUM_WORST].tolist()
    extreme = np.argsort(-ratio, kind="stable")[:NUM_WORST].tolist()
    parts = [
        html.subheading("A random sample"),
        _pictures(report, sample(len(rows), NUM_RANDOM // (1 if report.name == "train" else 2))),
    ]
    if report.name == "train":
        parts += [
            html.subheading("One of each class") if per_class else "",
            _pictures(report, per_class.values(), per_class),
            html.subheading("The most extreme aspect ratios"),
            _pictures(report, extreme),
            html.subheading("The smallest"),
            _pictures(report, smallest),
        ]
    return html.section(f"Images of {report.name}", *parts)
