"""A source for each message of bt-convert about sources in docs/errors.md."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

from conftest import drawn_picture, jpeg_bytes
from error_convert_cases import CONVERT, converted, failing, images
from error_list import Case, Place

from pipelines.convert import workers
from pipelines.webdataset.writer import NAMES

JPEG = jpeg_bytes(drawn_picture(0, 40, 30))
VAL = "ILSVRC2012_img_val.tar"


def tar(place: Place, name: str, **files: bytes) -> None:
    """Write an archive; `key_jpg=...` is the member key.jpg, in the order given."""
    (place.path / name).write_bytes(archive({k.replace("_", "."): v for k, v in files.items()}))


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def train_archive(place: Place, size: int | None = None) -> None:
    inner = archive({"n1_1.JPEG": JPEG})
    (place.path / "train.tar").write_bytes(archive({"n1.tar": inner[:size], "n2.tar": inner}))


def val_archive(place: Place, labels: str = "") -> None:
    (place.path / VAL).write_bytes(archive({"v_1.JPEG": JPEG, "v_2.JPEG": JPEG}))
    place.write("labels.txt", labels)


def both_archives(place: Place) -> None:
    train_archive(place)
    os.rename("train.tar", "ILSVRC2012_img_train.tar")
    val_archive(place, "n1\nn9\n")


def shards(place: Place) -> Path:
    return next(converted(place, "--format=webdataset", out="shards").glob("*.tar"))


def after_listing(change):
    """Change the source after its images are listed and before they are read."""

    def patch(place: Place) -> None:
        original = workers.prepare_all

        def prepare_all(*arguments, **options):
            change(place)
            return original(*arguments, **options)

        place.patch("pipelines.convert.write_split.prepare_all", prepare_all)

    return patch


def parquet(place: Place, **columns: list) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), place.path / "x.parquet")


def named_parquet(place: Place) -> None:
    import pyarrow
    from pyarrow import parquet

    metadata = {"info": {"features": {"label": {"names": ["only one"]}}}}
    table = pyarrow.table({"image": [{"bytes": JPEG}], "label": [3]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table, place.path / "x.parquet")


def two_parts(place: Place, **second: str) -> None:
    converted(place, "--shard=1/2", out="parts/1.beton")
    if second:
        converted(place, "--shard=2/2", *second.values(), out="parts/2.beton")


def swapped_part(place: Place) -> None:
    two_parts(place)
    shutil.copy(place.data, place.path / "parts" / "1.beton")


def different_val_classes(place: Place) -> None:
    place.beton("x.beton", num_classes=2)
    place.beton("x.val.beton", num_classes=3)


CASES = [
    Case("SOURCE … does not exist", CONVERT),
    Case(
        "SOURCE … is neither",
        "bt-convert notes.md out.beton",
        lambda place: place.write("notes.md", ""),
    ),
    Case(
        "SOURCE … cannot be read",
        CONVERT,
        failing(
            "pipelines.convert.sources.shards.has_dataset", PermissionError(13, "Permission denied")
        ),
    ),
    Case(
        "SOURCE … cannot be read",
        f"bt-convert {VAL} out.beton --labels labels.txt",
        lambda place: (val_archive(place), place.write("labels.txt", b"\xff\xfe\n\xff\n")),
    ),
    Case(
        "SOURCE … has both",
        CONVERT,
        lambda place: (images(place), place.write("images/x.tar", archive({"a.jpg": JPEG}))),
    ),
    Case("… has no images that can be read…", CONVERT, lambda place: os.mkdir("images")),
    Case(
        "… has classes that train/ lacks",
        CONVERT,
        lambda place: (place.images("images/train", a=1), place.images("images/val", b=1)),
    ),
    Case(
        "… has images but no class folders",
        CONVERT,
        lambda place: (place.images("images/train", a=1), place.write("images/val/x.jpg", JPEG)),
    ),
    Case("SOURCE … has only", CONVERT, lambda place: place.images("images/test", a=1)),
    Case(
        "… has no class, unlike other",
        "bt-convert x.tar out.beton",
        lambda place: tar(place, "x.tar", a_jpg=JPEG, a_cls=b"1", b_jpg=JPEG),
    ),
    Case(
        "…: label … is out of range: … classes",
        "bt-convert x.parquet out.beton",
        named_parquet,
        needs="pyarrow",
    ),
    Case(
        "label … is out of range",
        "bt-convert x.txt out.beton",
        lambda place: place.write("x.txt", "a.jpg 99999999999\n"),
    ),
    Case(
        "… no longer exists",
        CONVERT,
        lambda place: (
            images(place),
            after_listing(lambda place: shutil.rmtree(place.path / "images"))(place),
        ),
    ),
    Case(
        "… has become shorter",
        "bt-convert x.tar out.beton",
        lambda place: (
            tar(place, "x.tar", a_jpg=JPEG, a_cls=b"1"),
            after_listing(lambda place: os.truncate("x.tar", 600))(place),
        ),
    ),
    Case("--labels …: only", CONVERT + " --labels x", images),
    Case(
        "--labels …: … contains the classes",
        "bt-convert train.tar out.beton --labels x",
        train_archive,
    ),
    Case(
        "--labels … has no line for",
        f"bt-convert {VAL} out.beton --labels labels.txt",
        lambda place: val_archive(place, "v_1.JPEG n1\n"),
    ),
    Case(
        "--labels …: … lines of a class",
        f"bt-convert {VAL} out.beton --labels labels.txt",
        lambda place: val_archive(place, "n1\n"),
    ),
    Case("… does not contain the classes", f"bt-convert {VAL} out.beton", val_archive),
    Case(
        "… has classes that train lacks: …",
        "bt-convert . out.beton --labels labels.txt",
        both_archives,
    ),
    Case(
        "… is not a valid development kit",
        f"bt-convert {VAL} out.beton --labels kit.tar.gz",
        lambda place: (val_archive(place), place.write("kit.tar.gz", b"garbage" * 99)),
        needs="scipy",
    ),
    Case(
        "reading … requires SciPy",
        f"bt-convert {VAL} out.beton --labels kit.tar.gz",
        lambda place: (val_archive(place), place.without("scipy.io")),
    ),
    Case(
        "…: … in it is truncated",
        "bt-convert train.tar out.beton",
        lambda place: train_archive(place, size=700),
    ),
    Case(
        "… is not a complete tar archive",
        "bt-convert x.tar out.beton",
        lambda place: place.write("x.tar", b"garbage" * 99),
    ),
    Case(
        "…, line …: no label",
        "bt-convert x.txt out.beton",
        lambda place: place.write("x.txt", "a.jpg 1\nb.jpg\n"),
    ),
    Case(
        "reading parquet files",
        "bt-convert x.parquet out.beton",
        lambda place: (place.write("x.parquet", ""), place.without("pyarrow")),
    ),
    Case(
        "…parquet cannot be read",
        "bt-convert x.parquet out.beton",
        lambda place: place.write("x.parquet", b"garbage" * 99),
        needs="pyarrow",
    ),
    Case(
        "… has no column image",
        "bt-convert x.parquet out.beton",
        lambda place: parquet(place, text=["a"], label=[1]),
        needs="pyarrow",
    ),
    Case(
        "…: its labels are neither",
        "bt-convert x.parquet out.beton",
        lambda place: parquet(place, image=[{"bytes": JPEG}], label=[1.5]),
        needs="pyarrow",
    ),
    Case(
        "…: … is not a number",
        "bt-convert x.tar out.beton",
        lambda place: tar(place, "x.tar", a_jpg=JPEG, a_cls=b"cat"),
    ),
    Case(
        "…: … has … bytes, more than",
        "bt-convert x.tar out.beton",
        lambda place: tar(place, "x.tar", a_jpg=JPEG, a_cls=b"1" * 200),
    ),
    Case(
        "…: … images but … names",
        "bt-convert x.tar out.beton",
        lambda place: place.write("x.tar", archive({NAMES: b"a\0b\0", "a.jpg": JPEG})),
    ),
    Case(
        "… has … bytes, but",
        "bt-convert shards out.beton",
        lambda place: os.truncate(shards(place), 600),
    ),
    Case(
        "… is damaged or was not",
        "bt-convert shards out.beton",
        lambda place: place.write("shards/dataset.json", "{}"),
    ),
    Case(
        "… has only files named for testing",
        "bt-convert shards out.beton",
        lambda place: place.write("shards/x-test.tar", archive({"a.jpg": JPEG})),
    ),
    Case("… has parts … of", "bt-convert parts out.beton", two_parts),
    Case(
        "… is damaged: it is not JSON",
        "bt-convert parts out.beton",
        lambda place: (two_parts(place), place.write("parts/1.beton.json", "{")),
    ),
    Case("… is not the file that", "bt-convert parts out.beton", swapped_part),
    Case(
        "… and … are not parts of one conversion",
        "bt-convert parts out.beton",
        lambda place: two_parts(place, other="--max-side=32"),
    ),
    Case("… has other classes than …: move", "bt-convert x.beton out.beton", different_val_classes),
]
