"""The comparison with the released code's way: same start, both trained, one table."""

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY

from bt_fast.run.probe import READOUTS

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # where a script finds `_checkout`
from tools import parity


@pytest.mark.slow
def test_both_ways_start_equal_and_are_compared(small_beton, tmp_path, capsys):
    flags = [*TINY, "--data", str(small_beton), "--epochs", "1", "--probe-every", "1"]
    options = parity.Options(seeds=(3, 4), out=tmp_path / "parity")
    assert parity.run(options, flags) == 0
    table = capsys.readouterr().out
    probes = {}
    for folder in sorted((tmp_path / "parity").glob("*-seed*")):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        probes[folder.name] = [record for record in records if record["kind"] == "probe"]
        assert [probe["step"] for probe in probes[folder.name]] == [0, 4]
    for seed in (3, 4):  # the same seed initialises the same weights
        first, reference = (probes[f"{way}-seed{seed}"][0] for way in parity.WAYS)
        assert all(first[name] == pytest.approx(reference[name]) for name in READOUTS)
    assert (tmp_path / "parity" / "curves.png").stat().st_size > 0
    for title in READOUTS.values():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
        assert row.count("|") == 5
    assert parity.run(options, flags) == 0  # finished runs are not repeated
    assert table.endswith(capsys.readouterr().out)


def test_the_interval_is_welchs():
    """Against scipy's formula written out: means 52 and 50, three runs each."""
    runs = {
        "bt-fast": [dict.fromkeys(READOUTS, x / 100) for x in (50.0, 52.0, 54.0)],
        "reference": [dict.fromkeys(READOUTS, x / 100) for x in (50.0, 50.0, 50.0)],
    }
    # Standard error 2 / sqrt(3), 2 degrees of freedom: t = 4.3027.
    half = 4.3027 * 2 / 3**0.5
    expected = f"| +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) |"
    assert parity.table(runs).count(expected) == len(READOUTS)
