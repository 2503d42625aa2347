"""`bt-fast curate`: planted copies are found, lists and report agree, nothing is overwritten."""

import csv
import re
from pathlib import Path

import pytest
from conftest import drawn_picture, jpeg_bytes, write_beton
from html_page import Page

from bt_fast.cli import main
from bt_fast.evaluate import eval_setup
from pipelines.beton import BetonReader
from pipelines.common.atomic import locked
from pipelines.convert import command

FLAGS = ["--device=cpu", "--precision=fp32", "--workers=1", "--size=32"]


def curate(run: Path, out: Path, *flags: str) -> int:
    return main(["curate", str(run), "--out", str(out), *FLAGS, *flags])


def pairs(out: Path, images: str) -> set[tuple[str, str]]:
    rows = csv.DictReader((out / "pairs.csv").open())
    return {(row["first"], row["second"]) for row in rows if row["images"] == images}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """40 training and 20 held-out images; some are saved again at another quality."""
    root = tmp_path_factory.mktemp("planted")
    copies = {"train/a/copy.jpg": 3, "train/b/copy.jpg": 7, "val/a/copy.jpg": 5}
    for split, count, start in (("train", 38, 0), ("val", 19, 100)):
        for index in range(count):
            path = root / split / "ab"[index % 2] / f"{index:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg_bytes(drawn_picture(start + index, 48, 48)))
    for name, seed in copies.items():
        (root / name).write_bytes(jpeg_bytes(drawn_picture(seed, 48, 48), quality=80))
    assert command.main([str(root), str(root / "x.beton"), "--workers=1"]) == 0
    return root / "x.beton"


def test_planted_copies_are_found_and_nothing_else(labelled_run, planted, tmp_path, capsys):
    out = tmp_path / "out"
    assert curate(labelled_run, out, "--data", str(planted), "--by", "semdedup") == 0
    assert pairs(out, "across") == {("a/copy.jpg", "b/05.jpg")}
    found = {frozenset(pair) for pair in pairs(out, "train")}
    assert found == {frozenset(("b/03.jpg", "a/copy.jpg")), frozenset(("b/07.jpg", "b/copy.jpg"))}
    assert pairs(out, "val") == set()
    assert (out / "overlap.txt").read_text() == "b/05.jpg\n"
    reader, listed = BetonReader(planted), (out / "keep.txt").read_text().splitlines()
    dropped = {reader.name(i) for i in range(len(reader))} - set(listed)
    pairs_of_copies = {"b/03.jpg", "a/copy.jpg"}, {"b/07.jpg", "b/copy.jpg"}
    assert [len(dropped & pair) for pair in pairs_of_copies] == [1, 1] and len(dropped) == 2
    assert len(list(csv.DictReader((out / "outliers.csv").open()))) == len(reader)
    # The list is one that bt-convert reads.
    flags = ["--workers=1", "--include", f"{out}/keep.txt"]
    assert command.main([str(planted), f"{tmp_path}/kept.beton", *flags]) == 0
    kept = BetonReader(tmp_path / "kept.beton")
    assert [kept.name(i) for i in range(len(kept))] == listed
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "1 pairs" in shown and "2 pairs" in shown and "38 of 40 by semdedup" in shown


def test_features_are_reused_and_results_are_not_overwritten_unasked(
    labelled_run, planted, tmp_path, monkeypatch, capsys, refused
):
    out = tmp_path / "out"
    data = ("--data", str(planted))
    assert curate(labelled_run, out, *data, "--by", "random", "--fraction", "0.25") == 0
    first = (out / "keep.txt").read_text()
    assert len(first.splitlines()) == 10
    refused(curate(labelled_run, out, *data), "--overwrite")
    monkeypatch.setattr(eval_setup, "extract_features", None)  # would fail
    again = ("--by", "random", "--fraction", "0.25", "--seed", "1", "--overwrite")
    assert curate(labelled_run, out, *data, *again) == 0
    assert (out / "keep.txt").read_text() != first
    assert curate(labelled_run, out, *data, "--by=balanced", "--fraction=0.5", "--overwrite") == 0
    assert len((out / "keep.txt").read_text().splitlines()) == 20
    assert curate(labelled_run, out, *data, "--overwrite") == 0
    assert not (out / "keep.txt").exists()  # of another command
    with locked(out):
        assert curate(labelled_run, out, *data, "--overwrite") == 2
    assert f"--out {out} is being written by another process" in capsys.readouterr().err


def test_the_report_opens_offline_and_is_the_same_again(labelled_run, planted, tmp_path):
    pages = []
    for name in ("one", "two"):
        flags = ("--data", str(planted), "--by", "semdedup", "--fraction", "0.5")
        assert curate(labelled_run, tmp_path / name, *flags) == 0
        pages.append((tmp_path / name / "report.html").read_text())
    page = Page(pages[0])
    assert "script" not in page.tags and len(page.sources) > 50
    assert all(source.startswith("data:") for source in page.sources)
    assert pages[0] == pages[1]
    for text in ("Near duplicates: held-out and training images", "Outliers", "Subset: semdedup"):
        assert text in pages[0]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--fraction=0.5"], "--fraction needs --by semdedup, balanced or random"),
        (["--by=random"], "--by random needs --fraction, such as --fraction 0.5"),
        (["--by=random", "--fraction=0.01"], "--fraction 0.01 keeps fewer than two images"),
        (["--threshold=1.5"], "--threshold must be in (0, 1], got 1.5"),
        (["--clusters=0"], "--clusters must be at least 1, got 0"),
    ],
)
def test_a_wrong_flag_leaves_nothing(labelled_run, tmp_path, flags, message, refused):
    refused(curate(labelled_run, tmp_path / "out", *flags), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name,message",
    [("same.jpg", "several images have the same name"), ("{}\n.jpg", "does not fit into one line")],
)
def test_names_that_cannot_be_listed(labelled_run, tmp_path, monkeypatch, refused, name, message):
    data = write_beton(tmp_path / "x.beton", 16)
    monkeypatch.setattr(BetonReader, "name", lambda self, index: name.format(index))
    refused(curate(labelled_run, tmp_path / "out", "--data", str(data)), message)
    assert not [*tmp_path.rglob("pairs.csv")]
