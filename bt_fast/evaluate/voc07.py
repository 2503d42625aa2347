"""VOC07 classification: a linear SVM per class on frozen features, mean average precision.

As the paper's appendix C.1 after Goyal et al. (ICCV 2019): features of the central crops,
L2-normalised; squared hinge loss; positives have twice the weight; the cost C of each class by
three-fold cross-validation. A class ignores the images in which it is marked difficult.

Average precision is VOC07's 11-point rule: the mean, over the recalls 0, 0.1, ..., 1, of the
highest precision at that recall or a higher one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.distributed import collectives
from bt_fast.evaluate.eval_directory import EvalDirectory, open_eval_directory
from bt_fast.evaluate.eval_setup import EvalSetup
from bt_fast.evaluate.linear_cached import cached_views, load_features
from bt_fast.evaluate.overlap import warn_of_overlap
from bt_fast.evaluate.transfer_datasets import VocSplit, voc07
from pipelines.common.console import print_line

COSTS = tuple(sorted({2.0**n for n in range(-19, -3)} | {10.0**n for n in range(-7, 3)}))
NUM_FOLDS = 3


def measure_voc(setup: EvalSetup, root: Path) -> dict[str, Any]:
    """{"map", "classes": {name: {"ap", "cost"}}}; each class is saved when it is finished."""
    names, trainval, test = voc07(root)
    _svm()  # raises ValueError before the features are extracted if scikit-learn is missing
    identity = {
        **setup.identity(trainval.subset, test.subset),
        "present": [int(split.present.sum()) for split in (trainval, test)],
        "costs": COSTS,
    }
    world, num_threads = setup.world, setup.num_threads
    with open_eval_directory(setup.folder, "voc07", identity, world) as (folder, result):
        if result is None:
            files = [
                cached_views(setup, split.subset, 1, min_scale=1.0, seed=0)[0]
                for split in (trainval, test)
            ]
            if folder:  # on the first rank
                warn_of_overlap(trainval.subset.images, test.subset.images)
                result = _classify(folder, names, files, trainval, test, num_threads)
            result = collectives.broadcast_object(result, world.group)
        return result


def _classify(
    folder: EvalDirectory,
    names: Sequence[str],
    files: Sequence[Path],
    trainval: VocSplit,
    test: VocSplit,
    num_threads: int,
) -> dict[str, Any]:
    """Train and test one SVM per class, except classes that the folder has the results of."""
    features, test_features = (_normalised(file) for file in files)
    saved = folder.load()
    results: dict[str, dict[str, float]] = saved[1]["classes"] if saved else {}
    for number, name in enumerate(names):
        if name in results:
            continue
        present, test_present = trainval.present[:, number], test.present[:, number]
        fit, scored = present != 0, test_present != 0
        cost = choose_cost(features[fit], present[fit], num_threads)
        svm = _svm(cost).fit(features[fit], present[fit])
        scores = svm.decision_function(test_features[scored])
        ap = average_precision(scores, test_present[scored] > 0)
        results[name] = {"ap": ap, "cost": cost}
        folder.save({}, {"classes": results})
        count = f"{len(results)} of {len(names)} classes"
        print_line(f"{name}: AP {100 * ap:.2f} % with C = {cost:g} ({count})")
    mean = sum(one["ap"] for one in results.values()) / len(results)
    return folder.finish({"map": mean, "classes": results})


def _normalised(file: Path) -> np.ndarray:
    """L2-normalised features of a file: float32 [n, F]."""
    features = load_features(file, torch.device("cpu")).float()
    return F.normalize(features, dim=1, eps=1e-12).numpy()


def choose_cost(features: np.ndarray, present: np.ndarray, num_threads: int = 1) -> float:
    """The cost with the best mean average precision over the folds; the smallest one of a tie.

    features: float [n, F]; present: [n], 1 or -1.
    """
    fold = np.empty(len(present), np.int64)
    for value in (1, -1):
        members = np.flatnonzero(present == value)
        if len(members) < NUM_FOLDS:
            raise ValueError(f"cross-validation needs {NUM_FOLDS} images with and without a class")
        fold[members] = np.arange(len(members)) % NUM_FOLDS

    def score(cost: float, held_out: int) -> float:
        fit, test = fold != held_out, fold == held_out
        svm = _svm(cost).fit(features[fit], present[fit])
        return average_precision(svm.decision_function(features[test]), present[test] > 0)

    folds = range(NUM_FOLDS)
    with ThreadPoolExecutor(num_threads) as pool:
        tasks = [[pool.submit(score, cost, held_out) for held_out in folds] for cost in COSTS]
        means = [sum(task.result() for task in row) for row in tasks]
    return COSTS[int(np.argmax(means))]


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """VOC07's 11-point rule, in [0, 1]: scores float [n], positive bool [n]."""
    if not positive.any():
        raise ValueError("average precision needs a positive image")
    ranked = positive[np.argsort(-scores, kind="stable")]
    hits = np.cumsum(ranked)
    precision = hits / np.arange(1, len(ranked) + 1)
    # Recall in tenths, exactly: recall >= t / 10  <=>  10 hits >= t positives.
    return float(
        np.mean([precision[10 * hits >= t * positive.sum()].max(initial=0.0) for t in range(11)])
    )


def _svm(cost: float = 1.0) -> Any:
    try:
        from sklearn.svm import LinearSVC
    except ImportError:
        raise ValueError("VOC07 needs scikit-learn: pip install 'bt-fast[eval]'") from None
    # The primal solver draws no random numbers, whose generator the threads would share.
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, max_iter=2000)
