"""The `.beton` format, written and read by bt-fast and by FFCV in all combinations."""

import io
import pickle

import numpy as np
import pytest
import simplejpeg
from conftest import drawn_picture, jpeg_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sample_beton import CLASSES, NUM_IMAGES, PAGE_SIZE, write_sample
from sample_imagenet import convert

from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter

# BetonWriter and BetonReader


def test_a_reader_can_be_copied_to_a_process_and_has_no_other_records(tmp_path):
    write_sample(tmp_path / "out.beton")
    reader = pickle.loads(pickle.dumps(BetonReader(tmp_path / "out.beton")))
    assert (len(reader), reader.class_names) == (NUM_IMAGES, CLASSES)
    assert reader.name(-1) == reader.name(NUM_IMAGES - 1)
    assert reader.sizes.tolist() == [list(reader.size(index)) for index in range(len(reader))]
    for method in (reader.image, reader.label, reader.size, reader.name, reader.checksum_ok):
        with pytest.raises(IndexError):
            method(NUM_IMAGES)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
RECORDS = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=3000), st.integers(1, 9000), st.integers(1, 9000), NAMES
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25)
@given(
    records=RECORDS,
    class_names=st.lists(NAMES, max_size=5),
    spare=st.integers(0, 3),
    data=st.data(),
)
def test_round_trip_of_any_record(tmp_path_factory, records, class_names, spare, data):
    """Any bytes, sizes, names and labels, and fewer images than num_samples."""
    path = tmp_path_factory.mktemp("any") / "out.beton"
    last = len(class_names) - 1
    label = st.integers(0, last) if class_names else st.just(-1)
    labels = [data.draw(label) for _ in records]
    options = {"num_samples": len(records) + spare, "page_size": 2 << 20}
    with BetonWriter(path, class_names=class_names, **options) as writer:
        for (content, height, width, name), number in zip(records, labels, strict=True):
            writer.add(content, height, width, number, name)
        digest = writer.sha256()
    reader = BetonReader(path)
    assert (len(reader), reader.class_names) == (len(records), class_names)
    assert reader.labels.tolist() == labels and reader.sha256() == digest
    for index, (content, height, width, name) in enumerate(records):
        assert reader.image(index).tobytes() == content
        assert (reader.size(index), reader.name(index)) == ((height, width), name)
        assert reader.checksum_ok(index) and not reader.is_raw(index)


def test_pages(tmp_path):
    """No image crosses a page boundary, and the page grows with the largest image."""
    generator = np.random.default_rng(0)
    sizes = [700_000] * 5 + [2 << 20, 1, (2 << 20) - 1, 5_000_000, 3_000_000]
    blobs = [generator.bytes(size) for size in sizes]
    out = tmp_path / "out.beton"
    with BetonWriter(out, num_samples=len(sizes), page_size=PAGE_SIZE) as writer:
        for blob in blobs:
            writer.add(blob, 1, 1, -1, "x")
    reader = BetonReader(out)  # raises BetonError if an image crosses a page boundary
    assert reader.page_size == 8 << 20
    assert [reader.image(index).tobytes() for index in range(len(reader))] == blobs


@pytest.mark.parametrize(
    "records",
    [[], [(b"", 1, 1, 0)], [(b"x", 1, 1, 1)], [(b"x", 1, 1, -2)], [(b"x", 1, 1, 0)] * 2],
    ids=["no images", "no bytes", "unknown class", "negative class", "more than num_samples"],
)
def test_misuse_of_the_writer_leaves_no_file(tmp_path, records):
    writer = BetonWriter(tmp_path / "out.beton", num_samples=1, class_names=["cat"])
    with pytest.raises(ValueError), writer:
        for record in records:
            writer.add(*record, "a")
    assert not list(tmp_path.iterdir())


def test_the_writer_replaces_no_file(tmp_path):
    out = tmp_path / "out.beton"
    out.write_text("precious")
    with pytest.raises(FileExistsError), BetonWriter(out, num_samples=1):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out.beton"]
    assert out.read_text() == "precious"


# FFCV


def test_ffcv_reads_a_file_of_the_writer(tmp_path):
    pytest.importorskip("ffcv", reason="ffcv is not installed", exc_type=ImportError)
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    grey, generator = drawn_picture(99, 96, 64).convert("L"), np.random.default_rng(0)
    images = [drawn_picture(index, 96, 64) for index in range(30)] + [grey]
    encoded = [jpeg_bytes(image) for image in images]
    labels = generator.integers(0, 5, len(images)).tolist()
    out = tmp_path / "out.beton"
    with BetonWriter(out, num_samples=40, class_names=list("abcde")) as writer:
        for index, jpeg in enumerate(encoded):
            writer.add(jpeg, 64, 96, labels[index], f"{index}")
    for os_cache in (True, False):  # FFCV's two file readers
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        options = {"os_cache": os_cache, "order": OrderOption.SEQUENTIAL, "drop_last": False}
        loader = Loader(str(out), batch_size=7, num_workers=2, pipelines=pipelines, **options)
        batches = [(image.copy(), label.copy()) for image, label in loader]
        decoded = np.concatenate([image for image, _ in batches])
        assert np.concatenate([label for _, label in batches]).flatten().tolist() == labels
        for pixels, jpeg in zip(decoded, encoded, strict=True):
            reference = simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=True)  # as FFCV's C code
            assert np.abs(pixels - reference.astype(np.int16)).max() <= 1


class StockDataset:
    """Four fields, as FFCV's writer reads them by index."""

    def __len__(self):
        return 17

    def __getitem__(self, index):
        return float(index), index % 4, drawn_picture(index, 50 + index, 40), bytes_of(index)


def bytes_of(index: int) -> np.ndarray:
    return np.frombuffer(b"extra" * (index + 1), np.uint8)


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_files_written_by_ffcv(tmp_path, mode):
    pytest.importorskip("ffcv", reason="ffcv is not installed", exc_type=ImportError)
    from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {
        "score": FloatField(),
        "target": IntField(),
        "picture": RGBImageField(write_mode=mode, jpeg_quality=95),
        "blob": BytesField(),
    }
    out = tmp_path / "stock.beton"
    DatasetWriter(str(out), fields, num_workers=2).from_indexed_dataset(StockDataset(), chunksize=3)
    reader = BetonReader(out)
    assert len(reader) == 17
    assert (reader.num_classes, reader.class_names) == (4, None)
    table = np.fromfile(out, np.uint8)
    (tmp_path / "changed.beton").write_bytes(table.tobytes())
    assert BetonReader(tmp_path / "changed.beton").sha256() == reader.sha256()
    start = reader._metadata.ctypes.data - reader._bytes.ctypes.data
    where = start + reader._metadata.dtype.fields["f1"][1]  # the first label
    table[where] = 3 - table[where]
    (tmp_path / "changed.beton").write_bytes(table.tobytes())
    changed = BetonReader(tmp_path / "changed.beton")
    assert (changed.label(0), changed.sha256() != reader.sha256()) == (3, True)
    assert reader.labels.tolist() == [index % 4 for index in range(17)]
    assert convert(out, tmp_path / "converted.beton") == 0
    converted = BetonReader(tmp_path / "converted.beton")
    assert converted.class_names == ["0", "1", "2", "3"]
    assert converted.labels.tolist() == reader.labels.tolist()
    modes = {reader.is_raw(index) for index in range(17)}
    assert modes == {"jpg": {False}, "raw": {True}, "proportion": {True, False}}[mode]
    for index in range(17):
        original = np.asarray(drawn_picture(index, 50 + index, 40), np.int16)
        assert reader.size(index) == (40, 50 + index)
        assert reader.name(index) == f"record {index}"
        assert reader.checksum_ok(index)
        jpeg = converted.image(index).tobytes()
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)), np.int16)
        if reader.is_raw(index):
            assert (reader.image(index).reshape(original.shape) == original).all()
            assert np.abs(pixels - original).mean() < 4
        else:
            assert jpeg == reader.image(index).tobytes()
            assert np.abs(pixels - original).mean() < 12  # others: > 40
