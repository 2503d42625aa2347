"""tools/soak.py on a small scale: a few kills, and the differences that it detects."""

import json

import pytest
import torch
from conftest import run_python
from safetensors.torch import load_file, save_file

from tools import soak

pytestmark = pytest.mark.slow


def test_runs_resume_after_kills_with_equal_results(tmp_path):
    out = tmp_path / "soak"
    flags = ["--minutes=0", "--kills=2", "--kills-per-run=2", "--images=96", "--epochs=3"]
    done = run_python(soak.__file__, *flags, f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "soak.json").read_text())
    assert sum(report["kills"].values()) >= 2
    assert not report["runs that did not resume"] and not report["runs with different results"]

    # A last bit that differs is detected, and a missing line.
    run = out / "run-1"
    file = max((run / "checkpoints").iterdir()) / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv1.weight"].view(torch.int32)[0, 0, 0, 0] ^= 1
    save_file(tensors, file)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert soak.differences(run, out / "undisturbed") == ["model", "metrics"]
