"""Neighbours, clusters and subsets in blocks, against the whole matrix of similarities."""

import numpy as np
import pytest
import torch
from operators import Operators

from bt_fast.evaluate.curate import clusters, neighbours, subsets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    rows = np.random.default_rng(0).normal(2.0, 1.0, (600, 16)).astype(np.float32)
    rows[5] = rows[400]
    return rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 70)
    monkeypatch.setattr(neighbours, "BANK_BLOCK", 90)
    monkeypatch.setattr(clusters, "BANK_BLOCK", 90)
    monkeypatch.setattr(subsets, "QUERY_BLOCK", 7)


def similarities(features: np.ndarray) -> np.ndarray:
    """Cosines after whitening by a Cholesky factor, another square root of the same matrix."""
    centred = features.astype(np.float64) - features.mean(axis=0)
    covariance = centred.T @ centred / len(features)
    covariance += 16 / 600 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    white = np.linalg.solve(np.linalg.cholesky(covariance), centred.T).T
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    return white @ white.T


def test_neighbours_are_those_of_the_whole_matrix(features):
    whitening = neighbours.Whitening.of(features, CPU)
    found, rows = neighbours.nearest(features, features, 6, whitening)
    matrix = similarities(features)
    np.fill_diagonal(matrix, -2)
    np.testing.assert_allclose(found, -np.sort(-matrix, axis=1)[:, :6], atol=1e-5)
    np.testing.assert_allclose(found, np.take_along_axis(matrix, rows, 1), atol=1e-5)
    assert all(len(set(row)) == 6 for row in rows.tolist())
    assert rows[5, 0] == 400 and rows[400, 0] == 5 and found[5, 0] > 0.9999


def test_an_image_of_another_set_may_be_the_same_image(features):
    whitening = neighbours.Whitening.of(features, CPU)
    found, rows = neighbours.nearest(features[:50].copy(), features, 900, whitening)
    assert found.shape == (50, 600)
    assert set(rows[:, 0]) - {400} <= set(range(50)) and (found[:, 0] > 0.9999).all()


def test_clusters_cover_all_images_and_are_a_function_of_the_seed(features):
    whitening = neighbours.Whitening.of(features, CPU)

    def run(seed):
        return clusters.cluster(features, 20, whitening, seed=seed)

    first, again, other = run(0), run(0), run(1)
    assert first.sizes.sum() == 600 and first.sizes.min() > 0
    assert np.array_equal(first.assignment, again.assignment)
    assert not np.array_equal(first.assignment, other.assignment)
    assert first.assignment[5] == first.assignment[400]


def test_clusters_are_a_function_of_the_seed_on_a_gpu_too(features):
    """No operator runs that adds in any order there."""
    whitening = neighbours.Whitening.of(features, CPU)
    with Operators("aten::") as operators:
        clusters.cluster(features, 20, whitening, seed=0)
    names = {call.name for call in operators.calls}
    assert names and not any("index_add" in n or "scatter_add" in n for n in names)


def test_sums_by_cluster_include_empty_ones():
    rows, nearest = torch.arange(10.0).view(5, 2), torch.tensor([3, 0, 3, 3, 0])
    expected = torch.zeros(5, 2).index_add_(0, nearest, rows)
    assert torch.equal(clusters._sum_by_cluster(rows, nearest, 5), expected)


def test_clusters_find_separate_groups():
    centres = np.eye(4, 8, dtype=np.float32) * 9
    group = np.arange(200) % 4
    rows = centres[group] + np.random.default_rng(1).normal(0, 0.1, (200, 8)).astype(np.float32)
    found = clusters.cluster(rows, 16, neighbours.Whitening.of(rows, CPU), seed=3)
    used = np.unique(found.assignment)
    assert len(used) >= 4
    assert all(len(np.unique(group[found.assignment == number])) == 1 for number in used)


def test_redundancy_is_the_similarity_to_an_earlier_image_of_the_cluster(features):
    whitening = neighbours.Whitening.of(features, CPU)
    found = clusters.cluster(features, 12, whitening, seed=0)
    values = subsets.redundancy(features, found, whitening)
    matrix = similarities(features)
    for number in range(12):
        members = np.flatnonzero(found.assignment == number)
        members = members[np.lexsort((members, found.similarity[members]))]
        for position, image in enumerate(members):
            expected = matrix[image, members[:position]].max() if position else -1
            assert values[image] == pytest.approx(expected, abs=1e-5)
    kept = subsets.least_redundant(values, 599)
    assert len({5, 400} & set(kept.tolist())) == 1  # the copies


def test_a_balanced_subset_has_equal_shares_as_far_as_clusters_reach():
    assignment = np.repeat([0, 1, 2], [3, 50, 47])
    similarity = np.zeros(100, np.float32)
    parts = clusters.Clusters(assignment=assignment, similarity=similarity, num_clusters=3)
    kept = subsets.balanced(parts, 43, seed=0)
    assert len(np.unique(kept)) == 43
    assert np.bincount(assignment[kept]).tolist() == [3, 20, 20]
    assert not np.array_equal(kept, subsets.balanced(parts, 43, seed=1))


def test_a_random_subset_is_a_function_of_the_seed():
    kept = subsets.random_subset(100, 40, seed=0)
    assert np.array_equal(kept, np.unique(kept)) and len(kept) == 40 and kept.max() < 100
    assert np.array_equal(kept, subsets.random_subset(100, 40, seed=0))
    assert not np.array_equal(kept, subsets.random_subset(100, 40, seed=1))
