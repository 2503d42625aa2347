"""Parquet files of the Hugging Face hub: columns `image` (with `bytes` and `path`) and `label`.

The schema may contain the class names; labels without names are numbers, which are kept, or text.
One row group at a time is in memory.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from pipelines.convert.manifest import (
    FoundImage,
    Label,
    Location,
    SourceError,
    SourceImage,
    Split,
    parse_label,
)
from pipelines.convert.sources.labels import LABEL_NAMES, SPLIT_COLUMNS, label_key
from pipelines.convert.sources.splits import (
    SourceOptions,
    check_split_column,
    splits_of_file,
    splits_of_files,
)

BATCH = 4096  # rows of labels read at a time
IMAGE_NAMES = ("image", "img")


def find_splits(source: Path, options: SourceOptions) -> dict[str, Split]:
    """The training and validation files below a folder, by their names; or the given file."""
    root = source if source.is_dir() else source.parent
    return splits_of_files(
        source,
        ".parquet",
        options,
        lambda paths: _split(root, paths, options),
        lambda path: _open(path).metadata.num_rows,
    )


def _split(root: Path, files: list[Path], options: SourceOptions) -> Split:
    schema = _open(files[0]).schema_arrow
    image = _image_column(files[0], schema, options.image_key)
    split = Split(root=root, load=lambda images: _load(images, image))
    label = _label_column(files[0], schema, image, options.label_key, split)
    split.class_names = _names_in_schema(files[0], schema, label) or None
    names = [file.relative_to(root).as_posix() for file in files]
    if options.train is None and not options.all_train and not any(map(splits_of_file, names)):
        for name in SPLIT_COLUMNS:
            check_split_column(split, root, name, _values(files, name))
    split.images = _images(split, files, image, label)
    return split


def _is_text_or_number(column) -> bool:
    """Whether cells of this Arrow type can be labels."""
    from pyarrow import types

    column = column.value_type if types.is_dictionary(column) else column
    kinds = types.is_integer, types.is_string, types.is_large_string, types.is_boolean
    return any(is_kind(column) for is_kind in (*kinds, types.is_floating, types.is_null))


def _values(files: list[Path], name: str) -> set:
    """The different values of a column of texts or numbers, in the files that have it."""
    values = set()
    for file in map(_open, files):
        schema = file.schema_arrow
        if name in schema.names and _is_text_or_number(schema.field(name).type):
            for batch in file.iter_batches(BATCH, columns=[name]):
                values.update(batch[name].unique().to_pylist())
    return values


def _open(path: Path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise SourceError("reading parquet files requires PyArrow: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _image_column(path: Path, schema, requested: str | None) -> str:
    """The column with the bytes of the images. Raises SourceError."""
    from pyarrow import types

    name = requested or next((name for name in IMAGE_NAMES if name in schema.names), "image")
    if name not in schema.names:
        raise SourceError(
            f"{path} has no column {name}; it has {', '.join(schema.names)}: state the column of"
            " the images with --image-key NAME"
        )
    column = content = schema.field(name).type
    if types.is_struct(column) and column.get_field_index("bytes") >= 0:
        content = column.field("bytes").type
    if not (types.is_binary(content) or types.is_large_binary(content) or types.is_null(content)):
        raise SourceError(
            f"{path}: column {name} has cells of type {str(column)[:60]}, not the bytes of image"
            " files"
        )
    return name


def _label_column(
    path: Path, schema, image: str, requested: str | None, split: Split
) -> str | None:
    """The column of the labels. One that is not of numbers or names is only used on request."""
    kinds = {name: schema.field(name).type for name in schema.names}
    candidates = [name for name in kinds if name != image and _is_text_or_number(kinds[name])]
    name = label_key(schema.names, requested, path, split.unused, candidates=candidates)
    if name is None or _is_text_or_number(kinds[name]):
        return name
    if requested is not None:
        raise SourceError(f"--label-key {name}: {path} has cells of type {kinds[name]} there")
    split.unused[f"{name} of {path.name}, whose cells are of type {kinds[name]}"] = None
    return None


def _names_in_schema(path: Path, schema, label: str | None) -> list[str]:
    """The names of the classes that the hub's metadata lists; none without them."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = [str(name) for name in content["info"]["features"][label].get("names", [])]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    if len(set(names)) < len(names):
        raise SourceError(f"{path}: its schema names two classes alike")
    return names


def _images(split: Split, files: list[Path], image: str, label: str | None) -> Iterator[FoundImage]:
    first = {*_open(files[0]).schema_arrow.names}
    for path in files:
        file = _open(path)
        schema = file.schema_arrow
        for column in (image, label):
            if column is not None and column not in schema.names:
                raise SourceError(f"{path} has no column {column}, unlike {files[0].name}")
        if label is None and (found := sorted({*schema.names} & {*LABEL_NAMES} - first)):
            raise SourceError(f"{path} has a column {found[0]}, unlike {files[0].name}")
        _image_column(path, schema, image)
        names = _names_in_schema(path, schema, label)
        for row, value, name in _rows(file, image, label):
            name = name or f"{path.relative_to(split.root).with_suffix('')}/{row}"
            try:
                value = _named(parse_label(value), names)
            except ValueError as error:
                raise SourceError(f"{path}, row {row}, column {label}: {error}") from None
            # The offset is a row number, for `_load`; a size of 0 marks bytes inside an archive.
            yield FoundImage(name, value, Location(str(path), offset=row, size=0))


def _named(label: Label, names: list[str]) -> Label:
    """The name of a number; files of one split may number their classes differently."""
    if not names or not isinstance(label, int) or label < 0:
        return label
    if label >= len(names):
        raise ValueError(f"label {label} is out of range: {len(names)} classes")
    return names[label]


def _rows(file, image: str, label: str | None) -> Iterator[tuple[int, Any, str | None]]:
    """Yield (row number, label, path of the image) of every row, without reading the images."""
    path = f"{image}.path"
    has_paths = path in {column.path for column in file.schema}
    columns = [column for column in (label, path if has_paths else None) if column is not None]
    if not columns:
        yield from ((row, None, None) for row in range(file.metadata.num_rows))
        return
    first = 0
    for batch in file.iter_batches(BATCH, columns=columns):
        rows = range(first, first + len(batch))
        labels = batch[label].to_pylist() if label is not None else [None] * len(batch)
        cells = batch[image].to_pylist() if has_paths else [None] * len(batch)
        yield from zip(rows, labels, (cell and cell["path"] for cell in cells), strict=True)
        first = rows.stop


def _load(images: Iterator[SourceImage], column: str) -> Iterator[SourceImage]:
    """Replace locations by bytes, reading each row group once."""
    from pyarrow import ArrowException

    for path, rows in groupby(images, lambda image: image.data.path):  # type: ignore[union-attr]
        file = _open(Path(path))
        counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        starts = [0, *accumulate(counts)]
        group, values = -1, None
        for image in rows:
            assert isinstance(image.data, Location)
            row = image.data.offset
            if group < 0 or row >= starts[group + 1]:  # rows are in increasing order
                group = bisect_right(starts, row) - 1
                try:
                    values = file.read_row_group(group, columns=[column])[column]
                except (OSError, ArrowException) as error:
                    raise SourceError(f"{path} cannot be read: {error}") from None
            value = values[row - starts[group]].as_py()  # type: ignore[index]
            cell = value if isinstance(value, dict) else {"bytes": value}
            data = cell.get("bytes")
            if data is None:
                problem = "not in the file, only its path" if cell.get("path") else "no bytes"
                data = image.data._replace(problem=problem)
            yield image._replace(data=data)
