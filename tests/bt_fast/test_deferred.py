"""Deferred reads of device values: nothing is lost, and nothing else changes."""

from functools import partial

import pytest
import torch
from tiny_runs import comparable, failing, learned, metrics, pretrain, same

from bt_fast import train
from bt_fast.deferred import GPU_DELAY, Deferred
from bt_fast.prefetch import NUM_STEPS_AHEAD
from bt_fast.run.async_checkpoint import AsyncCheckpoints


@pytest.fixture
def late(monkeypatch):
    """Reads values as late as on a GPU."""
    kind = partial(Deferred, delay=GPU_DELAY)
    monkeypatch.setattr("bt_fast.train.Deferred", kind)
    return kind


def test_actions_run_in_order_when_the_prefetcher_has_waited_for_their_step(late):
    assert GPU_DELAY > NUM_STEPS_AHEAD
    done: list[str] = []
    deferred = late(torch.device("cpu"))
    deferred.add(1, lambda: done.append("line of 1"))
    deferred.add(1, lambda: done.append("checkpoint of 1"))
    for step in range(2, GPU_DELAY + 1):
        deferred.run(step)
        assert done == []
    deferred.run(GPU_DELAY + 1)
    assert done == ["line of 1", "checkpoint of 1"]
    deferred.add(9, lambda: done.append("line of 9"))
    deferred.flush()
    assert done[2:] == ["line of 9"]


@pytest.mark.slow
def test_a_run_read_late_is_the_same_run(late, small_beton, finished, tmp_path):
    flags = "--data", small_beton, "--run-dir", tmp_path / "run", "--save-every", 1
    assert pretrain(*flags) == 0
    assert comparable(metrics(tmp_path / "run")) == comparable(metrics(finished))
    assert same(learned(tmp_path / "run"), learned(finished))


def test_no_checkpoint_is_newer_than_the_log(late, small_beton, tmp_path, monkeypatch):
    """A run killed after a checkpoint has all lines that a resumed one does not write again."""
    folder, seen = tmp_path / "run", []
    write = AsyncCheckpoints._write

    def checked(self, step, *arguments):
        lines = metrics(folder)
        seen.append((step, max(line["step"] for line in lines if line["kind"] == "train")))
        return write(self, step, *arguments)

    monkeypatch.setattr(AsyncCheckpoints, "_write", checked)
    assert pretrain("--data", small_beton, "--run-dir", folder, "--save-every", 4) == 0
    assert seen == [(4, 4), (8, 8), (12, 12)]  # --log-every 2


def test_an_error_loses_no_checkpoint_that_was_begun(late, small_beton, tmp_path):
    """As that of a damaged record, one step after the weights were copied."""
    folder = tmp_path / "run"
    with failing(train, "update", ValueError("a record is damaged"), at=6):
        assert pretrain("--data", small_beton, "--run-dir", folder, "--save-every", 5) == 2
    assert (folder / "checkpoints" / "step-00000005" / "state.json").exists()
    assert metrics(folder)[-1]["step"] == 4  # --log-every 2
