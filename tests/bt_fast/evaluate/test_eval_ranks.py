"""Evaluations on several ranks have the results of one process."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from safetensors.torch import load_file

from bt_fast.cli import main
from bt_fast.distributed.collectives import ALONE, gather_slices
from bt_fast.evaluate.supervised import Classifier, _sum_gradients
from bt_fast.export.encoder_files import load_encoder
from bt_fast.models import batch_norm
from bt_fast.models.networks import build_encoder
from bt_fast.run.directory import read_metrics

COMMON = ["--device=cpu", "--precision=fp32", "--workers=1"]
# Three ranks have unequal slices of every batch: 64 images are four batches of 14 and one of 8, and
# 32 images for fine-tuning divide into 11, 11, 10.
RANKS = (1, 3)
LINEAR = ["linear", "--epochs=2", "--batch-size=14", "--lr=1"]
SEMI = ["semi", "--percent=50", "--epochs=2", "--batch-size=32"]


def evaluate(run, out, ranks: int, command: str, *flags: str) -> int:
    flags = (*COMMON, *flags, "--out", str(out), "--gpus", str(ranks))
    return main(["eval", command, str(run), *flags])


def classifier(out) -> dict[str, torch.Tensor]:
    (file,) = out.glob("*/classifier.safetensors")
    return load_file(file)


def result(out) -> dict:
    (file,) = out.glob("*/result.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_frozen_encoder_has_the_result_of_one_process(labelled_run, tmp_path, capfd):
    for ranks in RANKS:
        assert evaluate(labelled_run, tmp_path / f"{ranks}", ranks, *LINEAR) == 0
        output = capfd.readouterr().out
        assert output.count("top-1 of 30") == 1 and output.count("epoch 2 of 2") == 1
    alone, shared = (classifier(tmp_path / f"{ranks}") for ranks in RANKS)
    for name, value in alone.items():
        assert (shared[name] - value).norm() <= 1e-4 * value.norm(), name
    assert result(tmp_path / "3") == result(tmp_path / "1")


@pytest.mark.slow
def test_fine_tuning_has_the_result_of_one_process_with_its_batch_norms(labelled_run, tmp_path):
    """In float32 the ranks' sums round differently, by 6e-6 of a parameter's change. Where that
    moves an activation across a ReLU's zero it becomes 2e-2, which depends on the processor: so one
    seed of five must agree. A wrong statistic or gradient differs with every seed; a single step is
    held to 1e-8 in float64 below."""
    before = load_encoder(labelled_run).state_dict()
    largest = []
    for seed in range(5):
        for ranks in RANKS:
            out = tmp_path / f"{seed}-{ranks}"
            assert evaluate(labelled_run, out, ranks, *SEMI, f"--seed={seed}") == 0
        alone, shared = (classifier(tmp_path / f"{seed}-{ranks}") for ranks in RANKS)
        assert shared.keys() == alone.keys()
        differences = []  # relative to the change by training
        for name in ("layer3.1.bn1.bias", "layer4.1.bn1.running_var", "layer4.1.bn1.bias"):
            value, start = alone[f"encoder.{name}"], before[name]
            moved = (value - start).norm()
            assert moved > 1e-3 * start.norm(), name
            differences.append(float((shared[f"encoder.{name}"] - value).norm() / moved))
        largest.append(max(differences))
        if largest[-1] <= 1e-3:
            return
    pytest.fail(f"differences with five seeds: {largest}")


@pytest.mark.slow
def test_features_of_the_quick_protocol_are_read_by_all_ranks(labelled_run, tmp_path, capfd):
    flags = ["linear", "--cached", "--views=2", "--epochs=2"]
    for ranks in RANKS:
        assert evaluate(labelled_run, tmp_path / f"{ranks}", ranks, *flags) == 0
        assert capfd.readouterr().out.count("top-1 of 30") == 1
    alone, shared = (
        {file.name: np.load(file) for file in (tmp_path / f"{ranks}" / "features").iterdir()}
        for ranks in RANKS
    )
    assert len(alone) == 3 and alone.keys() == shared.keys()  # two views of train, one of val
    for name, features in alone.items():
        assert np.allclose(shared[name], features, rtol=1e-2, atol=1e-3), name  # half precision
    assert result(tmp_path / "3") == result(tmp_path / "1")
    assert evaluate(labelled_run, tmp_path / "3", 3, *flags) == 0
    assert "already finished" in capfd.readouterr().out


def test_knn_has_the_result_of_one_process(labelled_run, tmp_path, capfd):
    tables = []
    for ranks in (1, 2):
        flags = ["knn", "--augmented", "--collapse"]
        assert evaluate(labelled_run, tmp_path, ranks, *flags) == 0
        tables.append(capfd.readouterr().out)
    assert "kNN, k = 20" in tables[0] and tables[1] == tables[0]


@pytest.mark.slow
def test_more_ranks_than_images_of_a_batch(labelled_run, tmp_path, capfd):
    assert evaluate(labelled_run, tmp_path, 5, "linear", "--batch-size=4") == 2
    assert capfd.readouterr().err == (
        "bt-fast eval linear: --batch-size 4 is less than the number of ranks\n"
    )


COUNTS = (5, 2, 0)  # images of each rank


def tuned_step(world, counts: tuple[int, ...]) -> tuple[dict, dict]:
    """Gradients and state of a fine-tuned classifier in float64, the batch divided among ranks."""
    torch.manual_seed(0)
    images, labels = torch.randn(7, 3, 32, 32, dtype=torch.float64), torch.arange(7) % 3
    model = Classifier(build_encoder("resnet18"), 512, 3, seed=0).double().train()
    torch.nn.init.constant_(model.encoder.layer4[1].bn2.weight, 0.5)  # zero would hide a branch
    batch_norm.convert_sync_batch_norm(model, world.group)
    local = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
    loss = F.cross_entropy(model(images[local]), labels[local], reduction="sum") / 7
    loss.backward()
    _sum_gradients(list(model.parameters()), world)
    return {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


@pytest.mark.slow
def test_a_batch_divided_unequally_has_the_gradients_of_one_process():
    """The last batch of an epoch; a rank may have no image of it."""
    expected = tuned_step(ALONE, (7,))
    for results in run_ranks(3, tuned_step, COUNTS):
        for theirs, ours in zip(expected, results, strict=True):
            assert theirs.keys() == ours.keys()
            for name, value in theirs.items():
                assert torch.allclose(ours[name], value, rtol=1e-8, atol=1e-12), name


def shares(world, counts: tuple[int, ...]) -> list[torch.Tensor]:
    """Rows after they were divided among ranks and gathered."""
    return [
        gather_slices(
            torch.from_numpy(world.local_slice(np.arange(2 * n).reshape(n, 2))), n, world.group
        )
        for n in counts
    ]


@pytest.mark.slow
def test_gathered_slices_are_in_order():
    counts = (1, 2, 3, 4, 7)
    for results in run_ranks(3, shares, counts):
        for n, rows in zip(counts, results, strict=True):
            assert torch.equal(rows, torch.arange(2 * n).view(n, 2))


@pytest.mark.slow
def test_the_probe_of_a_run_finds_the_same_on_any_number_of_ranks(labelled_run, tmp_path):
    data = labelled_run.parent / "train.beton"
    flags = ["--recipe=demo", "--size=32", "--batch-size=16", "--max-steps=1", *COMMON]
    flags += ["--projector", "32", "32", "--data", str(data)]
    probes = []
    for ranks in (1, 2):
        run = tmp_path / f"{ranks}"
        assert main(["pretrain", *flags, "--gpus", str(ranks), "--run-dir", str(run)]) == 0
        records = [record for _, record in read_metrics(run / "metrics.jsonl")]
        probes.append([record for record in records if record["kind"] == "probe"])
    for alone, shared in zip(*probes, strict=True):
        for name in ("step", "knn_20", "knn_200"):
            assert shared[name] == pytest.approx(alone[name], abs=1.5 / 30), name  # one image
