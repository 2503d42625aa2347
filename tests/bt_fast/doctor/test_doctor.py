"""`bt-fast doctor`: its report matches the machine and names a fix for each problem."""

import json
import os
import sys

import pytest
import torch
from conftest import write_beton
from packaging.requirements import Requirement

from bt_fast.cli import main
from bt_fast.distributed.collectives import require_divisible_batch
from bt_fast.doctor import doctor, hardware, requirements
from bt_fast.doctor.doctor import Doctor, diagnose
from bt_fast.plan import gpus
from bt_fast.recipes import RECIPES


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(hardware, "SECONDS", 0.02)


def rows(**options) -> dict[str, doctor.Row]:
    return {row.name: row for row in diagnose(Doctor(**options))}


def test_it_works_without_data_and_prints_how_to_create_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "bt-convert IMAGE_FOLDER out.beton" in output and "bt-fast can run here" in output
    assert not os.listdir(tmp_path)


def test_its_data_is_measured(tmp_path):
    data = write_beton(tmp_path / "some.beton", 24, sizes=((400, 500),))
    found = rows(data=data)
    assert "24 images" in found["data"].value and not found["data"].problem
    assert float(found["disk"].value.partition(" MB/s")[0].replace(",", "")) > 0


def test_damaged_data_and_a_run_folder_without_permission_are_broken(tmp_path, monkeypatch, capsys):
    data = write_beton(tmp_path / "some.beton", 24)
    with open(data, "r+b") as file:
        file.truncate(data.stat().st_size - 1)
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert main(["doctor", "--data", str(data), "--run-dir", str(tmp_path / "runs")]) == 1
    output = capsys.readouterr().out
    assert f"bt-convert IMAGE_FOLDER {data} --overwrite" in output
    assert "run directory (BROKEN): no permission" in output


def test_too_old_and_missing_packages_are_broken(monkeypatch, capsys):
    wanted = {"": [Requirement("torch>=99"), Requirement("no-such-package>=1")], "dev": []}
    with monkeypatch.context() as patch:
        patch.setattr(requirements, "requirements", lambda: wanted)
        assert main(["doctor"]) == 1
    assert "pip install 'torch>=99' 'no-such-package>=1'" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "timm", None)  # of the recipe's encoder
    assert main(["doctor", "--recipe", "imagenet-vit"]) == 1
    output = capsys.readouterr().out
    assert "pip install 'bt-fast[timm]'" in output and "pretrain uses" in output
    monkeypatch.setitem(sys.modules, "bt_fast.recipes", None)  # importing it raises ImportError
    assert main(["doctor"]) == 1
    assert "does not load" in capsys.readouterr().out


def test_a_gpu_that_torch_cannot_use_is_broken_and_a_hidden_one_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "470.82")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (row,) = doctor.gpus()
    assert row.broken and "470.82" in row.value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = doctor.gpus()
    assert not row.problem


def test_limits_of_a_container_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 0.5)
    assert doctor.cores().value.endswith("CPU time of 0.5")
    free = hardware.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert hardware.free_memory() > free / 2
    (tmp_path / "memory.max").write_text("10000\n")
    assert hardware.free_memory() == 6000
    assert "--batch-size" in rows()["memory"].fix


def test_json_has_the_same_rows(tmp_path):
    file = tmp_path / "here.json"
    assert main(["doctor", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["can_run"]
    assert {row["name"] for row in content["rows"]} >= {"Python", "packages", "memory"}


@pytest.mark.parametrize("num_gpus,used", [(1, 1), (3, 2), (6, 4)])
def test_the_suggested_accumulation_is_one_that_pretrain_accepts(monkeypatch, num_gpus, used):
    monkeypatch.setattr(gpus, "first_gpu", lambda: gpus.MODELS[0])  # 24 GB
    config = RECIPES["imagenet"]()
    fix = next(doctor.gpu_memory(config, num_gpus)).fix
    words = fix.partition(",")[0].split()
    assert words[words.index("--gpus") + 1] == str(used)
    require_divisible_batch(config.batch_size, used, 0, int(words[-1]))
