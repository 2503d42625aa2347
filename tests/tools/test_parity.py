"""The comparison with the released code's way: same start, both trained, one table."""

import shutil

import pytest
from conftest import write_beton
from tiny_runs import TINY, metrics

from bt_fast.run.probe import READOUTS
from tools import parity, seeded_runs


@pytest.mark.slow
def test_both_ways_start_equal_and_are_compared(small_beton, tmp_path, capsys):
    flags = [*TINY, "--data", str(small_beton), "--epochs", "1", "--probe-every", "1"]
    options = parity.Options(seeds=(3, 4), out=tmp_path / "parity")
    assert parity.run(options, flags) == 0
    table = capsys.readouterr().out
    probes = {}
    for folder in sorted((tmp_path / "parity").glob("*-seed*")):
        probes[folder.name] = [line for line in metrics(folder) if line["kind"] == "probe"]
        assert [probe["step"] for probe in probes[folder.name]] == [0, 4]
    for seed in (3, 4):  # the same seed initialises the same weights
        first, reference = (probes[f"{way}-seed{seed}"][0] for way in parity.WAYS)
        names = ["knn_20", "linear", "rank", "probe_on_diagonal"]
        assert all(first[name] == pytest.approx(reference[name], rel=1e-5) for name in names)
    # The reference's two runs are in this process.
    assert table.count("probe, before training: kNN k=20 ") == 2
    assert (tmp_path / "parity" / "curves.png").stat().st_size > 0
    for title in (READOUTS["knn_20"], READOUTS["linear"]):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
        assert row.count("|") == 5
    assert parity.run(options, flags) == 0  # finished runs are not repeated
    assert table.endswith(capsys.readouterr().out)
    # A run that was killed after its last probe is not one of them: it starts again.
    killed = tmp_path / "parity" / "reference-seed3"
    (killed / "encoder.safetensors").unlink()
    assert not seeded_runs.probes(killed)
    assert parity.run(options, flags) == 0
    assert "start again at step 0" in capsys.readouterr().out
    again = [line for line in metrics(killed) if line["kind"] == "probe"]
    assert [probe["step"] for probe in again] == [0, 4]


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--grad-scale", "0.5"],
            "the released code's way has --grad-scale 1.0, not --grad-scale 0.5",
        ),
        (["--recipe=imagenet"], "not --grad-scale 0.0625: change .* --recipe cifar10-cpu"),
        (["--init", "x"], "the released code's way has no --init, not --init x"),
        (["--encoder", "timm/vit_tiny_patch16_224"], "the released code's way has a ResNet"),
        (["--dry-run"], "--dry-run after -- is set by the tool"),
        (["--probe-every", "0"], "--probe-every 0 leaves nothing to compare"),
        (["--lambd", "0.1"], "was started with other values of --lambd"),
        (["--probe-images", "9"], "was started with other values of --probe-images"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(
    finished, small_beton, tmp_path, flags, message
):
    shutil.copytree(finished, tmp_path / "bt-fast-seed0")
    options = parity.Options(seeds=(0,), out=tmp_path)
    with pytest.raises(ValueError, match=message):
        parity.run(options, [*TINY, "--data", str(small_beton), "--save-every", "1", *flags])


def test_images_without_classes_are_refused(tmp_path):
    data = write_beton(tmp_path / "data.beton", 20, num_classes=1)
    with pytest.raises(ValueError, match=r"data\.beton has only one class"):
        parity.run(parity.Options(out=tmp_path), [*TINY, "--data", str(data)])


@pytest.mark.filterwarnings("error")
def test_the_interval_is_that_of_the_pairs():
    """By hand: the differences are 1, 2 and 3."""
    runs = {
        "bt-fast": [dict.fromkeys(READOUTS, x / 100) for x in (50.0, 52.0, 54.0)],
        "reference": [dict.fromkeys(READOUTS, x / 100) for x in (49.0, 50.0, 51.0)],
    }
    half = 4.3027 / 3**0.5  # Student's t with 2 degrees of freedom; standard error 1 / sqrt(3)
    expected = f"| +2.00 ({2 - half:+.2f} to {2 + half:+.2f}) |"
    assert parity.table(runs).count(expected) == len(READOUTS)
    equal = dict.fromkeys(runs, runs["reference"])
    one_each = {way: results[:1] for way, results in runs.items()}
    for few, mean in ((equal, "+0.00"), (one_each, "+1.00")):
        assert parity.table(few).count(f"| {mean} (no interval) |") == len(READOUTS)
