"""Evaluations on several ranks have the results of one process."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny_runs import classifier, evaluate, result

from bt_fast.distributed.collectives import ALONE
from bt_fast.evaluate.supervised import Classifier, _sum_gradients
from bt_fast.export.encoder_files import load_encoder
from bt_fast.models import batch_norm
from bt_fast.models.networks import build_encoder

# Three ranks have unequal slices of every batch: 64 images are four batches of 14 and one of 8, and
# 32 images for fine-tuning divide into 11, 11, 10.
RANKS = (1, 3)
LINEAR = ["linear", "--epochs=2", "--batch-size=14", "--lr=1"]
SEMI = ["semi", "--percent=50", "--epochs=2", "--batch-size=32"]


@pytest.mark.slow
def test_a_frozen_encoder_has_the_result_of_one_process(labelled_run, tmp_path, capfd):
    for ranks in RANKS:
        assert evaluate(labelled_run, tmp_path / f"{ranks}", *LINEAR, f"--gpus={ranks}") == 0
        output = capfd.readouterr().out
        assert output.count("top-1 of 30") == 1 and output.count("epoch 2 of 2") == 1
    alone, shared = (classifier(tmp_path / f"{ranks}") for ranks in RANKS)
    for name, value in alone.items():
        assert (shared[name] - value).norm() <= 1e-4 * value.norm(), name
    assert result(tmp_path / "3") == result(tmp_path / "1")


@pytest.mark.slow
def test_fine_tuning_has_the_result_of_one_process_with_its_batch_norms(labelled_run, tmp_path):
    """In float32 the ranks' sums round differently, by 6e-6 of a parameter's change, and by 2e-2
    where that moves an activation across a ReLU's zero. A single step is held to 1e-8 in float64
    below."""
    before = load_encoder(labelled_run).state_dict()
    for ranks in RANKS:
        assert evaluate(labelled_run, tmp_path / f"{ranks}", *SEMI, f"--gpus={ranks}") == 0
    alone, shared = (classifier(tmp_path / f"{ranks}") for ranks in RANKS)
    assert shared.keys() == alone.keys()
    for name in ("layer3.1.bn1.bias", "layer4.1.bn1.running_var", "layer4.1.bn1.bias"):
        value, start = alone[f"encoder.{name}"], before[name]
        moved = (value - start).norm()
        assert moved > 1e-3 * start.norm(), name
        assert (shared[f"encoder.{name}"] - value).norm() <= 0.1 * moved, name


@pytest.mark.slow
def test_features_of_the_quick_protocol_are_read_by_all_ranks(labelled_run, tmp_path, capfd):
    flags = ["linear", "--cached", "--views=2", "--epochs=2"]
    for ranks in RANKS:
        assert evaluate(labelled_run, tmp_path / f"{ranks}", *flags, f"--gpus={ranks}") == 0
        assert capfd.readouterr().out.count("top-1 of 30") == 1
    folders = (tmp_path / f"{ranks}" / "features" for ranks in RANKS)
    alone, shared = ({f.name: np.load(f) for f in folder.iterdir()} for folder in folders)
    assert len(alone) == 3 and alone.keys() == shared.keys()  # two views of train, one of val
    for name, features in alone.items():
        assert np.allclose(shared[name], features, rtol=1e-2, atol=1e-3), name  # half precision
    assert result(tmp_path / "3") == result(tmp_path / "1")
    assert evaluate(labelled_run, tmp_path / "3", *flags, "--gpus=3") == 0
    assert "already finished" in capfd.readouterr().out


def test_knn_has_the_result_of_one_process(labelled_run, tmp_path, capfd):
    tables = []
    for ranks in (1, 2):
        flags = ["knn", "--augmented", "--collapse"]
        assert evaluate(labelled_run, tmp_path, *flags, f"--gpus={ranks}") == 0
        tables.append(capfd.readouterr().out)
    assert "kNN, k = 20" in tables[0] and tables[1] == tables[0]


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
