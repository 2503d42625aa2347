"""Submission to Slurm, and interrupted runs on a real Slurm of two nodes on this machine."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import ranks
from tiny_runs import learned, same

from bt_fast.cli import main, parse_pretrain
from bt_fast.config import load_config
from bt_fast.distributed import slurm
from bt_fast.distributed.slurm import first_host
from tools.slurm_cluster import missing, slurm_cluster

pytestmark = pytest.mark.cluster
TINY = [*ranks.TINY, "--epochs=4", "--gpus=2"]
JOB = ["--slurm=debug", "--gpus-per-node=1"]


def options(script: str) -> dict[str, str]:
    """{name: value} of its #SBATCH lines."""
    lines = re.findall(r"^#SBATCH --(\S+)$", script, re.MULTILINE)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_job_of_32_gpus_can_be_seen_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no sbatch
    flags = ["--gpus=32", "--slurm=fast", "--run-dir=r", "--time-limit=1-0", "--slurm-args=-A me"]
    assert main(["pretrain", *flags, "--dry-run"]) == 0
    script = capsys.readouterr().out
    asked = options(script)
    counts = [asked[name] for name in ("nodes", "ntasks", "ntasks-per-node", "gres")]
    assert counts == ["4", "32", "8", "gpu:8"]
    assert (asked["partition"], asked["time"], asked["mem"]) == ("fast", "1-0", "0")
    assert {"requeue", "exclusive"} < asked.keys() and asked["signal"].startswith("USR2@")
    assert "#SBATCH -A me\n" in script and f"--resume {tmp_path}/r --gpus 32\n" in script
    assert not list(tmp_path.iterdir())
    assert subprocess.run(["/bin/bash", "-n"], input=script.encode()).returncode == 0


@pytest.mark.parametrize("status,calls", [(0, ""), (2, ""), (1, ""), (75, "requeue 7\n")])
def test_the_job_requeues_itself_when_stopped(tmp_path, status, calls):
    config = parse_pretrain(["--gpus=4", "--gpus-per-node=4"])
    script = slurm.job_script(config, 4, "fast", tmp_path / "a run")
    run = re.search(r"^.* -m bt_fast\.cli .*$", script, re.MULTILINE)[0]
    assert f"--resume '{tmp_path}/a run'" in run
    script = script.replace(run, f"(exit {status})")
    define = f'scontrol() {{ echo "$@" >> {tmp_path}/calls; }}\n'
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", define + script], env=environment)
    assert done.returncode == status
    assert ((tmp_path / "calls").read_text() if calls else "") == calls


def test_a_part_of_a_node_and_no_gpus():
    config = parse_pretrain(["--workers=6"])
    part = options(slurm.job_script(config, 4, "fast", Path("/r")))
    assert part["nodes"] == "1" and part["gres"] == "gpu:4" and part["cpus-per-task"] == "6"
    assert "exclusive" not in part
    assert "gres" not in options(slurm.job_script(parse_pretrain(TINY), 2, "fast", Path("/r")))


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gpus=12"], "--gpus 12 does not fill nodes with 8 each"),
        ([], "--slurm fast needs --gpus"),
        (["--gpus=8", "--batch-size=16"], "this machine has no sbatch"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    small_beton, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.setenv("PATH", str(tmp_path))
    data, run = f"--data={small_beton}", f"--run-dir={tmp_path / 'r'}"
    assert main(["pretrain", data, run, "--slurm=fast", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_run_is_submitted_and_submitted_again(small_beton, tmp_path, monkeypatch, capsys):
    sbatch, folder = tmp_path / "bin" / "sbatch", tmp_path / "run"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho '7;cluster'\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STEP_ID", "3")  # submitted from inside of a job
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    flags = ["--data", os.path.relpath(small_beton), "--run-dir", str(folder)]
    assert main(["pretrain", *TINY, *flags, *JOB]) == 0
    assert f"submitted as job 7: {folder}/slurm.sbatch" in capsys.readouterr().out
    saved = load_config(folder, "--resume")
    assert saved.slurm is None and saved.data == small_beton and saved.gpus == 2
    environment = (tmp_path / "environment").read_text()
    assert "SLURM_CONF" in environment and "SLURM_STEP_ID" not in environment
    assert main(["pretrain", "--resume", str(folder), "--slurm=debug", "--gpus=4"]) == 0
    assert options((folder / "slurm.sbatch").read_text())["nodes"] == "4"
    assert load_config(folder, "--resume").gpus == 4
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    assert main(["pretrain", "--resume", str(folder), "--slurm=debug", "--gpus=2"]) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "job,world_size,words",
    [
        ({"JOB_ID": 1, "STEP_ID": 0, "NTASKS": 8}, 8, None),  # a step already
        ({"JOB_ID": 1, "JOB_NUM_NODES": 1, "NTASKS": 1, "GPUS_ON_NODE": 8}, 8, None),
        ({"JOB_ID": 1, "JOB_NUM_NODES": 1, "NTASKS": 8}, 8, "--nodes=1 --ntasks=8 "),
        ({"JOB_ID": 1, "JOB_NUM_NODES": 4, "NTASKS": 32, "GPUS_ON_NODE": 8}, 32, "--nodes=4"),
        ({"JOB_ID": 1, "JOB_NUM_NODES": 2, "NTASKS": 2, "GPUS_ON_NODE": 8}, 16, "--overcommit"),
        ({"JOB_ID": 1, "JOB_NUM_NODES": 4, "NTASKS": 32, "GPUS_ON_NODE": 8}, 40, ValueError),
        ({"JOB_ID": 1, "JOB_NUM_NODES": 4, "NTASKS": 4}, 8, "--ntasks-per-node=2 "),
    ],
)
def test_which_jobs_take_the_ranks(monkeypatch, job, world_size, words):
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    if words is ValueError:
        with pytest.raises(ValueError, match=f"--gpus {world_size} does not fit this Slurm job"):
            slurm.srun(world_size, on_gpus=True)
        return
    found = slurm.srun(world_size, on_gpus=True)
    assert found is None if words is None else words in " ".join(found)


def test_the_smallest_node_decides(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: program)
    for name, value in {"JOB_ID": 1, "JOB_NUM_NODES": 3, "JOB_CPUS_PER_NODE": "16(x2),4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert "--ntasks=12" in slurm.srun(12, on_gpus=False)
    with pytest.raises(ValueError, match="3 nodes with 4 CPUs each"):
        slurm.srun(15, on_gpus=False)


def test_slurms_host_lists():
    assert first_host("gpu[03-05,9],x") == "gpu03"
    assert first_host("gpu7") == "gpu7"
    assert first_host("a,b[1-2]") == "a"


@pytest.fixture(scope="module")
def cluster():
    if reason := missing():
        pytest.skip(reason)
    with slurm_cluster() as environment:
        yield environment


def job_facts(job: str) -> str:
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout


def wait(job: str, ready, log: Path) -> None:
    """Until `ready`; fails when the job has ended before, or after ten minutes."""
    deadline = time.monotonic() + 600
    facts = job_facts(job)
    while not ready():
        on_its_way = not re.search("JobState=(COMPLETED|FAILED|CANCELLED)", facts)
        state = facts + (log.read_text() if log.exists() else "")
        assert on_its_way and time.monotonic() < deadline, state
        time.sleep(0.1)
        facts = job_facts(job)


def test_a_requeued_run_ends_as_an_undisturbed_one(
    cluster, small_beton, tmp_path, monkeypatch, capsys
):
    flags = ["pretrain", *TINY, "--data", str(small_beton)]
    assert main([*flags, "--run-dir", str(tmp_path / "undisturbed")]) == 0

    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    log, metrics = folder / "slurm.log", folder / "metrics.jsonl"
    assert main([*flags, *JOB, "--run-dir", str(folder), "--slurm=nowhere"]) == 2
    assert "invalid partition" in capsys.readouterr().err and not folder.exists()
    assert main([*flags, *JOB, "--run-dir", str(folder)]) == 0
    job = re.search(r"submitted as job (\d+)", capsys.readouterr().out)[1]
    assert main([*flags, *JOB, "--run-dir", str(folder)]) == 2
    assert "is not empty" in capsys.readouterr().err

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    wait(job, lambda: steps() >= 2, log)
    subprocess.run(["scontrol", "requeue", job], check=True)  # as preemption does
    wait(job, lambda: steps() >= 8, log)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait(job, lambda: "Restarts=2" in job_facts(job), log)
    wait(job, lambda: "JobState=COMPLETED" in job_facts(job), log)

    text = " ".join(log.read_text().split())
    begun = [int(step) for step in re.findall(r"resuming \S+ at step (\d+) of 16", text)]
    assert len(begun) == 3 and 0 == begun[0] < begun[1] < begun[2] < 16
    assert text.count("stopped; continue with") == 2 and text.count("step 16/16") == 1
    assert text.count("8 on each of 2 ranks") == 3
    assert same(learned(folder), learned(tmp_path / "undisturbed"))
