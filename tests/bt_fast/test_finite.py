"""Numbers that are not finite are found, named, and never the result of a command."""

import itertools
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_voc import write_devkit
from tiny_runs import TINY, evaluate, metrics, pretrain

from bt_fast import train
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.deferred import GPU_DELAY, Deferred
from bt_fast.finite import NotFinite, queue_finite_check, require_finite
from bt_fast.run.probe import probe


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_tensor_that_is_not_finite_is_named(bad, dtype):
    finite = torch.full((2, 300), torch.finfo(dtype).max, dtype=dtype)  # its norm overflows
    tensors = {"a": finite, "count": torch.tensor(7), "empty": finite[:0]}
    require_finite(tensors, "file", "way out")
    for name in ("b", "c"):
        tensors[name] = finite.clone()
        tensors[name][1, 7] = bad
    with pytest.raises(NotFinite, match=r"^file: values of b are not finite; way out$"):
        require_finite(tensors, "file", "way out")


def test_flags_are_read_after_their_copy(monkeypatch):
    """With copies like those from a GPU, which are empty until the host waits for them."""
    copies = []

    def to(tensor, device, non_blocking=False):
        if not non_blocking:
            return tensor
        copies.append((torch.zeros_like(tensor), tensor))
        return copies[-1][0]

    monkeypatch.setattr(torch.Tensor, "to", to)
    require_finite({"a": torch.ones(3)}, "file", "way out")
    check = queue_finite_check({"a": torch.ones(3)}, "file", "way out")
    for copy, source in copies:
        copy.copy_(source)
    check()


@pytest.fixture
def nan_in(monkeypatch):
    """A function that sets the views of some steps, counted from 1, to NaN."""

    def inject(*steps: int) -> None:
        def views_of(views_of_steps, first_step, world):
            numbered = enumerate(views_of_steps, first_step + 1)
            return (views * torch.nan if step in steps else views for step, views in numbered)

        monkeypatch.setattr("bt_fast.distributed.fault_injection.inject", views_of)

    return inject


FIVE_STEPS = ["--probe-every", 0, "--max-steps", 5]


def saved_count(folder) -> int:
    """Skipped updates in a row of a run's newest checkpoint."""
    newest = max((folder / "checkpoints").glob("step-????????"))
    return json.loads((newest / "state.json").read_text())["facts"]["skipped_in_a_row"]


@pytest.mark.parametrize("first_skipped,save_every", [(1, 0), (5, 0), (5, 1)])
def test_a_run_whose_last_updates_were_skipped_has_curves_and_no_result(
    first_skipped, save_every, nan_in, small_beton, tmp_path, capsys
):
    """5 steps of 4 an epoch; the same when it is resumed after its last one."""
    folder, count = tmp_path / "run", 6 - first_skipped
    flags = [*FIVE_STEPS, "--save-every", save_every, "--keep", 9]
    nan_in(*range(first_skipped, 6))
    assert pretrain("--data", small_beton, "--run-dir", folder, *flags) == 2
    for _ in range(2):
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"not finite in the last {count} steps" in error
        assert "start again in a new folder with lower" in error
        # Only steps 1 to 3 are of use: step 4 leads to the skipped one.
        assert ("remove the checkpoints from step 4 on" in error) == (save_every == 1)
        assert (folder / "curves.png").stat().st_size > 0
        (folder / "curves.png").unlink()
        assert not (folder / "encoder.safetensors").exists() and saved_count(folder) == count
        nan_in()
        assert main(["pretrain", "--resume", str(folder)]) == 2


def test_skipped_updates_before_an_applied_one_are_no_error(nan_in, small_beton, tmp_path):
    nan_in(2, 4)
    folder = tmp_path / "run"
    assert pretrain("--data", small_beton, "--run-dir", folder, *FIVE_STEPS) == 0
    assert sum(record["skipped"] for record in metrics(folder)) == 2 and saved_count(folder) == 0


@pytest.mark.slow
def test_the_count_of_skipped_updates_survives_a_resume(
    nan_in, small_beton, tmp_path, capsys, refused, monkeypatch
):
    monkeypatch.setattr(train, "MAX_SKIPPED", 5)
    folder = tmp_path / "run"
    flags = ["--data", small_beton, "--run-dir", folder, "--probe-every", 0, "--save-every", 2]
    nan_in(*range(4, 13))
    assert pretrain(*flags) == 2  # at the log line of step 8, before its checkpoint
    assert "in the last 5 steps" in capsys.readouterr().err and saved_count(folder) == 3
    refused(main(["pretrain", "--resume", str(folder)]), "in the last 5 steps")
    nan_in()
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert (folder / "encoder.safetensors").exists() and saved_count(folder) == 0


def first_momentum(setup) -> torch.Tensor:
    return setup.optimizer.momentum_buffer(setup.model.encoder.conv1.weight)


@pytest.mark.parametrize(
    "find,name,delay",  # delay: GPU_DELAY reads values as late as on a GPU
    [
        (lambda setup: setup.model.encoder.bn1.running_var, "encoder.bn1.running_var", GPU_DELAY),
        (lambda setup: setup.model.encoder.conv1.weight.data, "encoder.conv1.weight", 0),
        (first_momentum, "momentum of encoder.conv1.weight", 0),
    ],
)
def test_a_state_that_is_not_finite_is_never_saved(
    find, name, delay, small_beton, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "Deferred", lambda device: Deferred(device, delay))
    update, steps = train.update, itertools.count(1)

    def overflowing(setup, views):
        applied = update(setup, views)
        if next(steps) == 3:
            find(setup)[1] = torch.inf
        return applied

    monkeypatch.setattr(train, "update", overflowing)
    folder, flags = tmp_path / "run", ["--probe-every", 0, "--save-every", 1, "--keep", 9]
    assert pretrain("--data", small_beton, "--run-dir", folder, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"step 3 was not saved: values of {name}" in error
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002"]
    assert not (folder / "encoder.safetensors").exists()


def damage(file, value: float) -> None:
    """Multiply the norms of the encoder in a file of weights by a value."""
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith("bn2.weight"):
            weights[name] = (weight.abs() + 1) * value
    save_file(weights, file)


PROTOCOLS = ["all", "knn", "linear", "linear --cached", "semi", "transfer"]
PROTOCOLS += ["transfer --dataset=voc07"]


@pytest.mark.parametrize(
    "command,value",
    [*((name, torch.nan) for name in PROTOCOLS), *((name, 1e12) for name in PROTOCOLS[1:])],
)
def test_evaluations_of_an_encoder_that_is_not_finite_say_so(
    command, value, labelled_run, tmp_path, refused
):
    """NaN weights; and finite ones whose features overflow."""
    file, data = tmp_path / "encoder.safetensors", labelled_run.parent / "train.beton"
    if "voc07" in command:
        pytest.importorskip("sklearn")
        data = write_devkit(tmp_path).parent
    file.write_bytes((labelled_run / "encoder.safetensors").read_bytes())
    damage(file, value)
    status = evaluate(file, tmp_path / "out", *command.split(), "--size=32", "--data", data)
    expected = "layer1.0.bn2.weight" if value != value else "the encoder: values of its features"
    refused(status, expected, "not finite")
    assert not list(tmp_path.glob("out/*/result.json"))
    status = main(["export", str(file), "--to", "timm", "--out", str(tmp_path / "x.pth")])
    assert status == (2 if value != value else 0)


def test_features_that_overflow_half_precision_are_not_cached(labelled_run, tmp_path, capsys):
    file, data = tmp_path / "encoder.safetensors", labelled_run.parent / "train.beton"
    file.write_bytes((labelled_run / "encoder.safetensors").read_bytes())
    damage(file, 30)
    flags = ["--size=32", "--data", data]
    assert evaluate(file, tmp_path / "out", "knn", *flags) == 0
    for _ in range(2):  # the file of features is there the second time
        assert evaluate(file, tmp_path / "out", "linear", "--cached", *flags) == 2
        assert "values of its features are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["the encoder: values of its features", "did not converge"])
def test_a_probe_that_fails_is_a_warning(small_beton, reason, monkeypatch):
    setup = build(parse_pretrain([*TINY, "--data", str(small_beton)]))
    if reason == "did not converge":
        error = torch.linalg.LinAlgError(reason)
        monkeypatch.setattr("torch.linalg.eigh", mock.Mock(side_effect=error))
    else:
        for name, parameter in setup.model.encoder.named_parameters():
            if name.endswith("bn2.weight"):
                parameter.data.fill_(1e12)
    warnings: list[str] = []
    probe(setup, SimpleNamespace(warn=warnings.append), 8)
    (warning,) = warnings
    assert f"no probe at step 8: {reason}" in warning
