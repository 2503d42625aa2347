"""tools/ablate.py: a grid survives a kill, and its table and figure say what its runs found."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from conftest import write_beton
from PIL import Image

from bt_fast.ablations import ABLATIONS
from bt_fast.cli import main
from bt_fast.config import load_config
from bt_fast.run.directory import read_metrics

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))  # where a script finds `_checkout`
from tools import ablate, ablate_report  # noqa: E402

TINY = [*tiny_runs.TINY, "--epochs=2", "--workers=1", "--log-every=1", "--save-every=1", "--keep=1"]
NAMES = ("baseline", "cross-entropy")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """64 pictures and 30 held-out ones."""
    folder = tmp_path_factory.mktemp("grid")
    write_beton(folder / "out.val.beton", 30)
    return write_beton(folder / "out.beton", 64)


def start(out: Path, data: Path, *names: str, fault: str = "") -> subprocess.Popen:
    """The grid in a session of its own; `fault` (see `fault_injection`) befalls its first run."""
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / "ablate.py", *names, "--out", out]
        + ["--", *TINY, "--data", data],
        env=os.environ | ({"BT_FAST_FAULT": fault} if fault else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def here(monkeypatch, *arguments) -> int:
    """The same in this process: for what starts no run."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    return ablate.main()


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_tells_what_its_runs_found(data, tmp_path, monkeypatch, capsys):
    out, name = tmp_path / "grid", random.choice(NAMES)
    step = random.randint(1, 6)
    done = NAMES[: NAMES.index(name)]
    if done:
        output, _ = start(out, data, *done).communicate(timeout=300)
        assert "not finished" not in output, output
    # The run waits in that step until grid and run are killed together, as by a power failure.
    killed = start(out, data, *NAMES, fault=f"0:{step}:hang")
    lines = []
    for line in killed.stdout:
        lines.append(line)
        if "BT_FAST_FAULT" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "".join(lines)
    killed.stdout.close()
    again = start(out, data, *NAMES)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    for name_of_run in NAMES:
        assert output.count(f"] {name_of_run}, seed 0") == (name_of_run not in done)

    # As if it had been trained by itself, undisturbed.
    found = json.loads((out / "results.json").read_text())["found"]
    assert list(found) == list(NAMES)
    alone, resumed = tmp_path / "alone", out / f"{name}-seed0"
    flags = [*TINY, "--data", str(data), "--ablation", name, "--run-dir", str(alone)]
    assert main(["pretrain", *flags]) == 0
    records = [[r for _, r in read_metrics(run / "metrics.jsonl")] for run in (alone, resumed)]
    losses = [[r["loss"] for r in of_run if r["kind"] == "train"] for of_run in records]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    probes = [r["knn_20"] for r in records[0] if r["kind"] == "probe"]
    assert found[name]["0"] == {"random": probes[0], "knn": probes[-1]}

    table = (out / "table.md").read_text().splitlines()
    for run, line in zip(NAMES, table[2:4], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert (cells[0], cells[2]) == (run, "1")
        assert cells[3] == f"{100 * found[run]['0']['knn']:.1f}"
        assert float(cells[5]) == ABLATIONS[run].top1
    assert cells[-1] == "-8.1"  # 63.3 - 71.4
    assert "kNN at random initialisation" in table[-1]
    with Image.open(out / "ablations.png") as picture:
        assert picture.width > 600 and len(np.unique(np.array(picture))) > 20

    # Nothing is left to do; other flags, or a folder of somebody else's, end in one line.
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    assert here(monkeypatch, *NAMES, "--out", out, "--", *TINY, "--data", data) == 0
    assert "seed 0," not in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    other = [*TINY, "--data", data, "--lambd=0.1", "--max-steps=3"]
    assert here(monkeypatch, "baseline", "--out", out, "--", *other) == 2
    error = capsys.readouterr().err
    assert "baseline-seed0 was started with other values of --lambd --max-steps" in error
    assert error.count("\n") == 1


def test_the_quick_linear_protocol_is_kept_beside_the_run(labelled_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(labelled_run, run)
    cell = ablate.Cell(name="baseline", seed=0, folder=run, config=load_config(run, "RUN"))
    assert "linear" not in cell.figures()
    ablate.measure(cell)
    (result,) = (run / "eval").glob("linear-cached-*/result.json")
    assert cell.figures()["linear"] == json.loads(result.read_text())["top1"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["table9"], "table9 is neither a grid nor an ablation"),
        ([], "a grid or an ablation is missing"),
        (["table5", "--", "--seed=3"], "--seed=3 after -- is set by ablate.py"),
        (["table5", "--", "--data", "/nowhere.beton"], "/nowhere.beton does not exist"),
        (["table5", "--", "--epohcs", "3"], "perhaps you meant --epochs"),
        (["table5", "--sedes", "3"], "perhaps you meant --seeds"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_the_linear_protocol_asks_for_held_out_images_before_anything_runs(
    small_beton, tmp_path, monkeypatch, capsys
):
    flags = ["--linear", "--out", tmp_path / "out", "--", *TINY, "--data", small_beton]
    assert here(monkeypatch, "table5", *flags) == 2
    assert "--linear needs held-out images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(data, tmp_path, monkeypatch, capsys):
    theirs = tmp_path / "out" / "imax-seed0"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("mine")
    flags = ["--", *TINY, "--data", data]
    assert here(monkeypatch, "imax", "--out", tmp_path / "out", *flags) == 2
    assert "imax-seed0 contains other files" in capsys.readouterr().err
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]


def test_a_run_that_fails_is_named_and_the_others_go_on(data, tmp_path, monkeypatch, capsys):
    statuses = {"baseline": 2, "imax": 0}

    def pretrain(cell, flags) -> int:
        cell.folder.mkdir(parents=True)
        if statuses[cell.name] == 0:
            (cell.folder / "encoder.safetensors").touch()
        return statuses[cell.name]

    monkeypatch.setattr(ablate, "pretrain", pretrain)
    flags = ["--", *TINY, "--data", data]
    assert here(monkeypatch, *statuses, "--out", tmp_path / "out", *flags) == 1
    assert "not finished: baseline, seed 0. Repeat" in capsys.readouterr().err
    assert "| imax | IMAX, lambda 1 | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_seeds_are_summed_up_and_compared_with_the_baseline():
    found = {
        "baseline": {0: {"knn": 0.5, "random": 0.1}, 1: {"knn": 0.7, "random": 0.2}},
        "predictor": {0: {"knn": 0.45, "random": 0.1}},
        "imax": {},
    }
    table = ablate_report.rows(found)
    cells = [row.cells(ablate_report.measured(table)) for row in table]
    assert [c[2:] for c in cells] == [
        ["2", "60.0 ± 14.1", "-", "71.4", "-"],  # the two differ by 20: 20 / sqrt(2)
        ["1", "45.0", "-15.0", "70.2", "-1.2"],
        ["0", "-", "-", "-", "-"],
    ]
