"""Weighted kNN against a direct implementation of its definition, and the choice of its data."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_beton

from bt_fast.evaluate import knn_classifier
from bt_fast.evaluate.knn_classifier import choose_data, knn_accuracies
from bt_fast.evaluate.subset import Subset
from pipelines.beton import BetonReader


def oracle(bank, bank_labels, queries, query_labels, k, temperature, num_classes) -> float:
    correct = 0
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        similarity = [sum(a * b for a, b in zip(query, row, strict=True)) for row in bank.tolist()]
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
        scores = [0.0] * num_classes
        for i in nearest:
            scores[bank_labels[i]] += math.exp(similarity[i] / temperature)
        correct += scores.index(max(scores)) == label
    return correct / len(queries)


def test_accuracies_equal_the_definition(monkeypatch):
    monkeypatch.setattr(knn_classifier, "_MAX_SIMILARITIES", 7 * 120)  # seven queries at once
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (180,), generator=generator)
    noise = torch.randn(180, 8, generator=generator, dtype=torch.float64)
    features = F.normalize(centres[labels] + 1.5 * noise, dim=1)
    bank, queries = features[:120], features[120:]
    settings = [(20, 0.07), (1, 0.07), (200, 0.1)]
    ours = knn_accuracies(
        bank * (1 + labels[:120, None]), labels[:120], 3 * queries, labels[120:],
        settings=settings, num_classes=5,
    )  # fmt: skip
    expected = [oracle(bank, labels[:120], queries, labels[120:], *each, 5) for each in settings]
    assert 0.3 < min(expected) < max(expected) < 1.0 and len(set(expected)) == 3
    assert ours == pytest.approx(expected, abs=1e-9)


def test_a_tiny_temperature_does_not_overflow():
    bank = F.normalize(torch.randn(10, 4), dim=1)
    labels = torch.arange(10) % 2
    (accuracy,) = knn_accuracies(bank, labels, bank, labels, settings=[(5, 1e-3)], num_classes=2)
    assert accuracy == 1.0  # each image's best neighbour is itself


def test_a_split_is_disjoint_and_reproducible(small_beton):
    reader = BetonReader(small_beton)
    data = choose_data(reader, None, seed=3)
    assert len(data.queries) == 6 and len(data.bank) == 58
    assert not set(data.queries.samples) & set(data.bank.samples)
    again = choose_data(reader, None, seed=3)
    assert np.array_equal(data.queries.samples, again.queries.samples)


def test_queries_come_from_a_held_out_file_up_to_the_limit(small_beton, tmp_path):
    val = BetonReader(write_beton(tmp_path / "val.beton", 20))
    data = choose_data(BetonReader(small_beton), val, seed=0, limit=16)
    assert data.queries.images is val and len(data.bank) == 16 and len(data.queries) == 8


def test_scores_do_not_depend_on_the_lengths_of_features():
    """Two near neighbours of class 0 outweigh three farther ones of class 1."""
    cosines = torch.tensor([0.95, 0.95, 0.8, 0.8, 0.8])
    bank = torch.stack([cosines, (1 - cosines.square()).sqrt()], 1)
    labels = SimpleNamespace(labels=np.array([0, 0, 1, 1, 1]))
    bank_images, query_image = Subset(labels, np.arange(5)), Subset(labels, np.array([0]))
    data = SimpleNamespace(bank=bank_images, queries=query_image, num_classes=2)
    for length in (0.01, 1.0, 100.0):
        query = length * torch.tensor([[1.0, 0.0]])
        assert knn_classifier.knn_scores(length * bank, query, data)["knn_20"] == 1


@pytest.mark.parametrize("num_bank,names", [(200, {"knn_20", "knn_200"}), (199, {"knn_20"})])
def test_more_neighbours_than_images_are_not_reported(num_bank, names):
    images = SimpleNamespace(labels=np.arange(num_bank) % 2)
    bank = Subset(images, np.arange(num_bank))
    data = SimpleNamespace(bank=bank, queries=bank, num_classes=2)
    features = torch.randn(num_bank, 4)
    assert knn_classifier.knn_scores(features, features, data).keys() == names


def test_the_description_names_a_smaller_k(small_beton):
    reader = BetonReader(small_beton)
    assert choose_data(reader, None, seed=0).description.endswith("58 bank images")
    few = choose_data(reader, None, seed=0, limit=12)
    assert few.description.endswith("12 bank images, so that k = 12")
