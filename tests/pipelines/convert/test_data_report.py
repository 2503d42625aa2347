"""The report on a conversion: every planted fault is in it, and no other."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import planted
import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import make_folder
from html_page import Page
from sample_imagenet import convert

from pipelines.common import html_report
from pipelines.convert.findings import groups, similar
from pipelines.convert.image_table import ImageTable
from pipelines.convert.jpeg import BLANK_DEVIATION, Prepared, _is_blank, prepare

FLAGS = ["--skip-broken"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return planted.write(tmp_path_factory.mktemp("planted"), "folder")


def reports(out: Path) -> dict[str, dict]:
    if out.is_dir():
        return json.loads((out / "dataset.json").read_text())["splits"]
    paths = {"train": out, "val": out.with_suffix(".val.beton")}
    return {name: json.loads(Path(f"{path}.json").read_text()) for name, path in paths.items()}


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_planted_faults(source, tmp_path, capsys, format):
    out = tmp_path / ("out.beton" if format == "beton" else "shards")
    assert convert(source, out, *FLAGS, "--format", format) == 0
    output = capsys.readouterr().out
    page = tmp_path / ("out.report.html" if format == "beton" else "shards/report.html")
    note = "1 also in val, 3 exact duplicates, 2 duplicates of another class, 2 blank, 4 grey"
    assert f"train: {note}: see {page}\n" in output
    assert "val: " in output and f"val: {note}" not in output
    train, val = reports(out).values()
    found = train["duplicates"]["groups"]
    pairs = {names[0]: set(names[1:]) for names in (group["names"] for group in found)}
    expected = {original: {copy} for copy, original in planted.COPIES.items()}
    assert pairs == expected
    assert [(group["val"], group["names"]) for group in train["in_val"]["groups"]] == [
        (original, [copy]) for copy, original in planted.OVERLAPS.items()
    ]
    assert set(train["blank"]["names"]) == set(planted.BLANK)
    assert set(train["grey"]["names"]) == {*planted.GREY, "cat/blank.jpg"}
    assert {reject["path"] for reject in train["rejects"]} == set(planted.BROKEN)
    for name in ("duplicates", "blank", "grey"):
        assert val[name]["num_images"] == 0
    assert train["not_decoded"] == 0 and train["sides"]["width"]["max"] == 40


def test_channels_are_those_of_the_pixels(tmp_path):
    folder = make_folder(tmp_path / "images", {"a": 9})
    assert convert(folder, tmp_path / "out.beton") == 0
    from PIL import Image

    files = sorted((folder / "a").iterdir())
    pixels = np.concatenate([np.asarray(Image.open(file)).reshape(-1, 3) for file in files]) / 255
    channels = json.loads((tmp_path / "out.beton.json").read_text())["channels"]
    assert channels["num_images"] == 9
    assert channels["mean"] == pytest.approx(pixels.mean(0), abs=1e-3)
    assert channels["std"] == pytest.approx(pixels.std(0), abs=1e-3)


def test_the_page_is_one_file(tmp_path):
    """Names are escaped, pictures are inside, and nothing is loaded."""
    name = '<script>alert("1")&amp;\'.jpg'
    folder = tmp_path / "http:" / "<b>"
    make_folder(folder, {"a": 3, "A ": 2})
    plain = jpeg_bytes(drawn_picture(50))
    for copy in (name, "copy.jpg"):
        (folder / "a" / copy).write_bytes(plain)
    (folder / "a" / "<i>.jpg").write_bytes(b"broken")
    assert convert(folder, tmp_path / "out.beton", *FLAGS) == 0
    content = (tmp_path / "out.report.html").read_text()
    page = Page(content)
    assert name in page.text and "A , a" in page.text and "<i>.jpg" in page.text
    assert "not an image" in page.text and "8 found = 7 stored + 1 rejected" in page.text
    assert "http://" not in content and "https://" not in content
    assert not {"script", "i", "b", "iframe"} & page.tags
    icons = [source for source in page.sources if not source.startswith("data:image/jpeg;base64,")]
    assert icons == ["data:,"] and len(page.sources) > 11


def test_equal_images_give_an_equal_report(source, tmp_path):
    contents = []
    for workers in ("1", "2"):
        out = tmp_path / workers / "out.beton"
        out.parent.mkdir()
        assert convert(source, out, *FLAGS) == 0
        contents.append({path.name: path.read_bytes() for path in out.parent.iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 5


def test_undecoded_images_are_counted(source, tmp_path):
    assert convert(source, tmp_path / "out.beton", *FLAGS) == 0
    assert convert(tmp_path / "out.beton", tmp_path / "copy.beton") == 0
    report = reports(tmp_path / "copy.beton")["train"]
    assert report["not_decoded"] == report["num_images"]
    assert report["duplicates"] == reports(tmp_path / "out.beton")["train"]["duplicates"]
    assert "which were not decoded" in (tmp_path / "copy.report.html").read_text()


@pytest.mark.parametrize("kept", [True, False])
def test_parts_keep_the_account_and_the_duplicates(source, tmp_path, kept):
    (tmp_path / "parts").mkdir()
    for number in (1, 2):
        out = tmp_path / "parts" / f"{number}.beton"
        assert convert(source, out, "--shard", f"{number}/2", *FLAGS) == 0
    flags = [] if kept else ["--drop", "exact,overlap"]
    assert convert(tmp_path / "parts", tmp_path / "out.beton", *flags) == 0
    train = reports(tmp_path / "out.beton")["train"]
    assert convert(source, tmp_path / "whole.beton", *FLAGS, "--shard", "1/1") == 0
    whole = reports(tmp_path / "whole.beton")["train"]
    rejected = {"rejected in the parts, whose reports name them": len(planted.BROKEN)}
    dropped = train["dropped_by_reason"]
    assert train["found"] == whole["found"]
    assert train["ignored"] == whole["ignored"] | rejected | dropped
    total = len(planted.images()["train"]) - len(planted.BROKEN)
    assert train["num_images"] == total - (0 if kept else 4)
    assert train["duplicates"]["num_images"] == (3 if kept else 0)
    assert train["in_val"]["num_images"] == (1 if kept else 0)


def test_memory_per_image():
    def peak(count: int) -> int:
        tracemalloc.start()
        table = ImageTable(count, lambda index: b"")
        for index in range(count):
            table.add(Prepared(b"x", 3, 4, "kept", False, False), index * 2654435761 % 2**32, 0)
        assert not table.duplicates
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)
    for count in (3_000, 5_461, 5_462, 30_000):
        assert peak(count) <= 25 * count + 4000


def test_equal_checksums_of_other_bytes_are_no_duplicates():
    contents = [b"a", b"b", b"a", b"c", b"b"]
    table = ImageTable(9, contents.__getitem__)
    for content in contents:
        table.add(Prepared(content, 1, 1, "kept"), 7, 0)
    assert table.duplicates.tolist() == [2, 0, 4, 1]
    assert [table.find(content, 7) for content in (b"a", b"b", b"c", b"d")] == [0, 1, 3, -1]
    found = groups([2, 0, 4, 1, 5, 0])
    assert [(g.original, g.members, g.num_members) for g in found] == [(0, [2, 5], 2), (1, [4], 1)]


def test_blank_and_grey_are_of_the_full_image():
    """A texture whose blocks have one mean is not blank, nor a photograph with a grey border."""
    texture = planted.images()["train"]["cat/texture.jpg"]
    assert not prepare(texture, 0).is_blank and prepare(texture, 0).is_grey
    picture = drawn_picture(3, 80, 80)
    picture.paste((9, 9, 9), (0, 0, 80, 40))
    for max_side in (0, 64):  # kept, resized
        prepared = prepare(jpeg_bytes(picture), max_side)
        assert (prepared.is_blank, prepared.is_grey) == (False, False)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_blank_images_are_those_whose_channels_deviate_little(num_channels):
    """Of any size, also where only a few pixels or one channel tell that an image is not blank."""
    random = np.random.default_rng(0)
    found = {True: 0, False: 0}
    for _ in range(200):
        shape = (*random.integers(1, 300, 2), num_channels)
        deviation = random.uniform(0, 4) * random.integers(0, 2, num_channels)
        pixels = random.uniform(0, 255, num_channels) + random.normal(0, deviation, shape)
        if random.random() < 0.3:
            pixels[0, 0] = random.uniform(0, 255)
        pixels = pixels.clip(0, 255).astype(np.uint8)
        is_blank = bool((pixels.std(axis=(0, 1)) < BLANK_DEVIATION).all())
        assert _is_blank(pixels) == is_blank, shape
        found[is_blank] += 1
    assert min(found.values()) > 30
    assert _is_blank(np.full((4000, 3000, num_channels), 255, np.uint8))


def test_similar_names():
    names = ["cat", "Cat", "c++", "c", "a b", "A_B", "dog", "1", "11"]
    assert similar(names) == [["cat", "Cat"], ["a b", "A_B"]]


def test_histogram_and_table_of_little():
    assert html_report.histogram("x", np.array([])) == html_report.table(["x"], []) == ""
    for log in (False, True):
        assert html_report.histogram("x", np.array([5, 5]), log=log).count("<rect") == 1
    values = np.random.default_rng(0).uniform(1, 9, 99)
    assert Page(html_report.histogram("x", values)).text.strip().endswith("x")
