"""A few hundred of the inputs that `tools/fuzz.py` makes by the ten thousand."""

import numpy as np
import pytest

from tools import fuzz

SEED = 20260101


@pytest.mark.parametrize(
    "name,count,refused",
    [
        ("beton", 250, 200),
        ("stock beton", 250, 125),
        ("weights", 150, 140),
        ("image", 300, 100),
    ],
)
def test_no_damage_passes_unnoticed_or_crashes(tmp_path, monkeypatch, name, count, refused):
    monkeypatch.chdir(tmp_path)
    verdicts = fuzz.fuzz(name, count, SEED)
    assert verdicts.total() == count and verdicts.keys() <= {"refused", "read"}
    assert verdicts["refused"] >= refused
    assert not any(tmp_path.iterdir())


def test_undetected_damage_and_crashes_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.beton.BetonReader.checksum_ok", lambda reader, index: True)
    verdicts = fuzz.fuzz("beton", 60, SEED)
    assert verdicts["SILENT"] > 0 and verdicts["CRASH"] == 0
    assert len(list(fuzz.FINDINGS.iterdir())) == verdicts["SILENT"]

    def fail(path):
        raise IndexError("off by one")

    kind = fuzz.Beton(tmp_path)
    monkeypatch.setattr(fuzz, "BetonReader", fail)
    assert fuzz.judge(kind, 0, b"") == ("CRASH", "IndexError: off by one")


def test_mutations_differ_and_repeat():
    data = bytes(range(256)) * 4
    made = [fuzz.mutate(data, np.random.default_rng(number)) for number in range(200)]
    assert made == [fuzz.mutate(data, np.random.default_rng(number)) for number in range(200)]
    assert len(set(made)) > 190
    assert 10 < sum(data.startswith(changed) for changed in made) < 60
