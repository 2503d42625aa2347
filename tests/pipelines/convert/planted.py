"""A small data set with planted faults, as every kind of source."""

from pathlib import Path

import numpy as np
from conftest import drawn_picture, jpeg_bytes
from hostile import saved, write_tar
from PIL import Image
from sample_imagenet import convert
from test_splits_and_labels import write_files, write_parquet

BROKEN = ("cat/broken0.jpg", "cat/broken1.jpg", "dog/broken2.jpg")
BLANK = ("cat/blank.jpg", "dog/nearly.png")
GREY = ("cat/grey.jpg", "cat/grey3.jpg", "cat/texture.jpg")  # and the blank ones
COPIES = {"cat/copy.jpg": "cat/0.jpg", "dog/copy.jpg": "cat/1.jpg", "dog/same.png": "cat/2.png"}
OVERLAPS = {"cat/4.jpg": "cat/val-copy.jpg"}
KINDS = ("folder", "list", "shards", "parquet", "beton", "webdataset")


def images() -> dict[str, dict[str, bytes]]:
    """{split: {name: content}}, sorted by name."""
    picture = [drawn_picture(seed, 40, 30) for seed in range(12)]
    noise = np.random.default_rng(0).normal(200, 1, (30, 40, 3)).astype(np.uint8)
    texture = np.indices((32, 40)).sum(0) % 2 * 255  # of one grey at an eighth of its size
    train = {
        "cat/0.jpg": jpeg_bytes(picture[0]),
        "cat/1.jpg": jpeg_bytes(picture[1]),
        "cat/2.png": saved(picture[2], "PNG"),
        "cat/3.jpg": jpeg_bytes(picture[3]),
        "cat/4.jpg": jpeg_bytes(picture[4]),
        "cat/blank.jpg": jpeg_bytes(Image.new("RGB", (40, 30), (120, 120, 120))),
        "cat/broken0.jpg": b"not an image",
        "cat/broken1.jpg": jpeg_bytes(picture[5])[:-99],
        "cat/grey.jpg": jpeg_bytes(picture[6].convert("L")),
        "cat/grey3.jpg": jpeg_bytes(picture[7].convert("L").convert("RGB")),
        "cat/texture.jpg": jpeg_bytes(Image.fromarray(texture.astype(np.uint8))),
        "dog/5.jpg": jpeg_bytes(picture[8]),
        "dog/6.jpg": jpeg_bytes(picture[9]),
        "dog/broken2.jpg": b"",
        "dog/nearly.png": saved(Image.fromarray(noise), "PNG"),
        "dog/reencoded.jpg": jpeg_bytes(picture[3], quality=70),
        "dog/resized.jpg": jpeg_bytes(picture[3].resize((36, 27))),
    }
    train |= {copy: train[original] for copy, original in COPIES.items()}
    val = {"cat/val-copy.jpg": train["cat/4.jpg"], "dog/7.jpg": jpeg_bytes(picture[10])}
    val["dog/8.jpg"] = jpeg_bytes(picture[11])
    return {"train": dict(sorted(train.items())), "val": val}


def write(root: Path, kind: str) -> Path:
    """Write the images as a source of this kind; returns the SOURCE."""
    splits = images()
    if kind in ("folder", "list"):
        for split, files in splits.items():
            write_files(root / split, files)
        if kind == "folder":
            return root
        lines = [f"{name} {name[:3]}\n" for name in splits["train"]]
        (root / "train" / "list.txt").write_text("".join(lines))
        return root / "train" / "list.txt"
    if kind == "shards":
        for split, files in splits.items():
            # The key ends at the first dot, so that 0.jpg and its label are a sample.
            samples: dict[str, bytes] = {}
            for name, content in files.items():
                samples |= {name: content, f"{name.rpartition('.')[0]}.cls": name[:3].encode()}
            write_tar(root / f"{split}-000.tar", samples)
    elif kind == "parquet":
        for split, files in splits.items():
            cells = [{"bytes": content, "path": name} for name, content in files.items()]
            labels = [name[:3] for name in files]
            write_parquet(root / f"{split}.parquet", {"image": cells, "label": labels})
    else:
        folder = write(root / "images", "folder")
        out = root / ("out.beton" if kind == "beton" else "shards")
        assert convert(folder, out, "--skip-broken", "--format", kind) == 0
        return out
    return root
