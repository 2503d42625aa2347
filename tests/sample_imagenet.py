"""A folder with class and file names of ImageNet; other sources must convert to equal files."""

from pathlib import Path

from conftest import drawn_picture, jpeg_bytes

from pipelines.convert.command import main

CLASSES = {"n01440764": 5, "n01443537": 9, "n15075141": 3}


def convert(*arguments) -> int:
    """bt-convert in this process; returns its exit code."""
    return main([str(argument) for argument in arguments] + ["--workers", "1"])


def write_folder(root: Path) -> Path:
    """Write train/ and val/ with three classes."""
    for name, count in CLASSES.items():
        (root / "train" / name).mkdir(parents=True)
        for index in range(count):
            path = root / "train" / name / f"{name}_{index * 7}.JPEG"
            path.write_bytes(jpeg_bytes(drawn_picture(100 * index + int(name[-2:]))))
    for index in range(1, 12):
        path = root / "val" / sorted(CLASSES)[index % 3] / f"ILSVRC2012_val_{index:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(drawn_picture(index)))
    return root


def same_as(reference: Path, out: Path, splits=("train", "val")) -> bool:
    """Whether two outputs, and the .val.beton beside them, have the same bytes."""
    pairs = {"train": (reference, out)}
    pairs["val"] = tuple(path.with_suffix(".val.beton") for path in pairs["train"])
    return all(a.read_bytes() == b.read_bytes() for a, b in (pairs[split] for split in splits))
