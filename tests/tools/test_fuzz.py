"""A few hundred of the inputs that `tools/fuzz.py` makes by the ten thousand."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tools.fuzz_judge import judge, mutate
from tools.fuzz_targets import TARGETS

TOOL = Path(__file__).parents[2] / "tools" / "fuzz.py"
SEED = 20260101


@pytest.mark.parametrize(
    "name,count,refused",
    [
        ("beton", 150, 100),
        ("forged beton", 150, 50),
        ("checkpoint", 150, 140),
        ("forged checkpoint", 150, 100),
        ("weights", 150, 140),
        ("image", 300, 100),
    ],
)
def test_no_damage_passes_unnoticed_or_crashes(tmp_path, name, count, refused):
    target = TARGETS[name](tmp_path)
    verdicts: Counter[str] = Counter()
    for number in range(count):
        verdict, message, _ = judge(target, number, SEED)
        assert verdict not in ("SILENT", "CRASH"), f"number {number}: {message}"
        verdicts[verdict] += 1
    assert verdicts["refused"] >= refused


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_whole_is_unharmed(tmp_path, name):
    """Else every verdict above would be one on the reader, not on the damage."""
    if name == "weights":
        pytest.skip("the files of weights are too small to be a ResNet on purpose")
    target = TARGETS[name](tmp_path)
    for original, data in enumerate(target.originals):
        assert target.judge(original, data, False) == ("unharmed", "")


def test_the_judge_sees_what_it_looks_for(tmp_path, monkeypatch):
    """Without the checksums there is silent damage, and crashes are crashes."""
    monkeypatch.setattr("pipelines.beton.BetonReader.checksum_ok", lambda reader, index: True)
    target = TARGETS["beton"](tmp_path)
    verdicts = [judge(target, number, SEED)[0] for number in range(60)]
    assert "SILENT" in verdicts

    def fail(path):
        raise IndexError("off by one")

    monkeypatch.setattr("tools.fuzz_targets.BetonReader", fail)
    assert judge(target, 0, SEED)[:2] == ("CRASH", "IndexError: off by one")


def test_mutations_differ_and_repeat():
    data = bytes(range(256)) * 4
    made = [mutate(data, np.random.default_rng(number)) for number in range(200)]
    assert made == [mutate(data, np.random.default_rng(number)) for number in range(200)]
    assert len({changed for changed, _ in made}) > 190
    cut = [changed for changed, is_cut in made if is_cut]
    assert 20 < len(cut) < 120 and all(0 < len(changed) < len(data) + 100 for changed in cut)


def test_the_command(tmp_path):
    command = [sys.executable, TOOL, "--count=20", "--kinds", "image", "--workers=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "image: 20 mutated inputs" in done.stdout and not list(tmp_path.iterdir())
