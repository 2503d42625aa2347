"""VOC07: average precision by another implementation, and a small data set."""

import numpy as np
import pytest
from sample_voc import write_devkit
from tiny_runs import evaluate, failing, result

from bt_fast.evaluate import transfer_datasets, voc07
from bt_fast.evaluate.eval_directory import EvalDirectory
from bt_fast.evaluate.voc07 import average_precision


def eleven_points(scores, positive) -> float:
    """As in VOC's devkit: precision and recall at every threshold, the best for each tenth."""
    points = []
    for threshold in sorted(scores, reverse=True):
        taken = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        points.append((sum(taken) / sum(positive), sum(taken) / len(taken)))
    best = [max([p for r, p in points if r >= tenth / 10 - 1e-9], default=0) for tenth in range(11)]
    return sum(best) / 11


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_by_another_implementation(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(120) < 0.2
    scores = generator.normal(size=120) + positive
    expected = eleven_points(scores.tolist(), positive.tolist())
    assert 0.2 < expected < 1
    assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    return write_devkit(tmp_path_factory.mktemp("voc")).parent


def test_the_published_layout_is_read(devkit):
    names, trainval, test = transfer_datasets.voc07(devkit)
    assert names == ["blue", "red"]
    assert (len(trainval.subset.images), len(test.subset.images)) == (24, 18)
    assert trainval.present[:6].tolist() == [[1, 1], [1, -1], [-1, 1], [-1, -1], [1, 1], [1, 0]]
    assert test.subset.images.name(0) == "JPEGImages/000024.jpg"
    for root in (devkit / "VOCdevkit", devkit / "VOCdevkit" / "VOC2007"):
        assert transfer_datasets.voc07(root)[1].present.tolist() == trainval.present.tolist()


def test_a_small_data_set_end_to_end(devkit, labelled_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr(voc07, "COSTS", (0.01, 1.0, 100.0))
    flags = ["transfer", "--dataset=voc07", "--data", devkit]
    assert evaluate(labelled_run, tmp_path / "whole", *flags) == 0
    output = capsys.readouterr().out
    found = result(tmp_path / "whole")
    assert found["classes"].keys() == {"red", "blue"}
    assert found["map"] == pytest.approx(np.mean([c["ap"] for c in found["classes"].values()]))
    assert found["map"] > 0.7  # half of the pictures have a class, so chance is about a half
    assert f"{100 * found['map']:.2f} %" in output

    # Stopped after the first class and continued: the same result; the first class is not repeated.
    with failing(EvalDirectory, "save", KeyboardInterrupt(), after=True):
        assert evaluate(labelled_run, tmp_path / "again", *flags) == 130
    capsys.readouterr()
    assert evaluate(labelled_run, tmp_path / "again", *flags) == 0
    assert "blue: AP" not in capsys.readouterr().out
    assert result(tmp_path / "again") == found


def test_the_cost_is_chosen_by_cross_validation():
    svm = pytest.importorskip("sklearn.svm", reason="scikit-learn is not installed")
    selection = pytest.importorskip("sklearn.model_selection")
    generator = np.random.default_rng(0)
    present = np.where(generator.random(150) < 0.3, 1, -1)
    features = generator.normal(size=(150, 8)) + 0.5 * present[:, None] * (np.arange(8) < 2)
    means = []
    for cost in voc07.COSTS:
        scores = []
        for fit, test in selection.StratifiedKFold(3).split(features, present):
            model = svm.LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, max_iter=2000)
            decision = model.fit(features[fit], present[fit]).decision_function(features[test])
            scores.append(eleven_points(decision.tolist(), (present[test] > 0).tolist()))
        means.append(np.mean(scores))
    chosen = voc07.COSTS.index(voc07.choose_cost(features, present, num_threads=2))
    assert max(means) - min(means) > 0.01
    assert means[chosen] > max(means) - 0.02  # the folds differ: ours take images in turn
