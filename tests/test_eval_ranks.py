"""Evaluations that several ranks share."""

import json

import pytest
from safetensors.torch import load_file

from bt_fast.cli import main


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_frozen_encoder_is_evaluated_alike_on_any_number_of_ranks(
    labelled_run, tmp_path, capfd, num_ranks
):
    """64 images in batches of 12 leave 4 for the last one; 30 held-out images do not divide."""
    flags = ["eval", "linear", str(labelled_run), "--device=cpu", "--precision=fp32"]
    flags += ["--epochs=2", "--batch-size=12", "--workers=1", "--lr=1", "--out"]
    found = []
    for ranks in (1, num_ranks):
        out = tmp_path / f"{ranks}"
        assert main([*flags, str(out), "--gpus", str(ranks)]) == 0
        (folder,) = out.glob("linear-*")
        found.append((load_file(folder / "classifier.safetensors"), folder / "result.json"))
        told = capfd.readouterr().out
        assert told.count("top-1 of 30") == 1 and told.count("epoch 2 of 2") == 1
    (alone, alone_result), (shared, shared_result) = found
    for name, value in alone.items():
        assert (shared[name] - value).norm() <= 1e-4 * value.norm(), name
    assert json.loads(shared_result.read_text()) == json.loads(alone_result.read_text())
    assert main([*flags, str(tmp_path / "x"), "--gpus=5"]) == 2
    assert capfd.readouterr().err == (
        "bt-fast eval linear: --batch-size 12 does not divide by 5 ranks\n"
    )


def test_what_runs_in_one_process_refuses_more(labelled_run, capfd):
    assert main(["eval", "linear", str(labelled_run), "--cached", "--gpus=2", "--device=cpu"]) == 2
    assert "--cached runs in one process; leave --gpus out" in capfd.readouterr().err
