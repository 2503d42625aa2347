"""Usable cores: affinity and the CPU quotas of control groups."""

import os
from pathlib import Path

import pytest

from pipelines.common.cpu import cpu_quota, usable_cores


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    """A folder with the files of a machine's proc/ and sys/."""
    below = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in ({"proc/self/cgroup": group} | below).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def version_1(quota: str) -> dict[str, str]:
    return {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    "group,files,quota",
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "900000 100000", "a/b/cpu.max": "70000 10000"}, 7),
        ("0::/../other\n", {"cpu.max": "200000 100000"}, 2),  # outside of this namespace
        ("0::/pod/x\n", {"cpu.max": "3 1"}, 3),  # mounted: the container's group
        ("3:cpu:/\n", version_1("-1"), None),
        ("4:cpuset:/\n2:cpu:/docker/1\n0::/\n", version_1("400000") | {"cpu.max": "9 1"}, 4),
    ],
)
def test_the_lowest_quota_of_a_group_and_its_parents(tmp_path, group, files, quota):
    assert cpu_quota(machine(tmp_path, group, files)) == quota


@pytest.mark.parametrize(
    "quota,cores", [("max", 8), ("50000", 1), ("150000", 2), ("400000", 4), ("1600000", 8)]
)
def test_a_quota_counts_like_affinity(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert usable_cores(machine(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})) == cores


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None
