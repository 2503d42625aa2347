"""Effective rank and the collapse report against their definitions, and `bt-fast eval knn`."""

import math
import re

import numpy as np
import pytest
import torch
from hostile import make_folder

from bt_fast.cli import main
from bt_fast.evaluate.collapse import collapse_report, effective_rank


def test_the_rank_equals_the_definition_on_noise():
    features = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)) + 3
    centred = features - features.mean(0)
    for matrix in (features, centred):
        values = torch.linalg.svdvals(matrix.double())
        shares = values / values.sum()
        expected = math.exp(-(shares * shares.log()).sum().item())
        assert effective_rank(matrix) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(features) < effective_rank(centred) - 1  # the mean hides the rest


@pytest.mark.parametrize("num_images,num_dimensions", [(200, 16), (24, 64)])
def test_the_report_equals_numpys_correlation(num_images, num_dimensions):
    generator = torch.Generator().manual_seed(0)
    z_a = torch.randn(num_images, num_dimensions, generator=generator)
    z_b = 0.5 * z_a + torch.randn(num_images, num_dimensions, generator=generator)
    z_b[:, 1] += z_a[:, 0]
    both = np.corrcoef(z_a.double().numpy(), z_b.double().numpy(), rowvar=False)
    correlation = both[:num_dimensions, num_dimensions:]
    diagonal = np.diagonal(correlation)
    off = correlation[~np.eye(num_dimensions, dtype=bool)]
    report = collapse_report(z_a, z_b)
    assert report.diagonal_mean == pytest.approx(diagonal.mean(), abs=1e-4)
    assert report.diagonal_spread == pytest.approx(diagonal.std(), abs=1e-4)
    assert report.diagonal_lowest == pytest.approx(diagonal.min(), abs=1e-4)
    assert report.off_diagonal_rms == pytest.approx((off**2).mean() ** 0.5, abs=1e-4)
    assert report.num_dead == 0


def test_dead_dimensions_are_counted():
    z = torch.randn(50, 10)
    z[:, 3:7] = 1.0 + 1e-6 * torch.randn(50, 4)
    assert collapse_report(z, z).num_dead == 4


def test_eval_knn_reports_everything(labelled_run, capsys):
    flags = ["--device=cpu", "--precision=fp32", "--workers=2", "--augmented", "--collapse"]
    assert main(["eval", "knn", str(labelled_run), *flags]) == 0
    output = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "30 queries (held out), 64 bank images" in output
    ranks = re.findall(r"rank of the \w+ RankMe ([\d.]+), centred ([\d.]+), of (\d+)", output)
    assert [int(limit) for *_, limit in ranks] == [30, 30]  # 30 images, of 512 and 32 dimensions
    assert all(1 <= float(rank) <= 30 for *pair, _ in ranks for rank in pair)
    assert not (labelled_run / "eval").exists()


def test_without_a_projector_there_is_no_collapse_report(labelled_run, capsys):
    data = ["--data", str(labelled_run.parent / "train.beton"), "--device=cpu", "--size=32"]
    file = str(labelled_run / "encoder.safetensors")
    assert main(["eval", "knn", file, *data, "--collapse"]) == 2
    assert "--collapse needs the trained projector" in capsys.readouterr().err
    assert main(["eval", "knn", file, *data]) == 0
    assert main(["eval", "knn", str(labelled_run), "--random", "--collapse", "--device=cpu"]) == 2


@pytest.mark.parametrize(
    "classes,is_val,reason",
    [
        ({"": 12}, False, "has no classes"),
        ({"": 12}, True, "has no classes"),
        ({"a": 12}, False, "has only one class"),
        ({"a": 5, "b": 4}, False, "has too few images"),  # for a tenth of them
    ],
)
def test_rank_and_collapse_need_no_classes(
    classes, is_val, reason, labelled_run, tmp_path, capsys, monkeypatch
):
    """Without two classes there is no kNN, which is said; all other rows are there."""
    monkeypatch.setenv("COLUMNS", "500")
    folder, count = make_folder(tmp_path / "images", classes), sum(classes.values())
    data = [labelled_run.parent / "train.beton", "--val-data", folder] if is_val else [folder]
    flags = ["--device=cpu", "--precision=fp32", "--workers=2", "--data", *map(str, data)]
    assert main(["eval", "knn", str(labelled_run), *flags, "--collapse"]) == 0
    rows = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"data {count} images of {folder} kNN none: {folder} {reason} " in rows
    limits = re.findall(r"rank of the (\w+) RankMe [\d.]+, centred [\d.]+, of (\d+)", rows)
    assert limits == [("features", str(count)), ("embeddings", str(count))]
    assert "diagonal of C" in rows and "dead dimensions" in rows
    assert main(["eval", "knn", str(labelled_run), *flags, "--augmented"]) == 2
    message = f"--augmented needs images with classes: {folder} {reason}\n"
    assert capsys.readouterr().err.endswith(message)
