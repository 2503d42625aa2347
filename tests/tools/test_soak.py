"""tools/soak.py on a small scale: a few kills, and that it would notice what it is there for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.soak_runs import contents, early_and_late, equal

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_two_kills_and_nothing_is_lost(small_beton, tmp_path):
    out = tmp_path / "soak"
    flags = ["--minutes", "0", "--kills", "2", "--kills-per-run", "2", "--epochs", "3"]
    command = [sys.executable, ROOT / "tools" / "soak.py", *flags]
    command += ["--data", small_beton, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "soak.json").read_text())
    assert report["kills"] == sum(report["by signal"].values()) >= 2
    assert report["runs that did not resume"] == report["runs with differing results"] == []
    assert report["undisturbed, open files, early and late"][1] < 100

    # It would find a last bit that differs, and a line.
    run = out / "run-1"
    names = ("model", "optimizer", "encoder", "metrics")
    before = dict(zip(names, contents(run), strict=True))
    file = max((run / "checkpoints").iterdir()) / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    save_file(tensors, file)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    after = dict(zip(names, contents(run), strict=True))
    found = [name for name in names if not equal(before[name], after[name])]
    assert found == ["model", "metrics"]


def test_early_and_late():
    values = [900.0] * 10 + [100.0] * 10 + [50.0] * 70 + [120.0] * 10
    assert early_and_late(values) == (100.0, 120.0)
    assert early_and_late([7]) == (7, 7)
