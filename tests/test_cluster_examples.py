"""The complete examples of docs/clusters.md: shell syntax, flags of bt-fast, options, schema."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bt_fast.cli import parse_pretrain

TEXT = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
(MANIFEST,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


def manifest() -> dict:
    return pytest.importorskip("yaml", reason="PyYAML is not installed").safe_load(MANIFEST)


def scripts() -> list[str]:
    return [*SCRIPTS, manifest()["spec"]["trainer"]["command"][-1]]


def test_the_scripts_are_valid_shell():
    assert len(SCRIPTS) == 3
    for script in scripts():
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_bt_fast_knows_the_flags():
    found = 0
    for script in scripts():
        line = script.replace("\\\n", " ")
        for words in re.findall(r"flags=\((--recipe .+?)\)|bt-fast pretrain (--recipe .+)", line):
            config = parse_pretrain("".join(words).split())
            assert config.recipe == "imagenet-8gpu" and config.run_dir is not None
            assert config.data.name == "out.beton"
            found += 1
    assert found == 3


def test_sbatch_knows_the_options(tmp_path):
    """It names the first option that it does not know, which is the one added at the end."""
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed")
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    (job,) = [script for script in SCRIPTS if "#SBATCH" in script]
    options = re.findall(r"^#SBATCH .+$", job, re.MULTILINE)
    assert len(options) == 11
    (tmp_path / "job").write_text("\n".join(["#!/bin/bash", *options, "#SBATCH --the-last"]) + "\n")
    done = subprocess.run(
        ["sbatch", tmp_path / "job"], capture_output=True, text=True,
        env={**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")},
    )  # fmt: skip
    assert "unrecognized option '--the-last'" in done.stderr


def test_the_manifest_is_a_train_job():
    """What the model of the API does not know, it drops."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed"
    )
    written = manifest()
    assert models.TrainerV1alpha1TrainJob.from_dict(written).to_dict() == written
