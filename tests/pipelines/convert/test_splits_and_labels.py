"""Splits, images and labels of a source: nothing is guessed, and nothing is lost in silence."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from conftest import drawn_picture, jpeg_bytes
from hostile import write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_imagenet import convert

from pipelines.beton import BetonReader
from pipelines.convert.manifest import Manifest, SourceError
from pipelines.convert.sources import find_splits
from pipelines.convert.sources.splits import SourceOptions

JPEG = jpeg_bytes(drawn_picture(0, 16, 12))
LINK, HARD_LINK = tarfile.SYMTYPE, tarfile.LNKTYPE


def write_parquet(path: Path, columns: dict, names: list[str] | None = None) -> None:
    pa = pytest.importorskip("pyarrow", reason="PyArrow is not installed")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        content = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": content})
    parquet.write_table(table, path, row_group_size=4)


def cells(*names: str) -> list[dict]:
    return [{"bytes": JPEG, "path": f"{name}.jpg"} for name in names]


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def listed(source: Path, **options) -> dict[str, dict[str, str | None]]:
    """{split: {name of an image: its class}}."""
    found: dict[str, dict[str, str | None]] = {}
    class_names = None
    for split, images in find_splits(source, SourceOptions(**options)).items():
        manifest = Manifest(images, class_names=class_names)
        class_names = manifest.class_names
        found[split] = {i.name: [*class_names, None][i.label] for i in manifest}
        assert len(found[split]) == len(manifest)
    return found


# Splits


def write_units(root: Path, kind: str, names: str) -> Path:
    """For every name a folder, an archive or a parquet file with one image of that name."""
    for name in names.split():
        image = name.replace("/", " ")
        if kind == "folder":
            write_files(root, {f"{name}/cat/{image}.jpg": b""})
        elif kind == "tar":
            write_tar(root / f"{name}.tar", {f"{image}.jpg": JPEG})
        else:
            write_parquet(root / f"{name}.parquet", {"image": cells(image), "label": [0]})
    return root


def placed(root: Path, **options) -> dict[str, str]:
    return {
        split: " ".join(sorted(Path(name).stem.replace(" ", "/") for name in images))
        for split, images in listed(root, **options).items()
    }


BOTH = ("tar", "parquet")
ALL = ("folder", *BOTH)


@pytest.mark.parametrize(
    "kinds,names,options,expected",
    [
        (BOTH, "bus car train", {}, {"train": "bus car train"}),
        (ALL, "train valid", {}, {"train": "train", "val": "valid"}),
        (ALL, "Training dev TEST", {}, {"train": "Training", "val": "dev"}),
        (ALL, "testing val", {}, {"train": "val"}),
        (ALL, "train2017 val2017", {}, {"train": "train2017", "val": "val2017"}),
        (ALL, "seg_train seg_test", {}, {"train": "seg_train"}),
        (ALL, "trainA trainB testA testB", {}, {"train": "trainA trainB"}),
        (ALL, "Train_Set Test_Set", {}, {"train": "Train_Set"}),
        (ALL, "train test1", {}, {"train": "train"}),
        (ALL, "train training val", {}, {"train": "train training", "val": "val"}),
        (ALL, "a b c", {"train": "[ab]*", "val": "c*"}, {"train": "a b", "val": "c"}),
        (ALL, "a train val", {"train": "a*"}, {"train": "a"}),
        (ALL, "a test train val", {"all_train": True}, {"train": "a test train val"}),
        (BOTH, "x-train-00000-of-2 x-val0", {}, {"train": "x-train-00000-of-2", "val": "x-val0"}),
        (
            BOTH,
            "d/train/0 d/validation/0 d/test/0",
            {},
            {"train": "d/train/0", "val": "d/validation/0"},
        ),
        (BOTH, "constrain interval", {}, {"train": "constrain interval"}),
        (BOTH, "f/1/0 f/2/0", {"train": "f/1", "val": "f/2"}, {"train": "f/1/0", "val": "f/2/0"}),
    ],
)
def test_names_place_files_and_folders(tmp_path, kinds, names, options, expected):
    for kind in kinds:
        root = write_units(tmp_path / kind, kind, names)
        assert placed(root, **options) == expected, kind


@pytest.mark.parametrize(
    "kinds,names,options,message",
    [
        (ALL, "train val extra", {}, "not of one split in extra"),
        (ALL, "bus test", {}, "not of one split in bus"),
        (ALL, "a b", {"val": "b*"}, "--val requires --train"),
        (ALL, "a b", {"train": "*", "val": "b*"}, "--train and --val match both b"),
        (ALL, "a b", {"train": "c*"}, "--train c* matches nothing"),
        (BOTH, "train_test", {}, "not of one split in train_test"),
        (BOTH, "train/0 train/val-1", {}, "not of one split in train/val-1"),
        (BOTH, "x/train x/val y/train", {}, "splits in several folders (x, y)"),
        (ALL, "seg_train seg_test seg_pred", {}, "not of one split in seg_pred"),
        (ALL, "test", {}, "has only a test split, test; train on it with --train test"),
        (("folder",), "train eval", {}, "train/, but other folders beside it: state the split"),
    ],
)
def test_names_that_place_too_little_are_listed(tmp_path, kinds, names, options, message):
    for kind in kinds:
        root = write_units(tmp_path / kind, kind, names)
        with pytest.raises(SourceError) as caught:
            listed(root, **options)
        assert message in str(caught.value).replace(f".{kind}", ""), kind


def test_a_wrapper_folder_is_no_class(tmp_path):
    for classes in (("pets",), ("cats", "dogs")):
        root = tmp_path / classes[0]
        for name in classes:
            write_files(root, {f"{name}/{split}/a/0.jpg": b"" for split in ("train", "val")})
        with pytest.raises(SourceError, match=f"{classes[0]} has splits of its own"):
            listed(root)
        assert set(listed(root, all_train=True)["train"].values()) == set(classes)


@pytest.mark.parametrize(
    "files,message",
    [
        (["x/data/train/a/0.jpg", "x/data/val/a/1.jpg"], "x has splits of its own"),
        (["images/train2017/0.jpg", "images/val2017/1.jpg"], "images has splits of its own"),
        (["train/train/a/0.jpg", "test/test/a/1.jpg"], "contains only the split train/: name it"),
        (["plain/train-0.parquet", "assets/preview.png"], "has both images and .parquet files"),
        (["shards/train/0.tar", "docs/sample.jpg"], "has both images and .tar files"),
        (["train/cat/0.jpg", "val/1.jpg"], "val has images but no class folders, unlike train/"),
        (["train/cat/0.jpg", "val/dog/1.jpg"], "val has classes .* training images: dog"),
    ],
)
def test_splits_and_archives_further_down_are_named(tmp_path, files, message):
    write_files(tmp_path, dict.fromkeys(files, JPEG))
    with pytest.raises(SourceError, match=message):
        listed(tmp_path)


def test_a_named_split_leaves_out_archives_beside_it(tmp_path):
    write_files(tmp_path, dict.fromkeys(["train/cat/0.jpg", "data/train-0.tar"], JPEG))
    assert listed(tmp_path, train="train") == {"train": {"cat/0.jpg": "cat"}}


def test_a_hub_cache_has_one_revision(tmp_path):
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    write_parquet(tmp_path / "hub/blobs/0a1b", {"image": cells("cat"), "label": [0]})
    for revision in ("1111", "2222"):
        folder = tmp_path / "hub" / "snapshots" / revision / "data"
        folder.mkdir(parents=True)
        (folder / "train-0.parquet").symlink_to(tmp_path / "hub/blobs/0a1b")
        if revision == "1111":
            assert listed(tmp_path / "hub") == {"train": {"cat.jpg": "0"}}
    with pytest.raises(SourceError, match=r"2 revisions \(1111, 2222\)"):
        find_splits(tmp_path / "hub")


def test_linked_folders_are_followed_for_every_kind(tmp_path):
    for kind in ALL:
        real = write_units(tmp_path / f"real {kind}", kind, "x")
        source = tmp_path / f"source {kind}"
        source.mkdir()
        (source / "train").symlink_to(real)
        assert placed(source) == {"train": "x"}


@pytest.mark.parametrize("flag", [{"image_key": "jpg"}, {"label_key": "x"}, {"labels": Path("l")}])
def test_a_flag_that_the_source_does_not_use_is_refused(tmp_path, flag):
    (tmp_path / "list.txt").write_text("0.jpg\n")
    with pytest.raises(SourceError, match=r"--\w+-?\w* does not apply to SOURCE"):
        find_splits(tmp_path / "list.txt", SourceOptions(**flag))


# Images


def test_the_key_of_a_sample(tmp_path):
    source = tmp_path / "a.tar"
    dotted = {f"img_1.{i}.jpg": JPEG for i in range(3)}
    dotted |= {f"img_1.{i}.cls": b"%d" % i for i in range(3)}
    write_tar(source, dotted)
    with pytest.raises(SourceError, match=r"3 images share the key img_1 .*--image-key jpg$"):
        listed(source)
    assert listed(source, image_key="jpg")["train"] == {f"img_1.{i}.jpg": str(i) for i in range(3)}

    pairs = [(f"{i}.{kind}", JPEG) for i in range(2) for kind in ("depth.png", "jpg")]
    labels = [("0.cls", b"cat"), ("1.cls", b"dog")]  # not beside the images
    write_tar(source, pairs + labels)
    with pytest.raises(SourceError, match=r"--image-key depth\.png or jpg$"):
        listed(source)
    assert listed(source, image_key="JPG")["train"] == {"0.jpg": "cat", "1.jpg": "dog"}
    assert set(listed(source, image_key="depth.png")["train"].values()) == {"cat", "dog"}

    stereo = {"0.left.png": JPEG, "0.right.png": JPEG}
    write_tar(source, stereo | {"0.cls": b"cat"})  # the key has a label: one image is meant
    with pytest.raises(SourceError, match=r"--image-key left\.png or right\.png$"):
        listed(source)
    assert listed(source, image_key="left.png")["train"] == {"0.left.png": "cat"}
    write_tar(source, stereo)
    with pytest.raises(SourceError, match=r"--image-key png$"):
        listed(source)
    with pytest.raises(SourceError, match=r"--image-key jpg: no sample of .* has such an image"):
        listed(source, image_key="jpg")
    assert convert(source, tmp_path / "out.beton", "--image-key", ".left.png") == 0

    write_tar(source, [("0.jpg", b"old"), ("0.jpg", JPEG), ("0.txt", b""), ("._0.jpg", b"")])
    split = find_splits(source)["train"]
    (image,) = Manifest(split)
    assert image.data.size == len(JPEG)
    assert +split.ignored == {"hidden": 1, "replaced by a later file of the same name": 1}


def test_archives_are_complete(tmp_path):
    """Python's tarfile takes a damaged header, but for the first, for the end of the archive."""
    write_tar(tmp_path / "a.tar", {f"{i}.jpg": JPEG for i in range(3)})
    whole = (tmp_path / "a.tar").read_bytes()
    second = 512 + -(-len(JPEG) // 512) * 512
    end = 3 * second
    damaged = {
        "a flipped byte": whole[: second + 3] + b"?" + whole[second + 4 :],
        "a header of zeros": whole[:second] + bytes(512) + whole[second + 512 :],
        "cut at a header": whole[: 2 * second],
        "cut in a header": whole[: 2 * second + 100],
        "two archives": whole + whole,
    }
    for what, content in damaged.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(SourceError, match="is not a complete tar archive"):
            print(what, listed(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(whole[:end] + bytes(1024))  # the least that ends an archive
    assert len(listed(tmp_path / "a.tar")["train"]) == 3
    inner = {"n1.tar": whole[:second] + b"?" + whole[second + 1 :], "n2.tar": whole}
    write_tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    with pytest.raises(SourceError, match="is not a complete tar archive"):
        listed(tmp_path / "ILSVRC2012_img_train.tar")


def test_names_that_differ_only_in_case_are_refused(tmp_path):
    for names in (("a.jpg", "a.JPG"), ("a.cls", "a.CLS")):
        write_tar(tmp_path / "a.tar", {"a.png": JPEG} | dict.fromkeys(names, b"1"))
        with pytest.raises(SourceError, match="differ only in case"):
            listed(tmp_path / "a.tar")


def test_links_in_archives_are_followed(tmp_path):
    files = {
        "a/0.jpg": JPEG,
        "a/1.jpg": (HARD_LINK, "a/0.jpg"),
        "b/2.jpg": (LINK, "../a/1.jpg"),
        "b/3.jpg": (LINK, "../../outside.jpg"),
        "b/4.jpg": (LINK, "4.jpg"),
    }
    write_tar(tmp_path / "a.tar", files)
    split = find_splits(tmp_path / "a.tar")["train"]
    assert [image.data.size for image in Manifest(split)] == 3 * [len(JPEG)]
    reasons = ["../outside.jpg", "b/4.jpg"]
    assert [reason.split()[3].rstrip(",") for _, reason in split.problems] == reasons
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 1


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_compressed_archives_are_named(tmp_path, module):
    write_tar(tmp_path / "a", {"0.jpg": JPEG})
    packed = __import__(module).compress((tmp_path / "a").read_bytes())
    write_tar(tmp_path / "both" / "b.tar", {"0.jpg": JPEG})
    for name in ("x/a.tar", "y/a.tar.gz", "z.tgz", "both/a.tar.gz"):
        write_files(tmp_path, {name: packed})
        source = tmp_path / name.split("/")[0]
        with pytest.raises(SourceError, match=r"is compressed \(\w+\); decompress|unpack them, or"):
            listed(source)


def test_columns_that_differ_between_parquet_files(tmp_path):
    write_parquet(tmp_path / "0.parquet", {"picture": cells("a"), "animal": ["cat"]})
    with pytest.raises(SourceError, match=r"it has picture, animal: .*--image-key NAME"):
        listed(tmp_path)
    flags = {"image_key": "picture", "label_key": "animal"}
    assert listed(tmp_path, **flags) == {"train": {"a.jpg": "cat"}}
    write_parquet(tmp_path / "1.parquet", {"picture": cells("b"), "label": ["cat"]})
    with pytest.raises(SourceError, match=r"1.parquet has no column animal, unlike 0.parquet"):
        listed(tmp_path, **flags)
    with pytest.raises(SourceError, match=r"1.parquet has a column label, unlike 0.parquet"):
        listed(tmp_path, image_key="picture")


# Labels


@pytest.mark.parametrize(
    "text,expected",
    [
        ("0.jpg -1\n1.jpg 2\n2.jpg 10\n", [None, "2", "10"]),
        ("0.jpg\tgreat white\n1.jpg, big tiger\n", ["great white", "big tiger"]),
        ("0.jpg great white\n", r"l.txt, line 1: great white is not one label; separate a path"),
        ("0.jpg,cat,train\n", r"l.txt, line 1: cat,train is not one label"),
        ("img/0.jpg mask/0.png\n", [None]),
        ("0.jpg\t1 2\n", r"l.txt, line 1: 1 2 is not the number or name of one class"),
        ("0.jpg 707-320\n1.jpg 2020-01-01\n", ["707-320", "2020-01-01"]),
        ("0.jpg 1\n1.jpg -2\n", r"l.txt, line 2: -2 is not the number or name of one class"),
        ("0.jpg 1.0\n1.jpg 2.0\n", ["1", "2"]),
        ("a name.jpg\t12\n1.jpg 03\n", ["12", "3"]),
        ("a name.jpg\n1.jpg\n", [None, None]),
        ("\ufeff0.jpg 0\n1.jpg 1\n", ["0", "1"]),
        ("0.jpg,cat\n1.jpg, dog\na, b.jpg cat\n", ["cat", "dog", "cat"]),
        ("0.jpg\tcat\r\n\r\n1.jpg\tdog\r\n", ["cat", "dog"]),
        ("file label\n0.jpg 0\n", "line 1: no file file"),
        ("file,label\n0.jpg,cat\n", "line 1: no file file"),
        ("0.jpg 0\n1.jpg cat\n", "line 2: a name where line 1 has a number"),
        ("0.jpg 0\n1.jpg\n", "line 2: no label where line 1 has a number"),
    ],
)
def test_lists_of_images(tmp_path, text, expected):
    (tmp_path / "l.txt").write_bytes(text.encode())
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            listed(tmp_path / "l.txt")
    else:
        assert list(listed(tmp_path / "l.txt")["train"].values()) == expected


@pytest.mark.parametrize(
    "files,key,expected",
    [
        ({"0.JPG": JPEG, "0.CLS": b"3\n", "1.jpg": JPEG}, None, ["3", None]),
        ({"0.jpg": JPEG, "0.cls": b"\xef\xbb\xbf3\r\n"}, None, ["3"]),
        ({"0.jpg": JPEG, "0.cls": b"0 0 1"}, None, "a.tar: 0.cls: 0 0 1 is not the number or"),
        ({"0.jpg": JPEG, "0.cls": b"1\n2"}, None, "a.tar: 0.cls: 1\n2 is not the number or name"),
        ({"0.jpg": JPEG, "0.cls": b"0.5"}, None, "a.tar: 0.cls: 0.5 is not the number or name"),
        ({"0.jpg": JPEG, "0.cls": b"2,4-D"}, None, ["2,4-D"]),
        ({"0.jpg": JPEG, "0.cls": b"-7"}, None, "a.tar: 0.cls: -7 is not the number or name"),
        ({"0.jpg": JPEG, "0.json": b'{"label": "cat"}'}, None, ["cat"]),
        ({"0.jpg": JPEG, "0.json": b'{"label": null, "x": "dog"}'}, "x", ["dog"]),
        ({"0.jpg": JPEG, "0.json": b'{"label": [2]}'}, None, ["2"]),
        ({"0.jpg": JPEG, "0.target": b"7"}, "target", ["7"]),
        ({"p/train/cat/0.jpg": JPEG, "p/train/dog/1.jpg": JPEG}, "folder", ["cat", "dog"]),
        ({"0.jpg": JPEG}, "archive", ["a"]),
        ({"0.jpg": JPEG, "0.json": b'{"a": 1}'}, "b", "--label-key b: .json has only a"),
        ({"0.jpg": JPEG, "0.cls": b"1 2\xff"}, None, "a.tar: 0.cls: 'utf-8' codec"),
        ({"0.jpg": JPEG, "0.cls": b"9" * 12}, None, "is out of range"),
        ({"0.jpg": JPEG, "0.cls": b"1" * 70_000}, None, "0.cls has 70000 bytes, more than 65536"),
        (
            {"0.jpg": JPEG, "0.cls": b"1", "1.jpg": JPEG, "1.cls": b"cat"},
            None,
            "labels that are numbers, such as 1, and others, such as cat",
        ),
        ({"0.jpg": JPEG, "0.txt": b"1"}, "nope", "--label-key nope: no sample of .* has such"),
        ({"train/cat/0.jpg": JPEG, "val/cat/1.jpg": JPEG}, "folder", "folders of several splits"),
    ],
)
def test_labels_in_web_shards(tmp_path, files, key, expected):
    write_tar(tmp_path / "a.tar", files)
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            listed(tmp_path / "a.tar", label_key=key)
    else:
        assert list(listed(tmp_path / "a.tar", label_key=key)["train"].values()) == expected


def test_splits_as_folders_of_different_archives_are_refused(tmp_path):
    write_tar(tmp_path / "data-0.tar", {"train/cat/0.jpg": JPEG})
    write_tar(tmp_path / "data-1.tar", {"val/cat/1.jpg": JPEG})
    with pytest.raises(SourceError, match="folders of several splits: unpack them"):
        listed(tmp_path)
    assert len(listed(tmp_path, all_train=True)["train"]) == 2


def test_parquet_files_without_labels_are_listed_without_their_images(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"image": [JPEG, JPEG]})
    from pyarrow.parquet import ParquetFile

    monkeypatch.delattr(ParquetFile, "iter_batches")
    assert listed(tmp_path) == {"train": {"a/0": None, "a/1": None}}


@pytest.mark.parametrize(
    "columns,key,expected",
    [
        ({"fine_label": [1, 0], "coarse_label": [5, 5]}, None, ["1", "0"]),
        ({"fine_label": [1, 0], "coarse_label": [5, 5]}, "coarse_label", ["5", "5"]),
        ({"label": [None, -1]}, None, [None, None]),
        ({"label": ["10", "9"]}, None, ["10", "9"]),
        ({"label": [1.0, float("nan")]}, None, ["1", None]),
        ({"label": [1, -2]}, None, "row 1, column label: -2 is not the number or name"),
        ({"label": [float("inf"), 1.0]}, None, "row 0, column label: inf is not the number"),
        ({"label": [0.5, 1.0]}, None, "row 0, column label: 0.5 is not the number or name"),
        ({"label": [[0, 1], [1]]}, None, [None, None]),
        ({"label": [[0, 1], [1]]}, "label", "--label-key label: .* has cells of type list"),
        ({"label": [0, 1]}, "class", "--label-key class: .* has only image, label"),
        ({"image": [cells("0"), cells("1")]}, None, "column image has cells of type list"),
        ({"image": ["0.jpg", "1.jpg"]}, None, "column image has cells of type string"),
        ({"image": [{"path": "0.jpg"}] * 2}, None, "column image has cells of type struct"),
    ],
)
def test_columns_of_a_parquet_file(tmp_path, columns, key, expected):
    write_parquet(tmp_path / "0.parquet", {"image": cells("a", "b")} | columns)
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            listed(tmp_path, label_key=key)
    else:
        assert list(listed(tmp_path, label_key=key)["train"].values()) == expected


@pytest.mark.parametrize(
    "name,text,expected",
    [
        ("metadata.csv", "file_name,label\n0.jpg,a\nd/1.jpg,b\n", {"0.jpg": "a", "d/1.jpg": "b"}),
        (
            "metadata.jsonl",
            '{"file_name": "0.jpg", "label": 3}\n\n',
            {"0.jpg": "3", "d/1.jpg": None},
        ),
        ("metadata.csv", f"file_name,label\n0.jpg,{'a' * 200_000}\n", "larger than field limit"),
        ("metadata.csv", "name,label\n0.jpg,dog\n", "metadata.csv, image 1: no 'file_name'"),
        ("metadata.csv", "file_name,label\n0.jpg,a\n0.jpg,b\n", "0.jpg has two labels, a and b"),
        (
            "metadata.jsonl",
            '{"file_name": "0.jpg"}\n{"file_name": "d/1.jpg", "label": 2}\n',
            {"0.jpg": None, "d/1.jpg": "2"},
        ),
        ("metadata.jsonl", "{\n", "metadata.jsonl, image"),
        ("metadata.csv", "file_name,label\n0.jpg,a,\n1.jpg,a,b\n", "csv, line 3: more cells than"),
    ],
)
def test_labels_in_the_metadata_of_a_folder(tmp_path, name, text, expected):
    write_files(tmp_path, {"0.jpg": JPEG, "d/1.jpg": JPEG, name: text.encode()})
    options = {"label_key": "label"}  # else d is a class folder
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected):
            listed(tmp_path, **options)
    else:
        assert listed(tmp_path, **options) == {"train": expected}


def test_metadata_of_missing_images_is_reported(tmp_path, capsys):
    table = b"file_name,label\n0.jpg,a\n1.jpg,b\n"
    write_files(tmp_path / "s", {"0.jpg": JPEG, "metadata.csv": table})
    assert convert(tmp_path / "s", tmp_path / "out.beton") == 1
    assert "1.jpg: in the metadata of s/, but no such image" in capsys.readouterr().err


def test_classes_agree_by_name_in_both_splits(tmp_path):
    train, val = ({"image": cells(*"ab"), "label": [0, 1]}, {"image": cells("c"), "label": [0]})
    write_parquet(tmp_path / "train.parquet", train, ["cat", "dog"])
    write_parquet(tmp_path / "val.parquet", val, ["dog", "cat"])
    assert listed(tmp_path)["val"] == {"c.jpg": "dog"}
    write_parquet(tmp_path / "val.parquet", val, ["bird"])
    with pytest.raises(SourceError, match="training images: bird"):
        listed(tmp_path)
    write_parquet(tmp_path / "val.parquet", val)  # numbers, which are no positions among names
    with pytest.raises(SourceError, match="training images: 0"):
        listed(tmp_path)


def test_labels_that_are_not_used_are_named_before_the_work(tmp_path, capsys):
    write_tar(tmp_path / "t" / "cat.tar", {"0.jpg": JPEG})
    write_tar(tmp_path / "t" / "dog.tar", {"0.jpg": JPEG})
    assert convert(tmp_path / "t", tmp_path / "out.beton") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "train: not used as labels: names of archives: --label-key archive"
    write_parquet(tmp_path / "p.parquet", {"image": cells("a"), "mask": cells("m"), "kind": [3]})
    assert convert(tmp_path / "p.parquet", tmp_path / "p.beton") == 0
    assert "not used as labels: kind of p.parquet: --label-key kind\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names",
    [
        ("0.jpg", "labels.csv"),
        ("0.jpg", "0.cls"),
        ("0.jpg", "annotations.json"),
        ("c/0.jpg", "Labels.TSV"),
        ("train/0.jpg", "test/1.jpg", "train.csv"),
    ],
)
def test_a_table_of_another_name_is_named(tmp_path, capsys, names):
    *images, table = names
    write_files(tmp_path / "s", dict.fromkeys(images, JPEG) | {table: b"id,label\n0,1\n"})
    assert convert(tmp_path / "s", tmp_path / "out.beton") == 0
    ending = table[table.index(".") :].lower()
    hint = f"train: not used as labels: {ending} files, first {table}: only metadata.csv beside"
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    "files,hint",
    [
        ({"0.json": b'{"ann": {"label": 1}}'}, ".json without the number or name of one class"),
        ({"0.json": b"[1]"}, ".json without the number or name of one class"),
        (
            {"0.json": b'{"label": 1', "1.jpg": JPEG, "1.json": b'{"label": 0}'},
            ".json without the number or name of one class, first 0.json in a.tar",
        ),
        ({"0.cls": b"1", "0.json": b'{"label": 0}'}, ".json of samples with .cls: --label-key and"),
        ({"0.json": b'{"box": {"x": 1}, "l": [1], "k": 1}'}, "k of .json: --label-key k\n"),
        ({"x.csv": b"", "y.csv": b""}, ".csv files, first x.csv in a.tar: labels have to be in"),
        ({"0.target.cls": b"1"}, ".target.cls of samples: --label-key target.cls"),
    ],
)
def test_labels_in_shards_that_are_not_used_are_named(tmp_path, capsys, files, hint):
    write_tar(tmp_path / "a.tar", {"0.jpg": JPEG} | files)
    assert convert(tmp_path / "a.tar", tmp_path / "out.beton") == 0
    assert f"not used as labels: {hint}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [".tar", ".parquet"])
def test_other_files_beside_shards_are_named(tmp_path, capsys, kind):
    def write(name: str) -> None:
        if kind == ".tar":
            write_tar(tmp_path / "s" / name, {f"{name}.jpg": JPEG, f"{name}.cls": b"1"})
        else:
            write_parquet(tmp_path / "s" / name, {"image": cells(name), "label": [1]})

    packed = {".tar.zst": b"\x28\xb5\x2f\xfd", ".tar.gz": b"\x1f\x8b", ".zip": b"PK\x03\x04"}
    (tmp_path / "s").mkdir()
    write(f"train-00000-of-00003{kind}")
    write(f"train-00002-of-00003{kind}")
    for ending in (*packed, ".7z", f"{kind}.incomplete", ".part"):
        other = tmp_path / "s" / f"val-0{ending}"
        other.write_bytes(packed.get(ending, b""))
        with pytest.raises(SourceError, match=f"has val-0{ending} beside its {kind} files: "):
            listed(tmp_path / "s")
        split = find_splits(tmp_path / "s", SourceOptions(train="train-*"))["train"]
        assert split.ignored[f"not named {kind}"] == 1
        other.unlink()
    (tmp_path / "s" / "labels.csv").touch()
    assert convert(tmp_path / "s", tmp_path / "out.beton") == 0
    output = capsys.readouterr().out
    assert f"not used as labels: labels.csv: labels have to be in the {kind} files" in output
    missing = "train: warning: 2 of the 3 files train-...-of-00003 are there"
    assert missing in output and f"+ 1 ignored (1 not named {kind})" in output


@pytest.mark.parametrize(
    "values,expected",
    [
        (["train", "test"], "test, train"),
        (["train", "val"], "train, val"),
        (["trainval", "test"], "test, trainval"),
        (["test", "test"], "test"),
        ([0, 2], "0, 2"),
        (["train", "train"], []),
        (["fold a", "fold b"], ["fold a, fold b"]),
    ],
)
def test_a_column_of_splits_is_not_trained_on(tmp_path, values, expected):
    rows = "".join(f"{index}.jpg,a,{value}\n" for index, value in enumerate(values))
    table = f"file_name,label,split\n{rows}".encode()
    write_files(tmp_path / "f", {"0.jpg": JPEG, "1.jpg": JPEG, "metadata.csv": table})
    for index, value in enumerate(values):  # one file for each value
        columns = {"image": cells(f"{index}"), "split": [value]}
        write_parquet(tmp_path / "p" / f"{index}.parquet", columns)
    for source in (tmp_path / "f", tmp_path / "p"):
        if isinstance(expected, str):
            table = r"/f/metadata\.csv" if source.name == "f" else "/p"
            message = rf"^[^ ]*{table} has a column split with {expected}, which is not used"
            with pytest.raises(SourceError, match=message):
                listed(source)
        else:
            split = find_splits(source)["train"]
            assert len(list(split.images)) == 2
            named = [warning.rpartition(": ")[2] for warning in split.warnings]
            assert named == expected
        assert len(listed(source, all_train=True)["train"]) == 2


def test_a_column_split_of_lists_is_no_column_of_splits(tmp_path):
    write_parquet(tmp_path / "p.parquet", {"image": cells("a", "b"), "split": [["test"], ["val"]]})
    assert len(listed(tmp_path / "p.parquet")["train"]) == 2


def test_folders_that_may_mean_something_else_are_named(tmp_path, capsys):
    write_files(tmp_path / "a", {"0.jpg": JPEG, "thumbs/0.jpg": JPEG})
    assert convert(tmp_path / "a", tmp_path / "a.beton") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "train: warning: images beside the class folders, left out: 1"
    names = ("train/c/0.jpg", "train-backup/c/1.jpg", "val/c/2.jpg")
    write_files(tmp_path / "b", dict.fromkeys(names, JPEG))
    assert convert(tmp_path / "b", tmp_path / "b.beton") == 0
    assert "train: warning: from several folders: train, train-backup" in capsys.readouterr().out
    write_files(tmp_path / "c", dict.fromkeys(("train_0.jpg", "val_0.jpg", "test_0.jpg"), JPEG))
    with pytest.raises(SourceError, match="images whose names state different splits"):
        listed(tmp_path / "c")
    assert len(listed(tmp_path / "c", all_train=True)["train"]) == 3
    write_files(tmp_path / "c", {"tube.jpg": JPEG})
    split = find_splits(tmp_path / "c")["train"]
    assert len(list(split.images)) == 4
    assert [*split.warnings] == ["names of some images state different splits, which is not used"]
    write_files(
        tmp_path / "e", dict.fromkeys(("train/COCO_train_0.jpg", "train/COCO_val_1.jpg"), JPEG)
    )
    write_files(tmp_path / "e", {"val/COCO_val_2.jpg": JPEG})  # folders state the splits
    assert [len(images) for images in listed(tmp_path / "e").values()] == [2, 1]
    write_files(tmp_path / "d", {"__MACOSX/._0.jpg": b"", "cat/0.jpg": JPEG})
    assert find_splits(tmp_path / "d")["train"].class_names == ["cat"]


@pytest.mark.parametrize("out", ["out.beton", "shards"])
def test_images_with_and_without_classes(tmp_path, capsys, out):
    """As in STL-10: labels of -1 stay, in every format and back."""
    write_parquet(tmp_path / "in.parquet", {"image": cells(*"abcd"), "label": [0, -1, None, 1]})
    flags = ["--format", "webdataset"] if out == "shards" else []
    assert convert(tmp_path / "in.parquet", tmp_path / out, *flags) == 0
    assert "4 images, 2 classes; without a class: 2" in capsys.readouterr().out
    assert convert(tmp_path / out, tmp_path / "back.beton") == 0
    assert BetonReader(tmp_path / "back.beton").labels.tolist() == [0, -1, -1, 1]
    if out == "shards":
        from pipelines.webdataset.reader import ShardReader

        assert ShardReader(tmp_path / out).labels.tolist() == [0, -1, -1, 1]


# The account


def account_of(out: Path) -> tuple[int, int, int, int]:
    report = json.loads(out.with_name(f"{out.name}.json").read_bytes())
    ignored = sum(report["ignored"].values())
    return report["found"], report["num_images"], len(report["rejects"]), ignored


NAMES = st.sampled_from(["ok0.jpg", "ok1.JPEG", "bad.jpg", "notes.txt", ".hidden", "ok 2.jpg"])
CLASSES = st.sampled_from(["cat", "dog", "cow"])
PATHS = st.tuples(CLASSES, st.sampled_from(["", "sub/"]), NAMES)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.sets(PATHS, min_size=1, max_size=12), split=st.booleans())
def test_the_account_of_folders_adds_up(tmp_path_factory, paths, split):
    root = tmp_path_factory.mktemp("tree")
    top = root / "source" / ("train" if split else "")
    for folder, below, name in [*paths, ("cat", "", "ok9.jpg")]:
        content = JPEG if name.startswith("ok") else b"no image"
        write_files(top, {f"{folder}/{below}{name}": content})
    files = [Path(folder, name) for folder, _, names in os.walk(top) for name in names]
    paths = [file.relative_to(top) for file in files]
    expected = {str(path): path.parts[0] for path in paths if path.name.startswith("ok")}
    assert convert(root / "source", root / "out.beton", "--skip-broken") == 0
    reader = BetonReader(root / "out.beton")
    names = [*reader.class_names, None]
    assert {reader.name(i): names[reader.label(i)] for i in range(len(reader))} == expected
    num_bad = sum(file.name == "bad.jpg" for file in files)
    rest = len(files) - len(expected) - num_bad
    assert account_of(root / "out.beton") == (len(files), len(expected), num_bad, rest)


SAMPLES = st.tuples(
    st.sampled_from([JPEG, b"broken", None]),  # the image
    st.sampled_from([b"0", b"4", b"-1", None]),  # the label
    st.booleans(),  # a caption beside them
)


@settings(max_examples=20)
@given(samples=st.lists(SAMPLES, min_size=1, max_size=8), shuffled=st.booleans())
def test_the_account_of_shards_and_parquet_files_adds_up(tmp_path_factory, samples, shuffled):
    root = tmp_path_factory.mktemp("samples")
    samples = [(JPEG, b"4", False), *samples]
    files = []
    for key, (image, label, caption) in enumerate(samples):
        parts = {"jpg": image, "cls": label, "txt": b"a" if caption else None}
        files += [(f"s{key}.{kind}", data) for kind, data in parts.items() if data is not None]
    write_tar(root / "a.tar", sorted(files, key=lambda file: file[0][::-1]) if shuffled else files)
    images = [sample[0] for sample in samples]
    labels = [-1 if label is None else int(label) for _, label, _ in samples]
    rows = [{"bytes": image, "path": f"s{key}.jpg"} for key, image in enumerate(images)]
    write_parquet(root / "a.parquet", {"image": rows, "label": labels})
    stored = {f"s{key}.jpg": labels[key] for key, image in enumerate(images) if image == JPEG}
    num_empty = sum(image is None for image in images)
    num_found = sum(any(part for part in sample) for sample in samples)
    for kind, found, rejected in (
        ("tar", num_found, images.count(b"broken")),
        ("parquet", len(rows), images.count(b"broken") + num_empty),
    ):
        out = root / f"{kind}.beton"
        assert convert(root / f"a.{kind}", out, "--skip-broken") == 0
        reader = BetonReader(out)
        assert {reader.name(i): reader.label(i) for i in range(len(reader))} == stored
        ignored = found - len(stored) - rejected
        assert account_of(out) == (found, len(stored), rejected, ignored)


def test_verification_repeats_the_account(tmp_path, capsys):
    write_files(tmp_path / "s", {"a/0.jpg": JPEG, "a/1.txt": b"", "a/2.jpg": b"broken"})
    line = "train: 3 found = 1 stored + 1 rejected + 1 ignored (1 not named like an image)"
    for out, flags in (("out.beton", []), ("shards", ["--format", "webdataset"])):
        out = tmp_path / out
        assert convert(tmp_path / "s", out, "--skip-broken", *flags) == 0
        assert line in capsys.readouterr().out
        assert convert(out, "--verify") == 0
        assert line in capsys.readouterr().out
        path = out / "dataset.json" if flags else tmp_path / "out.beton.json"
        path.write_text(path.read_text().replace('"found": 3', '"found": 4'))
        assert convert(out, "--verify") == 1
        assert "its report: the account does not add up: 4 found" in capsys.readouterr().err
