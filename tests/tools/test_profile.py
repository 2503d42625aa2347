"""tools/profile.py: measurements, advice and ranks; and that it does not hide `profile`."""

import json
import os
import subprocess
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image
from tiny_runs import TINY

from bt_fast.build import build
from bt_fast.cli import parse_pretrain
from bt_fast.recipes import RECIPES
from bt_fast.runtime import Runtime
from pipelines.beton import BetonReader
from tools import stages, synthetic
from tools.breakdown import CLASSES, Breakdown
from tools.profile_report import Report
from tools.timing import Stage

STAGES = ("read", "decode", "crop", "loader", "augment", "forward", "backward", "loss", "optimizer")
FLAGS = ["--recipe=demo", "--device=cpu", "--batch-size=4", "--size=32", "--seconds=0.02"]
FLAGS += ["--projector", "16", "16"]


def profile(folder, *flags, ranks: int = 0) -> subprocess.CompletedProcess:
    """Run the tool as a user does: its own folder comes first on sys.path."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun[: 4 * (ranks > 0)], ROOT / "tools" / "profile.py", *FLAGS, *flags]
    return run_python(*command, cwd=folder, env={**os.environ, "TRITON_INTERPRET": "0"})


@pytest.mark.slow
def test_a_compiled_step_is_profiled_and_predicted(small_beton, tmp_path):
    flags = ("--data", small_beton, "--out", tmp_path / "p", "--compile=default", "--gpus=4")
    done = profile(tmp_path, *flags, "--against", "reference", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("step, with loader", "verdict: ", "predicted: 4 ranks"):
        assert text in done.stdout
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert set(STAGES) <= set(found["stages"])
    assert all(stage["seconds"] > 0 for stage in found["stages"].values())
    assert found["step_s"] > 0 and found["images_per_s"] == pytest.approx(4 / found["step_s"])
    assert found["stages"]["backward"]["flop"] > found["stages"]["forward"]["flop"] > 1e6
    assert found["environment"]["compile"] == "default" and found["prediction"]["step"] > 0
    assert found["ranks"] is None and found["verdict"] == found["switches"][0]
    classes, step = found["breakdown"]["parts"], found["breakdown"]["step"]
    assert list(classes) == [name for name in CLASSES if name != "communication"]
    for name in ("convolutions", "products", "optimizer", "augmentation"):
        assert classes[name]["seconds"] > 0 and classes[name]["ceiling"], name
        assert classes[name]["flop"] + classes[name]["bytes"] > 0, name
    alone = sum(part["alone"] for name, part in classes.items() if name != "gaps")
    assert alone + classes["gaps"]["seconds"] >= 0.99 * step
    rivals = found["rivals_s"]["reference"]
    names = {"decode", "augment", "views", "forward", "backward", "loss", "optimizer", "step"}
    assert set(rivals) == names and all(seconds > 0 for seconds in rivals.values())
    with Image.open(tmp_path / "p" / "profile.png") as picture:
        assert len(np.unique(np.array(picture))) > 20
    again = profile(tmp_path, *flags)
    assert again.returncode == 2 and "contains a profile" in again.stderr


@pytest.mark.slow
def test_ranks_of_torchrun_are_measured_beside_one_alone(small_beton, tmp_path):
    done = profile(tmp_path, "--data", small_beton, "--out", tmp_path / "p", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("profiling ") == done.stdout.count("written: ") == 1  # one rank prints
    assert "2 ranks, each with this batch" in done.stdout
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    ranks, alone = found["ranks"], found["step_without_data_s"]
    assert ranks["world_size"] == 2 and ranks["alone"] == alone and ranks["step"] > 0
    assert ranks["efficiency"] == pytest.approx(alone / ranks["step"])
    assert "communication" not in found["breakdown"]["parts"]
    collectives = ranks["breakdown"]["parts"]["communication"]
    assert collectives["seconds"] >= collectives["alone"] > 0
    # ResNet-18 has 20 batch norms, the projector one: two all-reduces each; loss and gradients.
    assert collectives["launches"] > 2 * 21 + 3
    assert found["prediction"]["world_size"] == 2


def test_a_mistake_is_said_once_by_all_ranks(small_beton, tmp_path):
    (tmp_path / "profile.json").touch()
    done = profile(tmp_path, "--data", small_beton, "--out", tmp_path, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("profile.py: --out") == 1 and "contains a profile" in done.stderr


@pytest.mark.parametrize(
    "flags,message",
    [
        pytest.param(
            ["--link-gbps", "0"],
            "--link-gbps and --seconds must be positive",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--resume", "runs/x"], "apply to runs, not to profiles", marks=pytest.mark.slow
        ),
        (["--data", "nowhere.beton"], "--data nowhere.beton does not exist"),
    ],
)
def test_a_wrong_flag_is_one_line(tmp_path, flags, message):
    done = profile(tmp_path, *flags)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)


def report(device: str = "cuda", *, step: float, alone: float, **stages):
    """A report of made-up measurements: seconds per batch of 100 images."""
    seconds = dict.fromkeys((*STAGES, "copy"), 1e-4) | stages
    config = replace(RECIPES["imagenet"](), norm="compiled")
    runtime = Runtime(device=torch.device(device), precision="bf16", compile="default")
    setup = types.SimpleNamespace(config=config, runtime=runtime, num_threads=10**6)
    return Report(
        setup=setup,
        data="data",
        stages={name: Stage(name=name, seconds=value) for name, value in seconds.items()},
        step=step,
        step_without_data=alone,
        breakdown=Breakdown(
            step=alone,
            parts={
                "convolutions": Stage(name="convolutions", seconds=0.05),
                "norm": Stage(name="norm", seconds=0.04),
            },
            kernels={"longest": []},
        ),
    )


def test_the_advice_begins_with_what_takes_longest():
    fed = report(step=0.1, alone=0.1, loader=0.05)
    assert [line.split(":")[0] for line in fed.advice()] == ["convolutions", "norm"]
    assert "--norm fused" in fed.advice()[1]
    slow_loader = report(step=0.4, alone=0.1, loader=0.4, decode=0.08)
    assert slow_loader.advice()[0].startswith("waiting for data: 75% of the step: --workers")
    # On a CPU the rest of the step is not waiting: the loader shares the cores.
    on_cpu = report("cpu", step=0.4, alone=0.1, loader=0.1)
    assert "waiting for data: 25%" in "".join(on_cpu.advice())
    assert report(step=0.0, alone=0.1).advice() == []


def test_a_profile_is_saved_before_it_is_complete(tmp_path):
    partial = report("cpu", step=0.0, alone=0.1)
    for name in (*STAGES, "copy"):
        del partial.stages[name]
        partial.save(tmp_path / "profile.json")
        found = json.loads((tmp_path / "profile.json").read_text())
        assert found["verdict"] is None and found["step_without_data_s"] == 0.1


def test_synthetic_images_cost_what_imagenets_do(tmp_path):
    """500x375 pixels in about 110 kB."""
    reader = BetonReader(synthetic.images(tmp_path, 64))
    assert len(reader) == 64 and (reader.sizes == (375, 500)).all()
    sizes = [len(reader.image(i)) for i in range(16)]
    assert 80_000 < np.mean(sizes) < 150_000


def test_a_loader_of_processes_is_timed_by_one_thread(small_beton):
    setup = build(parse_pretrain([*TINY, "--data", str(small_beton), "--workers=2"]))
    on_gpu = replace(setup, runtime=replace(setup.runtime, device=torch.device("cuda")))
    assert [stage.name for stage in stages.loader_stages(on_gpu, 0.02)] == list(STAGES[:4])


QUICK = ("make_demo_images.py", "profile.py")  # the others start in the same way, more slowly
TOOLS = [
    pytest.param(path.name, marks=[] if path.name in QUICK else pytest.mark.slow)
    for path in sorted((ROOT / "tools").glob("*.py"))
    if "__main__" in path.read_text() and path.name != "suite_parts.py"
]


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_starts_beside_a_file_called_profile(name, tmp_path):
    if name == "kernel_report.py":
        pytest.importorskip("triton")
    done = run_python(ROOT / "tools" / name, "--help", cwd=tmp_path)
    assert not done.stderr and name.removesuffix(".py") in done.stdout
