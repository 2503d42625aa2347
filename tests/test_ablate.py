"""tools/ablate.py: a grid survives a kill, and its table and figure say what its runs found."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_beton
from PIL import Image

from bt_fast.ablations import ABLATIONS
from bt_fast.cli import main
from bt_fast.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))  # where a script finds `_checkout`
from tools import ablate, ablate_report  # noqa: E402

TINY = [
    "--recipe=demo", "--device=cpu", "--precision=fp32", "--encoder=resnet18", "--size=32",
    "--batch-size=16", "--projector", "32", "32", "--epochs=3", "--warmup-epochs=1",
    "--workers=1", "--probe-every=3", "--log-every=1", "--save-every=1",
]  # fmt: skip
NAMES = ("baseline", "cross-entropy")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """64 pictures and 30 held-out ones."""
    folder = tmp_path_factory.mktemp("grid")
    write_beton(folder / "out.val.beton", 30)
    return write_beton(folder / "out.beton", 64)


def start(out: Path, data: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "tools" / "ablate.py", *NAMES, "--linear", "--out", out]
        + ["--", *TINY, "--data", data],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def here(monkeypatch, *arguments) -> int:
    """The same in this process: for what starts no run."""
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    return ablate.main()


def test_a_killed_grid_goes_on_and_tells_what_its_runs_found(data, tmp_path, monkeypatch, capsys):
    out, name = tmp_path / "grid", random.choice(NAMES)
    step = random.randint(1, 10)
    print("killed at step", step, "of", name)
    killed = start(out, data)
    deadline = time.monotonic() + 300
    checkpoints = out / f"{name}-seed0" / "checkpoints"
    while not any(checkpoints.glob(f"step-{step:08d}")):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    again = start(out, data)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    for name_of_run in NAMES:
        begun = output.count(f"] {name_of_run}, seed 0")
        assert begun == (0 if (name, name_of_run) == ("cross-entropy", "baseline") else 1)

    found = json.loads((out / "results.json").read_text())["found"]
    assert list(found) == list(NAMES)
    for run in NAMES:  # as if each had been trained by itself, undisturbed
        alone = tmp_path / run
        flags = [*TINY, "--data", str(data), "--ablation", run, "--run-dir", str(alone)]
        assert main(["pretrain", *flags]) == 0
        kinds = [
            [r for _, r in read_metrics(f / "metrics.jsonl")] for f in (alone, out / f"{run}-seed0")
        ]
        losses = [[r["loss"] for r in records if r["kind"] == "train"] for records in kinds]
        assert losses[0] == losses[1] and len(losses[0]) == 12
        probes = [r["knn_20"] for r in kinds[0] if r["kind"] == "probe"]
        assert (found[run]["0"]["random"], found[run]["0"]["knn"]) == (probes[0], probes[-1])
        assert 0 <= found[run]["0"]["linear"] <= 1

    table = (out / "table.md").read_text().splitlines()
    for run, line in zip(NAMES, table[2:4], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        knn, linear = (100 * found[run]["0"][key] for key in ("knn", "linear"))
        assert cells[0] == run and cells[2] == "1"
        assert (cells[3], cells[5]) == (f"{knn:.1f}", f"{linear:.1f}")
        assert float(cells[7]) == ABLATIONS[run].top1
    assert cells[-1] == "-8.1"  # 63.3 - 71.4
    assert "kNN at random initialisation" in table[-1]
    with Image.open(out / "ablations.png") as picture:
        assert picture.width > 600 and len(set(picture.convert("L").getdata())) > 20

    # Nothing is left to do; other flags, or a folder of somebody else's, end in one line.
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    assert here(monkeypatch, *NAMES, "--linear", "--out", out, "--", *TINY, "--data", data) == 0
    assert "seed 0," not in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoints/*")}
    other = [*TINY, "--data", data, "--lambd=0.1", "--max-steps=3"]
    assert here(monkeypatch, "baseline", "--out", out, "--", *other) == 2
    told = capsys.readouterr().err
    assert "baseline-seed0 was begun with other --lambd --max-steps" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["table9"], "table9 is neither a grid nor an ablation"),
        ([], "needs a grid or an ablation"),
        (["table5", "--", "--seed=3"], "--seed=3 after -- is chosen by ablate.py"),
        (["table5", "--", "--data", "/nowhere.beton"], "/nowhere.beton does not exist"),
        (["table5", "--", "--epohcs", "3"], "perhaps you meant --epochs"),
        (["table5", "--sedes", "3"], "perhaps you meant --seeds"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert here(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_left_alone(data, tmp_path, monkeypatch, capsys):
    theirs = tmp_path / "out" / "imax-seed0"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("mine")
    flags = ["--", *TINY, "--data", data]
    assert here(monkeypatch, "imax", "--out", tmp_path / "out", *flags) == 2
    assert "imax-seed0 is no run" in capsys.readouterr().err
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
    assert "not finished: baseline, seed 0. The same" in capsys.readouterr().err
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
