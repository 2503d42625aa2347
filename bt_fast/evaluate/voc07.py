"""VOC07 classification: a linear SVM per class on frozen features, mean average precision.

As the paper's appendix C.1 after Goyal et al. (ICCV 2019): features of the central crops,
L2-normalised; squared hinge loss; positives weigh twice; the cost C of each class by three-fold
cross-validation. Images in which a class is marked difficult do not count for it.

Average precision is VOC07's own 11-point rule: the mean, over the recalls 0, 0.1, ..., 1, of the
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
from bt_fast.evaluate.eval_directory import EvalFolder, shared_folder
from bt_fast.evaluate.linear_cached import cached_views, load_features
from bt_fast.evaluate.options import Subject
from bt_fast.evaluate.transfer_datasets import VocPart, voc07
from pipelines.common.console import say

COSTS = tuple(sorted({2.0**n for n in range(-19, -3)} | {10.0**n for n in range(-7, 3)}))
NUM_FOLDS = 3


def measure_voc(subject: Subject, root: Path) -> dict[str, Any]:
    """{"map", "classes": {name: {"ap", "cost"}}}; each class is kept as soon as it is done."""
    names, trainval, test = voc07(root)
    _svm()  # say now, not after the features, that scikit-learn is missing
    facts = {
        **subject.facts(trainval.whole, test.whole),
        "present": [int(part.present.sum()) for part in (trainval, test)],
        "costs": COSTS,
    }
    with shared_folder(subject.folder, "voc07", facts, subject.world) as (folder, found):
        if found is None:
            files = [
                cached_views(subject, part.whole, 1, min_scale=1.0, seed=0)[0]
                for part in (trainval, test)
            ]
            if folder:  # on the first rank
                found = _classify(folder, names, files, (trainval, test), subject.num_threads)
            found = collectives.from_first(found, subject.world.group)
        return found


def _classify(
    folder: EvalFolder,
    names: Sequence[str],
    files: Sequence[Path],
    parts: Sequence[VocPart],
    num_threads: int,
) -> dict[str, Any]:
    """One class after the other; those of an earlier start are done."""
    features, test_features = map(_normalised, files)
    saved = folder.load()
    found: dict[str, dict[str, float]] = saved[1]["classes"] if saved else {}
    for number, name in enumerate(names):
        if name in found:
            continue
        known, asked = (part.present[:, number] for part in parts)
        cost = choose_cost(features[known != 0], known[known != 0], num_threads)
        svm = _svm(cost).fit(features[known != 0], known[known != 0])
        scores = svm.decision_function(test_features[asked != 0])
        ap = average_precision(scores, asked[asked != 0] > 0)
        found[name] = {"ap": ap, "cost": cost}
        folder.save({}, {"classes": found})
        said = f"{name}: AP {100 * ap:.2f} % with C = {cost:g}"
        say(f"{said} ({len(found)} of {len(names)} classes)")
    mean = sum(entry["ap"] for entry in found.values()) / len(found)
    return folder.finish({"map": mean, "classes": found})


def _normalised(file: Path) -> np.ndarray:
    """L2-normalised features: float32 [n, F]."""
    features = load_features(file, torch.device("cpu")).float()
    return F.normalize(features, dim=1, eps=1e-12).numpy()


def choose_cost(features: np.ndarray, present: np.ndarray, num_threads: int = 1) -> float:
    """The cost with the best mean average precision over the folds; the smaller one of two alike.

    features: float [n, F]; present: [n], 1 or -1. Folds keep the share of positives. One thread
    per cost and fold.
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


def _svm(cost: float = 1.0):
    try:
        from sklearn.svm import LinearSVC
    except ImportError:
        raise ValueError("VOC07 needs scikit-learn: pip install 'bt-fast[eval]'") from None
    # The primal problem: Newton steps draw nothing, so threads cannot disturb each other.
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, max_iter=2000)
