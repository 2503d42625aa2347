"""What --loader cannot do, and web shards that no loader takes, for messages of docs/errors.md."""

import json
import sys
import tarfile

from conftest import drawn_picture, jpeg_bytes
from error_convert_cases import converted
from error_list import Case, Place
from error_pretrain_cases import PRETRAIN, data_with, raises
from error_source_cases import shards

DALI, FFCV = (f"{PRETRAIN} --loader {name}" for name in ("dali", "ffcv"))
SHARDS = PRETRAIN + " --data shards"


def failing(method: str):
    """DALI, with a method of its pipelines that fails."""
    return lambda place: place.patch(f"nvidia.dali.Pipeline.{method}", raises(RuntimeError("no")))


def without_ffcv(place: Place) -> None:
    """Nor anything that has imported it before."""
    place.without(*[name for name in sys.modules if name.split(".")[0] == "ffcv"], "ffcv")
    place.monkeypatch.delitem(sys.modules, "pipelines.loading.ffcv_stream", raising=False)
    place.monkeypatch.delattr("pipelines.loading.ffcv_stream", raising=False)


def for_others_only(place: Place) -> None:
    """Cut off, but native takes it."""
    data_with(place, jpeg_bytes(drawn_picture(0).resize((8, 8)))[:-20])
    place.patch("pipelines.loading.native.RecordDecoder.decode", lambda cutter, sample: None)


def no_training_images(place: Place) -> None:
    path = shards(place).parent / "dataset.json"
    dataset = json.loads(path.read_text())
    dataset["splits"] = {"val": dataset["splits"]["train"]}
    place.write(str(path), json.dumps(dataset))


def odd_class(place: Place) -> None:
    converted(place, "--format=webdataset", out="shards", source=str(place.data))
    (path,) = (place.path / "shards").glob("*.tar")
    with tarfile.open(path) as archive:
        member = next(member for member in archive if member.name.endswith(".cls"))
    with open(path, "r+b") as file:
        file.seek(member.offset_data)
        file.write(b"x")


def vanished_later(place: Place) -> None:
    """When DALI opens them."""
    shards(place)
    blocks = [("gone.tar", "gone.idx")]
    place.patch("pipelines.loading.dali_shards._write_blocks", lambda reader, folder: blocks)


LOADERS = [
    Case("--loader dali needs NVIDIA DALI", DALI, lambda place: place.without("nvidia.dali")),
    Case("--loader dali: DALI does not start", DALI, failing("build"), needs="nvidia.dali"),
    Case("DALI cannot decode an image that", DALI, failing("run"), needs="nvidia.dali"),
    Case("--cache-gb needs --loader native", FFCV + " --cache-gb 1"),
    Case("--loader ffcv needs FFCV", FFCV, without_ffcv),
    Case("--workers … is more than", FFCV + " --workers 999", needs="ffcv"),
    Case("image … does not decode with", FFCV + " --data x.beton", for_others_only, needs="ffcv"),
]
WEB_SHARDS = [
    Case("… is a folder without dataset.json", SHARDS, lambda place: place.images("shards")),
    Case("--data …: web shards are read by", SHARDS + " --loader native", shards),
    Case("… has no … images; convert", SHARDS, no_training_images),
    Case(
        "… is missing or damaged; convert",
        SHARDS,
        lambda place: shards(place).with_suffix(".idx").unlink(),
    ),
    Case("… of … has the invalid class …", PRETRAIN + " --val-data shards", odd_class),
    Case(
        "…: DALI does not read it",
        SHARDS + " --batch-size 4",
        vanished_later,
        needs="nvidia.dali",
    ),
]
CASES = [*LOADERS, *WEB_SHARDS]
