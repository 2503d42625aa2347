"""`bt-fast embed`: the features of all images of a data set as a file, for other programs.

    features.npy       float32 [n, width], one row per image; read with numpy.load(mmap_mode="r")
    features.csv       beside it: name, label (-1: none) and class of each row
    features.parquet   instead of both: columns name, label, class and feature (a list of float32)

Rows are in the order of the data. Images are read in chunks, which are written as they are
computed: memory does not grow with their number, and an interrupted command continues.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bt_fast.config import require_fields
from bt_fast.distributed.collectives import ALONE, World, broadcast_object
from bt_fast.evaluate.eval_setup import EvalSetup, build_setup, open_splits
from bt_fast.evaluate.options import Embed
from bt_fast.evaluate.subset import complete_subset
from bt_fast.export.encoder_files import weights_file
from bt_fast.models.networks import feature_width
from bt_fast.run.console import print_summary
from pipelines.common.atomic import atomic_file, require_place, work_folder, write_text
from pipelines.common.console import print_line, progress
from pipelines.loading.datasets import ImageDataset

CHUNK = 4096  # images


def run_embed(options: Embed, world: World) -> int:
    """Write the file; returns the exit status."""
    if options.out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out {options.out} must end in .npy or .parquet")
    require_place(options.out, "--out")
    is_parquet = options.out.suffix == ".parquet"
    if is_parquet:
        _pyarrow()  # raises now
    if options.val_data is not None:
        raise ValueError("--val-data has no effect here; give it as --data")
    if not options.random:
        weights_file(options.run)  # raises now, before the files of --out are looked at
    partial = options.out.with_name(f"{options.out.name}.partial")
    paths = [options.out]
    if not is_parquet and not partial.exists():  # else it may have written the .csv
        paths.append(options.out.with_suffix(".csv"))
    for path in paths:
        if path.exists() and not options.overwrite:
            raise ValueError(f"--out {path} exists; choose another, or replace it: --overwrite")
    setup = build_setup(options, world=world)
    images, _ = open_splits(options, setup.config)
    if not world.is_first:
        write_features(setup, images, partial)
        return 0
    with unlocked(options.out), work_folder(partial, resume=True) as work:
        write_features(setup, images, work)
        names = [*(images.class_names or map(str, range(images.num_classes))), ""]
        rows = (
            (images.name(index), label, names[label])
            for index, label in enumerate(images.labels.tolist())
        )
        features = work / "features.npy"
        if is_parquet:
            features = _write_parquet(features, rows)
        else:
            write_csv(options.out.with_suffix(".csv"), ("name", "label", "class"), rows)
        os.replace(features, options.out)
    shape = f"{len(images)} x {feature_width(setup.encoder)}"
    table = {"encoder": setup.description, "data": images.path, "features": shape}
    print_summary("bt-fast embed", table | {"out": str(options.out)})
    return 0


@contextlib.contextmanager
def unlocked(out: Path) -> Iterator[None]:
    """Raise ValueError if another process holds the lock that the block needs."""
    try:
        yield
    except BlockingIOError:
        raise ValueError(f"--out {out} is being written by another process") from None


def embed(
    run: str | Path, data: str | Path | None = None, *, out: str | Path, **flags: Any
) -> Path:
    """Write the features of all images of `data`, float32 [n, width] in the order of the data, to
    `out`, in this process; in bf16 where the device has it, unless precision="fp32".

    Args:
        run: folder of a run, or file of weights.
        data: a .beton or a folder of images; default: the run's training images.
        out: a .npy, beside which a .csv has name, label (-1: none) and class of each row, or a
            .parquet with these columns and `feature`.
        flags: further flags of `bt-fast embed` by name, such as size=224 or which="teacher".

    Returns:
        `out`.

    Raises:
        ValueError: as the command, with the flag's name.
    """
    require_fields(Embed, flags, "bt-fast embed")
    options = Embed(**flags | {"run": run, "data": data, "out": out})
    if options.gpus not in (None, 1):
        raise ValueError("several gpus need the command bt-fast embed")
    run_embed(options, ALONE)
    return options.out


def write_features(setup: EvalSetup, images: ImageDataset, work: Path) -> None:
    """Complete features.npy in the existing folder `work`, which holds state.json beside it.

    All ranks divide every chunk, the first one writes. What another command left is reused if it is
    of the same encoder and images.
    """
    shape = len(images), feature_width(setup.encoder)
    done, is_first = 0, setup.world.is_first
    if is_first:
        identity = setup.identity(complete_subset(images))
        done = _number_done(work, identity)
        if not done:
            (work / "state.json").unlink(missing_ok=True)  # of another command
            np.lib.format.open_memmap(work / "features.npy", "w+", np.float32, shape)
        else:
            print_line(f"continuing after {done:,} of {len(images):,} images")
    done = broadcast_object(done, setup.world.group)
    views = setup.views(images)
    with progress("embedding", len(images) - done) as advance:
        for start in range(done, len(images), CHUNK):
            samples = np.arange(start, min(start + CHUNK, len(images)))
            features = setup.features(views, samples)
            if is_first:
                file = np.lib.format.open_memmap(work / "features.npy", "r+")
                file[samples] = features.cpu().numpy()
                file.flush()
                state = {"identity": identity, "done": int(samples[-1]) + 1}
                write_text(work / "state.json", json.dumps(state), overwrite=True)
            advance(len(samples))


def _number_done(work: Path, identity: dict[str, Any]) -> int:
    """Number of images whose features an interrupted command left."""
    try:
        state = json.loads((work / "state.json").read_bytes())
        is_same = state["identity"] == identity and (work / "features.npy").exists()
        return int(state["done"]) if is_same else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write or replace a CSV file; names that are not UTF-8 keep their bytes."""
    with atomic_file(path, overwrite=True) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows(rows)
        text.flush()
        text.detach()


def _write_parquet(features: Path, rows: Iterator[tuple[str, int, str]]) -> Path:
    """Write features.parquet beside features.npy; rows: name, label and class of each image."""
    pa, parquet = _pyarrow()
    values = np.load(features, mmap_mode="r")
    columns = ("name", pa.string()), ("label", pa.int64()), ("class", pa.string())
    schema = pa.schema([*columns, ("feature", pa.list_(pa.float32(), values.shape[1]))])
    path = features.with_suffix(".parquet")
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(values), CHUNK):
            part = pa.array(values[start : start + CHUNK].ravel())
            lists = pa.FixedSizeListArray.from_arrays(part, values.shape[1])
            names, labels, classes = zip(*islice(rows, CHUNK), strict=True)
            texts = [[_valid_utf8(text) for text in column] for column in (names, classes)]
            writer.write_table(pa.table([texts[0], labels, texts[1], lists], schema=schema))
    return path


def _valid_utf8(name: str) -> str:
    r"""A file name with \xNN for each byte that is not UTF-8, which parquet cannot contain."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            "--out .parquet needs PyArrow: pip install pyarrow; or choose .npy"
        ) from None
    return pyarrow, parquet
