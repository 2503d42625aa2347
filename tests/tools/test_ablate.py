"""tools/ablate.py: a grid continues after a kill; its table has the results of its runs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from conftest import write_beton

from bt_fast.cli import main
from bt_fast.config import load_config
from bt_fast.run.directory import read_metrics
from tools import ablate

TINY = [*tiny_runs.TINY, "--epochs=2", "--workers=1", "--log-every=1", "--save-every=1", "--keep=1"]
NAMES = ("baseline", "cross-entropy")


def start(out: Path, data: Path, *names: str, fault: str = "") -> subprocess.Popen:
    """The grid in a new session; `fault` (see `fault_injection`) occurs in its first run."""
    command = [sys.executable, ablate.__file__, *names, "--out", out, "--", *TINY, "--data", data]
    environment = os.environ | ({"BT_FAST_FAULT": fault} if fault else {})
    return tiny_runs.start_command(command, env=environment, start_new_session=True)


def here(monkeypatch, *arguments) -> int:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    return ablate.main()


@pytest.mark.slow
def test_a_killed_grid_continues_with_the_same_results(tmp_path, monkeypatch, capsys):
    write_beton(tmp_path / "out.val.beton", 30)
    data, out, name = write_beton(tmp_path / "out.beton", 64), tmp_path / "grid", NAMES[0]
    # The run waits in a step until grid and run are killed together, as by a power failure.
    killed = start(out, data, *NAMES, fault=f"0:{random.randint(1, 6)}:hang")
    for line in killed.stdout:
        if "BT_FAST_FAULT" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    again = start(out, data, *NAMES)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output

    # As a run that is trained alone and undisturbed.
    found = json.loads((out / "results.json").read_text())["found"]
    alone = tmp_path / "alone"
    flags = [*TINY, "--data", str(data), "--ablation", name, "--run-dir", str(alone)]
    assert main(["pretrain", *flags]) == 0
    runs = alone, out / f"{name}-seed0"
    records = [[r for _, r in read_metrics(run / "metrics.jsonl")] for run in runs]
    losses = [[r["loss"] for r in of_run if r["kind"] == "train"] for of_run in records]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    probes = [r for r in records[0] if r["kind"] == "probe"]
    expected = {key: probes[-1][key] for key in ("knn_20", "linear")}
    assert found[name]["0"] == expected | {"random": probes[0]["knn_20"]}
    assert f"| {name} | " in (out / "table.md").read_text()

    # Nothing is left to do; other flags are an error.
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    assert here(monkeypatch, *NAMES, "--out", out, "--", *TINY, "--data", data) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    other = [*TINY, "--data", data, "--lambd=0.1", "--max-steps=3"]
    assert here(monkeypatch, "baseline", "--out", out, "--", *other) == 2
    assert "started with other values of --max-steps --lambd" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_linear_protocol_is_kept_with_the_run(labelled_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(labelled_run, run)
    cell = ablate.Cell(name="baseline", seed=0, folder=run, config=load_config(run, "RUN"))
    assert "linear_cached" not in cell.figures()
    assert ablate.measure(cell) == 0
    (result,) = (run / "eval").glob("linear-cached-*/result.json")
    assert cell.figures()["linear_cached"] == json.loads(result.read_text())["top1"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["table9"], "table9 is neither a grid nor an ablation"),
        (["--", "--data", "x"], "a grid or an ablation is missing"),
        (["table5", "--seeds", "--", "--data", "x"], "--seeds needs at least one seed, as in"),
        (["table5", "--", "--seed=3"], "--seed=3 after -- is set by the tool"),
        (["table5", "--", "--data", "/nowhere.beton"], "/nowhere.beton does not exist"),
        (["table5", "--", "--epohcs", "3"], "perhaps you meant --epochs"),
        (["width-16", "--", "--projector", "32", "32"], "--projector after -- undoes the ablation"),
        (["baseline", "--out", __file__], "is a file; name a folder"),
    ],
)
def test_an_error_is_one_line(arguments, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(here(monkeypatch, *arguments), message)
    assert not any(tmp_path.iterdir())


def test_seeds_are_averaged_and_compared_with_the_baseline():
    found = {
        "baseline": {0: {"knn_20": 0.5, "random": 0.1}, 1: {"knn_20": 0.7, "random": 0.2}},
        "predictor": {0: {"knn_20": 0.45, "linear": 0.6, "random": 0.1}},
        "imax": {},
    }
    titles, _, *rows = [line.strip("| ").split(" | ") for line in ablate.table(found).splitlines()]
    assert titles[3::2] == ["kNN (k = 20)", "linear", "paper"]
    assert [row[2:] for row in rows] == [
        ["2", "60.0 ± 14.1", "-", "-", "-", "71.4", "-"],  # the two differ by 20: 20 / sqrt(2)
        ["1", "45.0", "-15.0", "60.0", "-", "70.2", "-1.2"],
        ["0", "-", "-", "-", "-", "-", "-"],
    ]
