"""Checkpoints: exact, complete or absent, skipped if damaged."""

import hashlib
import itertools
import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import failing

from bt_fast.config import Config
from bt_fast.lars import LARS
from bt_fast.models.batch_norm import RunningStatistics
from bt_fast.models.networks import BarlowTwins
from bt_fast.run import checkpoint


def trained(steps: int = 2, seed: int = 0):
    torch.manual_seed(seed)
    model = BarlowTwins(Config(encoder="resnet18", projector=(8, 8))).to(
        memory_format=torch.channels_last
    )
    statistics = RunningStatistics(model)
    optimizer = LARS(model.parameters(), 0.1)
    for _ in range(steps):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        statistics.update(torch.tensor(True))
    return model, optimizer


def small_model():
    """As `trained`, without training."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
    optimizer = LARS(model.parameters(), 0.1)
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, model, optimizer, keep=2):
    state = checkpoint.Snapshot().take(model, optimizer)
    return checkpoint.write(folder, step, state, {"note": "x"}, keep=keep)


def same(a, b) -> bool:
    models = zip(a[0].state_dict().values(), b[0].state_dict().values(), strict=True)
    momenta = (
        (a[1].state[p]["momentum"], b[1].state[q]["momentum"])
        for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True)
    )
    return all(torch.equal(x, y) for x, y in (*models, *momenta))


def test_restoring_gives_the_same_tensors(tmp_path):
    source, target = trained(), trained(steps=1, seed=1)
    save(tmp_path, 7, *source)
    found, problems = checkpoint.newest(tmp_path)
    assert found.step == 7 and found.facts == {"note": "x"} and not problems
    assert not same(source, target)
    found.restore(*target)
    assert same(source, target)


def test_the_newest_ones_are_kept(tmp_path):
    state = small_model()
    for step in (5, 9, 10, 100):
        save(tmp_path, step, *state, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000100"]


@pytest.mark.parametrize(
    "file,damage",
    [
        ("model.safetensors", lambda data: data[:-1]),
        ("model.safetensors", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        ("optimizer.safetensors", lambda data: b""),
        ("state.json", lambda data: data[: len(data) // 2]),
        ("state.json", lambda data: b"[]"),
        ("state.json", lambda data: data.replace(b'"note": "x"', b'"note": "y"')),
        ("state.json", lambda data: b"[" * 100_000),
        ("state.json", None),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(tmp_path, file, damage):
    state = small_model()
    save(tmp_path, 1, *state)
    path = save(tmp_path, 2, *state) / file
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    found, problems = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(problems) == 1 and problems[0].startswith("step-00000002: ")


def test_a_failed_save_leaves_the_old_checkpoints(tmp_path):
    state = small_model()
    save(tmp_path, 1, *state)

    full = OSError(28, "No space left on device")
    with failing(os, "rename", full), pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, *state)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_a_torn_temporary_is_never_read(tmp_path):
    state = small_model()
    path = save(tmp_path, 3, *state)
    os.rename(path, path.with_name("step-00000004.tmp"))
    assert checkpoint.newest(tmp_path) == (None, [])


def test_another_models_checkpoint_is_refused(tmp_path):
    save(tmp_path, 1, *small_model())
    other = torch.nn.Linear(5, 4)
    with pytest.raises(ValueError, match="another model"):
        checkpoint.newest(tmp_path)[0].restore(other, LARS(other.parameters(), 0.1))


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path):
    """An earlier version wrote it."""
    model, optimizer = small_model()
    model[1].running_var[2] = torch.nan
    save(tmp_path, 1, model, optimizer)
    with pytest.raises(ValueError, match=r"values of 1\.running_var are not finite"):
        checkpoint.newest(tmp_path)[0].restore(*small_model())


def forge(folder, **changes) -> None:
    """Change state.json including its hash, as an attacker could."""
    state = json.loads((folder / "state.json").read_text()) | changes
    del state["sha256"]
    state["sha256"] = checkpoint._sha256_of_state(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_a_forged_checkpoint_is_skipped_or_refused(tmp_path):
    """With hashes that fit: facts of other types, broadcast shapes, dtypes, a lying header."""
    state = small_model()
    folder = save(tmp_path, 3, *state)
    text = (folder / "state.json").read_text()
    whole = json.loads(text)
    for changes in ({"step": float("inf")}, {"step": None}, {"files": []}, {"facts": 3}):
        forge(folder, **changes)
        found, problems = checkpoint.newest(tmp_path)
        assert found is None and problems[0].startswith("step-00000003: ")
        (folder / "state.json").write_text(text)
    for name, (tensor, message) in itertools.product(
        checkpoint._FILES,
        (
            (torch.zeros(1), "is float32 [1] there and float32 [4, 5] here"),
            (torch.zeros(4, 5, dtype=torch.float64), "is float64 [4, 5] there"),
            (None, "cannot be read"),
        ),
    ):
        original = (folder / name).read_bytes()
        if tensor is None:
            (folder / name).write_bytes(b"\xff" * 7 + b"\x7f{}")  # a header of 2 ** 63 bytes
        else:
            save_file(load_file(folder / name) | {"0.weight": tensor}, folder / name)
        content = (folder / name).read_bytes()
        fitting = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        forge(folder, files=whole["files"] | {name: fitting})
        found, problems = checkpoint.newest(tmp_path)
        assert not problems
        with pytest.raises(ValueError, match=re.escape(message)):
            found.restore(*state)
        (folder / name).write_bytes(original)


def test_checkpoints_from_before_state_json_had_a_hash_are_read(tmp_path):
    source, target = small_model(), small_model()
    file = save(tmp_path, 7, *source) / "state.json"
    state = json.loads(file.read_text())
    del state["sha256"]
    file.write_text(json.dumps(state))
    found, problems = checkpoint.newest(tmp_path)
    assert found.step == 7 and not problems
    found.restore(*target)
    assert same(source, target)


def test_equal_content_is_equal_bytes(tmp_path):
    """The library writes metadata in random order; 4! orders, so 20 files show it."""
    metadata = {"width": "64", "encoder": 'naïve "quoted"', "stem": "7x7", "norm": "batch"}
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)}
    for number in range(20):
        checkpoint.write_tensors(tensors, tmp_path / f"{number}", metadata)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(20)}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("weight"), tensors["weight"])
