"""`bt-fast doctor`: its report matches the machine and names a fix for each problem."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import write_beton
from packaging.requirements import Requirement

from bt_fast.cli import main
from bt_fast.doctor import doctor, hardware, requirements
from bt_fast.doctor.doctor import Doctor, diagnose


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
    assert f"torch {torch.__version__.partition('+')[0]}" in output
    assert not os.listdir(tmp_path)


def test_the_report_fits_on_a_screen(tmp_path):
    command = [sys.executable, "-m", "bt_fast.cli", "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 40 and max(map(len, lines)) <= 100


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


def test_a_full_disk_is_broken(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, 10_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    assert rows(run_dir=tmp_path)["run directory"].broken


def test_too_old_and_missing_packages_are_broken(monkeypatch, capsys):
    wanted = {
        "": [Requirement("torch>=99"), Requirement("no-such-package>=1")],
        "dali": [Requirement("no-dali>=2")],
        "dev": [],
    }
    monkeypatch.setattr(requirements, "requirements", lambda: wanted)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "pip install 'torch>=99' 'no-such-package>=1'" in output
    assert "bt-fast[dali]" in output


def test_an_installation_has_the_requirements_of_the_checkout(monkeypatch, tmp_path):
    """Read from the metadata if there is no pyproject.toml."""
    here = requirements.requirements()
    lines = [str(r) for r in here[""]]
    lines += [f'{r} ; extra == "{e}"' for e in here if e for r in here[e]]
    monkeypatch.setattr(
        requirements, "__file__", str(tmp_path / "bt_fast" / "doctor" / "requirements.py")
    )
    monkeypatch.setattr(requirements.importlib.metadata, "requires", lambda name: lines)
    installed = requirements.requirements()
    assert {e: [r.name for r in installed[e]] for e in installed} == {
        e: [r.name for r in here[e]] for e in here
    }


def test_a_gpu_that_torch_cannot_use_is_broken_and_a_hidden_one_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "470.82")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (row,) = doctor.gpus()
    assert row.broken and "470.82" in row.value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = doctor.gpus()
    assert not row.problem


def test_several_gpus_need_shared_and_locked_memory(monkeypatch):
    usage = namedtuple("usage", "total used free")(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (65536, 65536))
    one, several = ({row.name: row for row in doctor.limits(count)} for count in (1, 8))
    assert not any(row.problem for row in one.values())
    assert several["shared memory"].problem and "--shm-size" in several["shared memory"].fix
    assert several["locked memory"].problem and "memlock" in several["locked memory"].fix


def test_limits_of_a_container_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    assert hardware.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.cpu_quota() is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert hardware.cpu_quota() == 0.5
    assert doctor.cores().fix == "bt-fast pretrain --workers 1"
    free = hardware.free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert hardware.free_memory() > free / 2
    (tmp_path / "memory.max").write_text("10000\n")
    assert hardware.free_memory() == 6000
    assert "--batch-size" in rows()["memory"].fix


def test_json_has_the_same_rows_and_replaces_no_file(tmp_path, capsys):
    file = tmp_path / "here.json"
    assert main(["doctor", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["can_run"] and [row["name"] for row in content["rows"]][:2] == [
        "Python",
        "packages",
    ]
    before = file.read_bytes()
    assert main(["doctor", "--json", str(file)]) == 2
    assert "remove it" in capsys.readouterr().err and file.read_bytes() == before


def test_gpus_that_do_not_compute_are_broken(monkeypatch):
    card = namedtuple("card", "name total_memory")("NVIDIA H200", 150e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 7))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    gpu, nccl = doctor.gpus()
    assert gpu.value.startswith("2 x NVIDIA H200, 150 GB") and not gpu.problem
    assert nccl.value == "2.30.7" and not nccl.problem

    def fail(count, device):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    gpu, nccl = doctor.gpus()
    assert gpu.broken and gpu.problem.endswith("ECC error encountered") and nccl.broken


def test_kernels_need_a_compiler(monkeypatch):
    assert doctor.compiler().broken == (hardware.c_compiler()[0] is None)
    monkeypatch.setattr(hardware, "c_compiler", lambda: (None, None))
    assert doctor.compiler().broken and "gcc" in doctor.compiler().fix
    monkeypatch.setattr(hardware, "c_compiler", lambda: ("/usr/bin/cc", None))
    assert doctor.compiler().problem and not doctor.compiler().broken


def test_a_package_that_does_not_load_is_broken(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bt_fast.recipes", None)  # importing it raises ImportError
    assert main(["doctor"]) == 1
    assert "does not load" in capsys.readouterr().out
