"""--include, --exclude, --classes and --drop: for every kind of source, and nothing in silence."""

import json
from pathlib import Path

import planted
import pytest
from conftest import files_below
from hostile import write_tar
from sample_imagenet import convert
from test_convert_continue import Interruption
from test_splits_and_labels import JPEG, cells, write_files, write_parquet

import pipelines.convert.jpeg
from pipelines.beton import BetonReader
from pipelines.convert.data_report import account
from pipelines.convert.filters import list_text, read_list
from pipelines.convert.manifest import SourceError

EXCLUDED = ["cat/0.jpg", "dog/6.jpg", "dog/same.png"]
INCLUDED = ["dog/6.jpg", "cat/copy.jpg", "cat/0.jpg", "cat/blank.jpg"]
DROP = "exact,overlap,blank"


def stored(out: Path) -> set[str]:
    reader = BetonReader(out)
    return {reader.name(index) for index in range(len(reader))}


@pytest.mark.parametrize("kind", planted.KINDS)
def test_every_filter_of_every_source(tmp_path, kind):
    """The expected names come from the files themselves; the account adds up every time."""
    source = planted.write(tmp_path / "source", kind)
    images = planted.images()
    if kind == "list":
        del images["val"]
    intact = {
        split: {name: data for name, data in files.items() if name not in planted.BROKEN}
        for split, files in images.items()
    }
    names = {split: set(files) for split, files in intact.items()}
    (tmp_path / "exclude").write_text("# a comment\n" + list_text(EXCLUDED))
    (tmp_path / "include").write_text("\n" + list_text(INCLUDED))
    (tmp_path / "classes").write_text("dog\r\n")

    firsts = {data: name for name, data in reversed(intact["train"].items())}
    held_out = set(intact.get("val", {}).values())
    dropped = {n for n, data in intact["train"].items() if firsts[data] != n or data in held_out}
    dropped |= set(planted.BLANK)
    dogs = {s: {name for name in found if name.startswith("dog")} for s, found in names.items()}
    drop = DROP if "val" in images else "exact,blank"
    cases = {
        f"--exclude {tmp_path}/exclude": names | {"train": names["train"] - set(EXCLUDED)},
        f"--include {tmp_path}/include": names | {"train": set(INCLUDED)},
        f"--classes {tmp_path}/classes": dogs,
        f"--drop {drop}": names | {"train": names["train"] - dropped},
        f"--classes {tmp_path}/classes --exclude {tmp_path}/exclude-dog": dogs
        | {"train": dogs["train"] - {"dog/6.jpg"}},
    }
    (tmp_path / "exclude-dog").write_text("dog/6.jpg")
    out = tmp_path / "out.beton"
    for flags, expected in cases.items():
        assert convert(source, out, "--skip-broken", "--overwrite", *flags.split()) == 0, flags
        for split, path in (("train", out), ("val", out.with_suffix(".val.beton"))):
            if split not in expected:
                continue
            assert stored(path) == expected[split], flags
            report = json.loads(Path(f"{path}.json").read_text())
            account(report)
            found = len(intact[split] if kind in ("beton", "webdataset") else images[split])
            assert report["found"] == found
            if flags.startswith("--classes"):
                assert BetonReader(path).class_names == ["dog"]
                assert set(BetonReader(path).labels.tolist()) == {0}
            if flags.startswith("--drop") and split == "train":
                assert {entry["path"] for entry in report["dropped"]} == dropped
                assert report["duplicates"]["num_images"] == report["blank"]["num_images"] == 0


def test_a_beton_is_filtered_without_decoding(tmp_path, monkeypatch):
    source = planted.write(tmp_path, "beton")
    (tmp_path / "exclude").write_text("\n".join(EXCLUDED))

    def decoded(pixels):
        raise AssertionError

    monkeypatch.setattr(pipelines.convert.jpeg, "_is_grey", decoded)
    flags = ["--exclude", tmp_path / "exclude", "--drop", "exact,overlap"]
    assert convert(source, tmp_path / "few.beton", *flags) == 0
    before, after = BetonReader(source), BetonReader(tmp_path / "few.beton")
    indices = {before.name(index): index for index in range(len(before))}
    assert 0 < len(after) < len(before)
    for index in range(len(after)):
        other = indices[after.name(index)]
        assert after.image(index).tobytes() == before.image(other).tobytes()
        assert after.location(index)[2] == before.location(other)[2]
        assert after.label(index) == before.label(other)


def test_a_name_of_several_images_is_refused(tmp_path, capsys):
    for shard in ("0.tar", "1.tar"):
        write_tar(tmp_path / "s" / shard, {"0.jpg": JPEG, "1.jpg": JPEG})
    (tmp_path / "list").write_text("0.jpg\n")
    for flag in ("--include", "--exclude"):
        assert convert(tmp_path / "s", tmp_path / "out.beton", flag, tmp_path / "list") == 2
        assert "are named 0.jpg" in capsys.readouterr().err


@pytest.mark.parametrize("flag,name", [("--exclude", "cat/0.jpg"), ("--include", "ant/0.jpg")])
def test_classes_of_images_that_are_left_out_stay(tmp_path, flag, name):
    """Else classes would change their numbers, and validation images would have unknown ones."""
    for split in ("train", "val"):
        files = {
            f"{c}/0.{end}": content
            for c in ("ant", "bee", "cat")
            for end, content in (("jpg", JPEG), ("cls", c.encode()))
        }
        write_tar(tmp_path / "s" / f"{split}.tar", files)
    (tmp_path / "list").write_text(name)
    assert convert(tmp_path / "s", tmp_path / "out.beton", flag, tmp_path / "list") == 0
    assert BetonReader(tmp_path / "out.beton").class_names == ["ant", "bee", "cat"]


def test_numbered_classes_keep_the_order_of_their_numbers(tmp_path):
    names = [f"{number}-{copy}" for number in range(12) for copy in range(2)]
    columns = {"image": cells(*names), "label": [int(name.split("-")[0]) for name in names]}
    write_parquet(tmp_path / "data.parquet", columns)
    (tmp_path / "classes").write_text("10\n2\n")
    flags = ["--classes", tmp_path / "classes"]
    assert convert(tmp_path / "data.parquet", tmp_path / "out.beton", *flags) == 0
    reader = BetonReader(tmp_path / "out.beton")
    assert reader.class_names == ["2", "10"] and reader.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("format", ["beton", "webdataset"])
def test_continued_with_drops(tmp_path, monkeypatch, format):
    """Stopped repeatedly, in val and in train: files and report are those of one conversion."""
    source = planted.write(tmp_path / "source", "folder")
    flags = ["--skip-broken", "--format", format, "--drop", DROP]
    name = "out.beton" if format == "beton" else "out"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert convert(source, tmp_path / "a" / name, *flags) == 0
    interruption = Interruption(monkeypatch)
    for limit in range(1, 99, 3):
        interruption.limit = limit
        if convert(source, tmp_path / "b" / name, *flags, "--continue") == 0:
            break
    assert limit > 9
    assert files_below(tmp_path / "b") == files_below(tmp_path / "a")


def test_a_validation_image_that_is_repaired_drops_its_copies(tmp_path, monkeypatch):
    """Also those that were stored before."""
    files = planted.images()
    source = planted.write(tmp_path / "source", "folder")
    copy = source / "val" / "cat" / "0-copy.jpg"
    copy.write_bytes(b"broken")
    command = [source, tmp_path / "out.beton", "--continue", "--drop", "overlap"]
    assert convert(*command) == 1
    for name in planted.BROKEN:
        (source / "train" / name).write_bytes(files["train"]["dog/5.jpg"])
    copy.write_bytes(files["train"]["cat/1.jpg"])
    assert convert(*command) == 0
    names = stored(tmp_path / "out.beton")
    assert names == files["train"].keys() - {"cat/1.jpg", "dog/copy.jpg", "cat/4.jpg"}


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--exclude {0}/x", "is named cat/9.jpg, other.jpg (2 in all)"),
        ("--include {0}/x", "is named cat/9.jpg, other.jpg (2 in all)"),
        ("--exclude {0}/val", "is named val.jpg (1 in all)"),
        ("--include {0}/a --exclude {0}/a", "both name a/1.jpg"),
        ("--exclude {0}/all", "--exclude leaves no training image"),
        ("--include {0}/empty", "has no names"),
        ("--exclude {0}/missing", "cannot be read"),
        ("--classes {0}/x", "is of class cat/9.jpg, other.jpg (2 in all)"),
        ("--classes {0}/b", "--classes leaves no image of"),
        ("--drop overlap", "has no validation images"),
        ("--drop same", "'same' is none of blank, exact, overlap"),
        ("--drop exact --shard 1/2", "give --drop when the parts are joined"),
        ("--drop blank --check quick", "leave out --check quick"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, flags, message):
    lists = {"x": "other.jpg\ncat/9.jpg", "val": "val.jpg", "a": "a/1.jpg", "b": "b"}
    lists |= {"all": "a/1.jpg\nb/2.jpg", "empty": "# nothing\n\n"}
    write_files(tmp_path, {name: content.encode() for name, content in lists.items()})
    images = dict.fromkeys(("train/a/1.jpg", "train/b/2.jpg", "val/a/val.jpg"), JPEG)
    source = write_files(tmp_path / "images", images) / ("train" if "has no val" in message else "")
    out = tmp_path / "out.beton"
    assert convert(source, out, *flags.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_list_is_read_as_it_is_written(tmp_path):
    names = ["a/b c.jpg", "é.jpg", "record 17", "x#y.jpg"]
    (tmp_path / "names").write_text("# two\n# lines\n" + list_text(names))
    assert read_list(tmp_path / "names", "--include") == names
    with pytest.raises(SourceError, match="--include"):
        read_list(tmp_path / "none", "--include")
    (tmp_path / "names").write_text("")  # the list of overlaps of a clean data set
    assert read_list(tmp_path / "names", "--exclude") == []
