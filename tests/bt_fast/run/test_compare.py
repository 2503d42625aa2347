"""`bt-fast compare`: results of runs in one table, their curves in one picture."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bt_fast.cli import main
from bt_fast.config import Config, to_json
from bt_fast.recipes import demo
from bt_fast.run.plots import curves


def write_run(folder: Path, config: Config, knn: tuple[float, float]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    train = [
        {"kind": "train", "step": 10 * e, "epoch": e, "loss": 90.0 / e, "on_diagonal": 9.0,
         "off_diagonal": -1.0, "lr_weights": 0.1, "images_per_s": 100.0 * e}
        for e in (1, 2, 4)
    ]  # fmt: skip
    probe = [
        {
            "kind": "probe",
            "step": 40 * e,
            "epoch": 4 * e,
            "knn_20": score,
            "rank": 9.0 + e,
            "probe_on_diagonal": 5.0 + e,
        }
        for e, score in enumerate(knn)
    ]
    lines = [json.dumps(record) + "\n" for record in [*train, *probe]]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_results_and_what_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write_run(tmp_path / "a", Config(), (0.25, 0.5))
    write_run(tmp_path / "b", replace(Config(), seed=3, run_dir=tmp_path / "b"), (0.25, 0.625))
    out = tmp_path / "c.png"
    command = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]
    assert main(command) == 0
    table = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in table.splitlines() if str(tmp_path) in line]
    expected = ["4", "22.5", "25.0", "->"], ["none", "9.0", "->", "10.0", "200"]
    assert rows[0][1:] == ["--seed", "0", *expected[0], "50.0", *expected[1]]
    assert rows[1][1:] == ["--seed", "3", *expected[0], "62.5", *expected[1]]
    assert Image.open(out).size[0] > 1000
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_run_that_diverged_is_compared(tmp_path, capsys):
    run = write_run(tmp_path / "a", Config(), (0.25, 0.5))
    text = (run / "metrics.jsonl").read_text().replace('"loss": 22.5', '"loss": null')
    (run / "metrics.jsonl").write_text(text)
    assert main(["compare", str(run), "--out", str(tmp_path / "c.png")]) == 0
    assert "not finite" in capsys.readouterr().out


def test_a_run_without_log_lines_is_shown_with_its_probe(tmp_path, capsys):
    run = write_run(tmp_path / "a", Config(), (0.25,))
    probe = (run / "metrics.jsonl").read_text().splitlines()[-1]
    (run / "metrics.jsonl").write_text(probe + "\n")
    assert main(["compare", str(run), "--out", str(tmp_path / "c.png")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "25.0" in line]
    assert row.replace("│", " ").split()[-6:] == ["0", "none", "25.0", "none", "9.0", "none"]


def test_what_differs_is_shown_as_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    a = write_run(tmp_path / "a", Config(), (0.25,))
    other = replace(Config(), small_images=True, zero_init=False, projector=(64, 32), max_steps=9)
    b = write_run(tmp_path / "b", other, (0.25,))
    c = write_run(tmp_path / "c", demo(), (0.25,))
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c.png")]) == 0
    cells = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines()[3:-2]]
    assert cells == [
        *("no --max-steps", "--no-small-images", "--zero-init", "--projector 8192 8192 8192"),
        *("--max-steps 9", "--small-images", "--no-zero-init", "--projector 64 32"),
    ]
    assert main(["compare", str(a), str(c), "--out", str(tmp_path / "d.png")]) == 0
    output = capsys.readouterr().out
    assert output.count(" --") == 16 and len(re.findall(r"and \d+ more", output)) == 2


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["a"], "a has no metrics yet"),
        (["a", "b/../a"], "RUN: a run is named twice"),
        (["a", "--out", "nowhere/c.png"], "--out nowhere/c.png: the folder nowhere does not exist"),
        (["a", "--out", "a.png", "--overwrite"], "--out a.png is a folder; name a file in it"),
        (["a", "--out", "a/config.json", "--overwrite"], "a/config.json must end in .png"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_table(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").mkdir()
    for name in "ab":
        run = write_run(tmp_path / name, Config(), ())
        (run / "metrics.jsonl").write_text("")
    assert main(["compare", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and not output.out


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are drawn, not written."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def legend(of) -> list[str]:
    return [text.get_text() for text in of.get_texts()]


def test_curves_mark_the_random_initialisation(tmp_path, drawn):
    run = write_run(tmp_path / "a", Config(), (0.25, 0.5))
    curves({"a": [run / "metrics.jsonl"]}, tmp_path / "c.png")
    by_title = {axis.get_title(): axis for axis in drawn[0].axes}
    readout, baseline, *_ = by_title["readouts, %"].get_lines()
    assert readout.get_ydata().tolist() == [25, 50] and list(baseline.get_ydata()) == [25, 25]
    assert legend(by_title["readouts, %"].get_legend()) == ["kNN, k = 20", "before training"]
    assert by_title["Barlow Twins loss"].get_yscale() == "log"
    terms = by_title["terms of the loss"]
    assert terms.get_yscale() == "linear"  # the off-diagonal term is negative
    assert terms.get_lines()[2].get_ydata().tolist() == [5, 6]
    names = ["on-diagonal", "off-diagonal", "on-diagonal, probe (running statistics)"]
    assert legend(terms.get_legend()) == names and not drawn[0].legends


def test_only_what_was_logged_is_drawn(tmp_path, drawn):
    """A run without probes; nothing of one that has not logged anything."""
    run = write_run(tmp_path / "a", Config(), ())
    (tmp_path / "empty.jsonl").touch()
    for file in (run / "metrics.jsonl", tmp_path / "empty.jsonl"):
        curves({"": [file]}, tmp_path / "c.png")
    (figure,) = drawn
    titles = ["Barlow Twins loss", "terms of the loss", "learning rate (weights)", "images/s"]
    assert [axis.get_title() for axis in figure.axes] == titles
    assert legend(figure.axes[1].get_legend()) == ["on-diagonal", "off-diagonal"]


def test_runs_of_one_name_share_a_colour(tmp_path, drawn):
    files = [write_run(tmp_path / name, Config(), (0.25, 0.5)) / "metrics.jsonl" for name in "abc"]
    curves({"ours": files[:2], "theirs": files[2:]}, tmp_path / "c.png")
    colours = [line.get_color() for line in drawn[0].axes[0].get_lines()]
    assert colours == ["C0", "C0", "C1"]
    assert legend(drawn[0].legends[0]) == ["ours", "theirs"]
