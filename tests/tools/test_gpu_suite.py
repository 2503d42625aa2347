"""tools/gpu_suite.py: whole runs at toy sizes, parts that break, and the report on all that."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import INTERPRETER_FAILS, ROOT, run_python
from tiny_runs import wait_until

from tools import gpu_suite, suite_report

pytestmark = pytest.mark.slow
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
NO_GPU["TRITON_INTERPRET"] = "0"
INTERPRETS = INTERPRETER_FAILS is None and os.environ["TRITON_INTERPRET"] == "1"


def suite(*flags, env=NO_GPU, **options) -> subprocess.CompletedProcess:
    return run_python(gpu_suite.__file__, *flags, env=env, **options)


def test_the_full_set_runs_to_its_end_at_toy_sizes(small_beton, tmp_path):
    """With fused kernels, as far as there is an interpreter for them."""
    out, env = tmp_path / "out", NO_GPU | {"TRITON_INTERPRET": str(int(INTERPRETS))}
    done = suite("--set", "full", "--out", out, "--data", small_beton, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["out"]  # scratch is elsewhere
    files = ["performance.md", "profile.png", "suite.json", "suite.log"]
    assert sorted(os.listdir(out)) == files
    parts = json.loads((out / "suite.json").read_text())["parts"]
    assert tuple(parts) == gpu_suite.FULL
    status = {name: part["status"] for name, part in parts.items()}
    assert status.pop("correctness") == "left out: no GPU"
    assert set(status.values()) == {"ok"}
    report = (out / "performance.md").read_text()
    rows = ["backward", "step, with loader", "convolutions", "augmentation", "plain loop"]
    rows += ["1 threads", "eval knn", "--norm=compiled --compile=off"]
    rows += ["stem, pool: norm_pool_backward"] * INTERPRETS
    for row in rows:
        assert f"| {row} | " in report
    assert "times as fast as the released code's step" in report


def test_learning_at_toy_sizes(small_beton, tmp_path):
    done = suite("--parts", "learning", "--out", tmp_path / "out", "--data", small_beton)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| epoch 2 | " in done.stdout and (tmp_path / "out" / "learning.png").exists()


def test_flags_that_cannot_be_used(tmp_path):
    unknown = suite("--parts", "x", "--out", tmp_path / "new")
    assert unknown.returncode == 2 and "--parts x: choose from correctness" in unknown.stderr
    (tmp_path / "suite.json").touch()
    used = suite("--out", tmp_path)
    assert used.returncode == 2 and "contains results" in used.stderr


@pytest.mark.parametrize("name", ["quick", "full"])
def test_limits_leave_time_for_every_part(name):
    seconds, parts = gpu_suite.SETS[name]
    assert sum(gpu_suite.LIMITS[part] for part in parts) <= seconds


ROW = """
import json, pathlib, sys, time
path = pathlib.Path(sys.argv[1], "result.json")
path.write_text(json.dumps({"Rows": {"first": {"ms": 1.5}}}))
time.sleep(1.5)  # until it is taken over
"""
BROKEN = {
    "kernels": ROW + "print('before the end', flush=True); time.sleep(1000)",
    "loss": ROW + "raise RuntimeError('broken on purpose')",
    "loader": ROW + 'path.write_text(\'{"Rows": {"fir\')',
    "variants": "",
    "dali": ROW,
}


@pytest.fixture
def broken_parts(monkeypatch):
    """Programs of a few lines in place of the parts, and a limit of ten seconds for each."""

    def command_of(name, data, folder):
        return [sys.executable, "-c", BROKEN[name], str(folder)]

    monkeypatch.setattr(gpu_suite, "command_of", command_of)
    monkeypatch.setattr(gpu_suite, "reason_to_skip", lambda name: "")
    monkeypatch.setattr(gpu_suite, "LIMITS", dict.fromkeys(BROKEN, 10))
    monkeypatch.setattr(gpu_suite, "SETS", {"quick": (10 * len(BROKEN), tuple(BROKEN))})
    monkeypatch.setattr(gpu_suite, "MIN_PART_SECONDS", 1)
    monkeypatch.setattr(gpu_suite, "STARTED", time.monotonic())


def test_a_broken_part_loses_nothing_of_the_others(broken_parts, small_beton, tmp_path, capsys):
    options = gpu_suite.Suite(set="quick", out=tmp_path, data=small_beton)
    assert gpu_suite.run(options) == 1
    found = json.loads((tmp_path / "suite.json").read_text())["parts"]
    status = {name: part["status"] for name, part in found.items()}
    assert status["kernels"].startswith("timed out after ")
    assert status["loss"] == "failed with 1"
    assert status["loader"].startswith("failed: result.json cannot be read: ")
    assert status["variants"] == "failed: no result file"
    assert status["dali"] == "ok"
    rows = {"Rows": {"first": {"ms": 1.5}}}
    for name in ("kernels", "loss", "loader", "dali"):
        assert found[name]["result"] == rows, name
    report = (tmp_path / "performance.md").read_text()
    assert report.count("| first | 1.5 |") == 4
    assert "broken on purpose" in (tmp_path / "suite.log").read_text()
    shown = capsys.readouterr().out
    assert "before the end" in shown and "RuntimeError: broken on purpose" in shown


def test_what_ends_the_suite_loses_no_row(tmp_path, small_beton):
    """SIGKILL loses none either: a row is in suite.json soon after it is measured."""
    part = ROW + "time.sleep(1000)"
    driver = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r})\n"
        "from tools import gpu_suite\n"
        f"gpu_suite.command_of = lambda *of: [sys.executable, '-c', {part!r}, str(of[2])]\n"
        "sys.exit(gpu_suite.main())\n"
    )
    flags = ["--out", str(tmp_path / "out"), "--data", str(small_beton), "--parts", "loss", "step"]
    process = subprocess.Popen([sys.executable, "-c", driver, *flags], env=NO_GPU, cwd=ROOT)
    report = tmp_path / "out" / "performance.md"
    wait_until(lambda: report.exists() and "| first | 1.5 |" in report.read_text(), process)
    found = json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]
    assert found["loss"]["result"]["Rows"] == {"first": {"ms": 1.5}}
    assert found["step"]["status"] == "not begun"
    log = (tmp_path / "out" / "suite.log").read_text()
    folder = log.strip().splitlines()[-1].split()[-1]
    assert folder in all_commands()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    found = json.loads((tmp_path / "out" / "suite.json").read_text())["parts"]
    assert found["loss"]["status"] == "interrupted"
    assert folder not in all_commands() and not Path(folder).exists()


def all_commands() -> str:
    return subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True).stdout


def test_targets_are_the_cards():
    """256 images in 100 ms."""
    stages = {"forward": {"seconds": 0.03}, "backward": {"seconds": 0.06}}
    step = {
        "title": "a step", "config": {"batch_size": 256}, "stages": stages, "breakdown": None,
        "step_without_data_s": 0.1, "step_s": 0.1, "ceilings": None,
    }  # fmt: skip
    augmentation = {"fused": {"us per view": 2.0}, "definition, compiled": {"us per view": 50.0}}
    found = {"step": step, "kernels": {"Augmentation": augmentation}}
    found["rivals"] = {"Released": {"step": {"ms": 210.0}}}
    tests = {"a": {"outcome": "passed"}, "b": {"outcome": "failed", "error": "E  assert 0"}}
    found["correctness"] = {"tests": tests}
    parts = {name: {"status": "ok", "seconds": 1.0, "result": r} for name, r in found.items()}

    def report(device: str) -> str:
        return suite_report.markdown({"facts": {"device": device}, "parts": parts})

    h100 = report("NVIDIA H100 80GB HBM3")
    assert "| views/s, views on device | 4,500, then 6,450 | 5,120 |" in h100
    assert "| fraction of MLPerf's rate on this GPU |  | 72% |" in h100
    assert "| step without encoder and projector | <= 4 % | 10.0% |" in h100
    assert "| times as fast as definition, compiled | >= 20 | 25.0 |" in h100
    assert "| times as fast as the released code's step | >= 2 | 2.10 |" in h100
    assert "1 failed, 1 passed" in h100 and "- `b`: `E  assert 0`" in h100
    assert "| 5,000, then 7,200 | 5,120 |" in report("NVIDIA H200")
    assert "none for this GPU" in report("NVIDIA L4") and "MLPerf" not in report("NVIDIA L4")


def test_failures_are_shown_when_they_happen(tmp_path):
    """Also where the tests run in other processes, and where one of them never ends."""
    (tmp_path / "test_some.py").write_text(
        "import time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 'this' == 'that'\n"
        "def test_hangs(): time.sleep(1000)\n"
    )
    program = (
        f"import sys; sys.path.append({str(ROOT / 'tools')!r})\n"
        "from pathlib import Path; from tools import results, suite_parts\n"
        f"recorded = results.Results(Path({str(tmp_path / 'result.json')!r}))\n"
        f"suite_parts.run_tests(recorded, 50, '-o', 'addopts=', {str(tmp_path)!r})\n"
    )
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=NO_GPU, stdout=log,
            process_group=0,
        )  # fmt: skip
    result = tmp_path / "result.json"

    def outcomes() -> dict[str, str]:
        tests = json.loads(result.read_text())["tests"] if result.exists() else {}
        return {name.partition("::")[2]: test["outcome"] for name, test in tests.items()}

    try:
        wait_until(lambda: len(outcomes()) == 2, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert outcomes() == {"test_good": "passed", "test_bad": "failed"}
    assert "assert 'this' == 'that'" in (tmp_path / "log").read_text()


def without(*packages: str, program: str, arguments: list) -> subprocess.CompletedProcess:
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
        f"sys.path.append({str(ROOT / 'tools')!r})\n"
        f"sys.argv = {[program, *map(str, arguments)]!r}\n"
        f"runpy.run_path({str(ROOT / 'tools' / program)!r}, run_name='__main__')"
    )
    return run_python("-c", code, env=NO_GPU)


def test_a_missing_package_is_one_line(tmp_path):
    done = without("tyro", "simplejpeg", program="gpu_suite.py", arguments=["--out", tmp_path])
    assert done.returncode == 2
    assert done.stderr == "gpu_suite.py: not installed: simplejpeg, tyro\n"


def test_a_profile_needs_neither_pictures_nor_tensorboard(small_beton, tmp_path):
    flags = ["--recipe=demo", "--device=cpu", "--batch-size=4", "--size=32", "--seconds=0.02"]
    flags += ["--projector", 16, 16, "--data", small_beton, "--out", tmp_path / "out"]
    done = without("matplotlib", "tensorboard", program="profile.py", arguments=flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no profile.png: " in done.stdout
    assert os.listdir(tmp_path / "out") == ["profile.json"]


def test_the_commands_run_from_a_checkout(tmp_path):
    for module, flag, wanted in (("bt_fast", "--help", "pretrain"), ("pipelines", "--version", "")):
        done = run_python("-m", module, flag, env=NO_GPU, cwd=tmp_path)
        assert done.returncode == 0 and wanted in done.stdout and not done.stderr
