"""A grid of classifiers trained at once equals classifiers that torch trains one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bt_fast.evaluate.eval_directory import EvalDirectory
from bt_fast.evaluate.linear_cached import Grid, choose_and_fit, top_1_and_5, train_classifiers
from pipelines.order import epoch_order

GRID = Grid(rates=(0.1, 1.0), decays=(0.0, 1e-2), epochs=5, batch_size=16, seed=4)


@pytest.fixture
def folder(tmp_path):
    with EvalDirectory(tmp_path, "grid", {}) as opened:
        yield opened


def clusters(count: int, seed: int, spread: float = 1.0):
    """Features [2, n, 12] of two views, and labels of 6 classes."""
    centres = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (count,), generator=generator)
    noise = torch.randn(2, count, 12, generator=generator)
    return centres[labels] + spread * noise, labels


def test_each_classifier_equals_one_trained_alone(folder):
    views, labels = clusters(50, 1)
    samples = torch.arange(50)
    heads = train_classifiers(folder, "test", views, labels, samples, GRID.pairs, 6, GRID, {})
    for (rate, decay), ours in zip(GRID.pairs, heads, strict=True):
        head = torch.nn.Linear(12, 6)
        start = 0.01 * torch.randn(6, 13, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            head.weight.copy_(start[:, :12])
            head.bias.zero_()
        optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, GRID.epochs)
        for epoch in range(GRID.epochs):
            for batch in torch.from_numpy(epoch_order(50, 4, epoch)).split(16):
                optimizer.zero_grad()
                F.cross_entropy(head(views[epoch % 2][batch]), labels[batch]).backward()
                optimizer.step()
            scheduler.step()
        assert torch.allclose(ours[:, :12], head.weight, atol=1e-5)
        assert torch.allclose(ours[:, 12], head.bias, atol=1e-5)


def test_accuracies_equal_counts():
    views, labels = clusters(30, 2)
    heads = torch.randn(2, 6, 13, generator=torch.Generator().manual_seed(1))
    accuracies = top_1_and_5(heads, views[0], labels, chunk=7)
    for head, (top1, top5) in zip(heads, accuracies, strict=True):
        logits = views[0] @ head[:, :12].T + head[:, 12]
        ranks = [row.argsort(descending=True).tolist() for row in logits]
        places = [rank.index(label) for rank, label in zip(ranks, labels.tolist(), strict=True)]
        assert top1 == sum(place == 0 for place in places) / 30
        assert top5 == sum(place < 5 for place in places) / 30


def test_the_best_of_the_grid_is_chosen_without_the_held_out_images(folder):
    views, labels = clusters(300, 1, spread=0.3)
    val_views, val_labels = clusters(100, 2, spread=0.3)
    grid = Grid(rates=(1e-6, 0.5), decays=(0.0,), epochs=10, batch_size=32)
    result = choose_and_fit(folder, views, labels, val_views[0], val_labels, grid)
    assert result["lr"] == 0.5 and result["top1"] > 0.95
    assert [row[:2] for row in result["grid"]] == [[1e-6, 0.0], [0.5, 0.0]]
    assert result["grid"][0][2] < result["grid"][1][2]


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that an operator makes, except views."""

    values = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.values = max(self.values, result.numel())
        return result


def test_no_view_is_copied(folder):
    """Those of a million images take most of a GPU's memory."""
    views, labels = clusters(2000, 1)
    val_views, val_labels = clusters(100, 2)
    grid = Grid(rates=(0.1, 0.5), decays=(0.0,), epochs=2, batch_size=16)
    with Largest() as largest:
        choose_and_fit(folder, [*views], labels, val_views[0], val_labels, grid)
    assert largest.values < views[0].numel() / 4
