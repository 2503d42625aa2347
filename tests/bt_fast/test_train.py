"""Runs end to end on a CPU, and the files they write."""

import json

import numpy as np
import pytest
import torch
from conftest import write_beton
from PIL import Image
from tiny_runs import learned, metrics, pretrain

from bt_fast.cli import main
from bt_fast.run.probe import READOUTS


def test_a_run_leaves_everything_in_its_directory(finished):
    records = metrics(finished)
    train_steps = [record["step"] for record in records if record["kind"] == "train"]
    assert train_steps == [1, 2, 4, 6, 8, 10, 12]
    for record in records:
        if record["kind"] == "train":
            expected = record["on_diagonal"] + 5e-3 * record["off_diagonal"]
            assert record["loss"] == pytest.approx(expected)
            assert record["images_per_s"] > 0 and record["skipped"] == 0
    probes = [record for record in records if record["kind"] == "probe"]
    assert [record["step"] for record in probes] == [0, 8, 12]
    # 58 images to compare with are too few for 200 neighbours.
    readouts = READOUTS.keys() - {"knn_200"}
    assert [record.keys() & READOUTS.keys() for record in probes] == 3 * [readouts]
    assert all(0 <= record[name] <= 1 for record in probes for name in readouts)
    assert all(1 <= record["rank"] <= 512 for record in probes)
    assert all(record["probe_on_diagonal"] > 0 for record in probes)
    for name in ("views.png", "curves.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 300 and len(np.unique(np.array(picture))) > 20
    assert json.loads((finished / "config.json").read_text())["projector"] == [32, 32]
    assert json.loads((finished / "environment.json").read_text())[0]["torch"]
    assert any((finished / "tensorboard").iterdir())
    assert len(list((finished / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_another_seed_gives_another_run(small_beton, finished, tmp_path):
    assert pretrain("--data", small_beton, "--run-dir", tmp_path / "b", "--seed", 1) == 0
    name = "model/encoder.conv1.weight"
    assert not torch.equal(learned(finished)[name], learned(tmp_path / "b")[name])


@pytest.mark.slow
def test_learning_happens(tmp_path):
    """Coloured squares: the loss falls."""
    data = write_beton(tmp_path / "data.beton", 96)
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--epochs", 10, "--probe-every", 0)
    assert pretrain(*flags) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert np.mean(losses[len(losses) // 2 :]) < 0.8 * losses[0]


def test_images_without_classes_have_the_readouts_without_labels(tmp_path):
    data = write_beton(tmp_path / "data.beton", 20, num_classes=1)
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--epochs", 1)
    assert pretrain(*flags) == 0
    probes = [record for record in metrics(tmp_path / "run") if record["kind"] == "probe"]
    names = {"kind", "step", "epoch", "seconds"}
    assert [record.keys() - names for record in probes] == 2 * [
        {"rank", "probe_on_diagonal", "probe_off_diagonal"}
    ]


@pytest.mark.slow
@pytest.mark.parametrize("minutes,epochs", [(1e-6, [0, 1, 2, 3]), (1e6, [0, 3])])
def test_probes_by_time_are_at_ends_of_epochs(small_beton, tmp_path, minutes, epochs):
    """And before the first step and after the last."""
    flags = ["--data", small_beton, "--run-dir", tmp_path, "--epochs", 3, "--probe-every", 0]
    assert pretrain(*flags, "--probe-minutes", minutes) == 0
    probes = [record["epoch"] for record in metrics(tmp_path) if record["kind"] == "probe"]
    assert probes == epochs


@pytest.mark.parametrize("flags,index", [([], -1), (["--random"], 0)])
def test_eval_knn_equals_the_first_and_the_last_probe(finished, capsys, flags, index):
    assert main(["eval", "knn", str(finished), "--device=cpu", "--precision=fp32", *flags]) == 0
    probe = [record for record in metrics(finished) if record["kind"] == "probe"][index]
    output = capsys.readouterr().out
    assert f"{100 * probe['knn_20']:.2f} %" in output and "k = 200" not in output
    assert f"RankMe {probe['rank']:.1f}," in output


@pytest.mark.slow
def test_the_papers_model_runs_on_a_cpu(tmp_path):
    """ResNet-50, 224 px, projector 8192 x 3: two steps of batch 8."""
    data = write_beton(tmp_path / "data.beton", 16, sizes=((300, 400),))
    flags = ["--data", data, "--run-dir", tmp_path / "run", "--batch-size=8", "--max-steps=2"]
    flags += ["--device=cpu", "--probe-every=0"]
    assert main(["pretrain", *map(str, flags)]) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == 2 and all(np.isfinite(losses))
