"""Usable cores: affinity and the CPU quotas of control groups."""

import os
from pathlib import Path

import pytest

from pipelines.common.cpu import cpu_quota, usable_cores

V1 = "30 25 0:26 {top} /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu\n"
V1_JOINT = "30 25 0:26 {top} /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "31 25 0:27 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder with the files of a machine's proc/ and sys/."""
    below = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    for name, content in {
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": mounts,
        **below,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    "groups,mounts,files,quota",
    [
        ("0::/\n", V2, {}, None),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", V2, {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", V2, {"a/cpu.max": "900000 100000", "a/b/cpu.max": "70000 10000"}, 7),
        ("0::/../other\n", V2, {"cpu.max": "200000 100000"}, 2),  # outside of this namespace
        (
            "0::/pod/x\n",
            "31 25 0:27 /pod/x /sys/fs/cgroup rw - cgroup2 none rw\n",
            {"cpu.max": "3 1"},
            3,
        ),
        (
            "3:cpu:/\n0::/\n",
            V1,
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1000"},
            None,
        ),
        (
            "4:cpuacct,cpu:/job\n5:memory:/m\n",
            V1_JOINT,
            {"cpu/job/cpu.cfs_quota_us": "250000", "cpu/job/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            "4:cpuset:/\n2:cpu:/docker/1\n0::/\n",  # mounted: the container's group
            V1.replace("{top}", "/docker/1") + V2,
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000", "cpu.max": "9 1"},
            4,
        ),
    ],
)
def test_the_lowest_quota_of_a_group_and_its_parents(tmp_path, groups, mounts, files, quota):
    root = machine(tmp_path, groups, mounts.format(top="/"), files)
    assert cpu_quota(root) == quota


@pytest.mark.parametrize(
    "quota,cores", [("max", 8), ("50000", 1), ("150000", 2), ("400000", 4), ("1600000", 8)]
)
def test_a_quota_counts_like_affinity(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    files = {"cpu.max": f"{quota} 100000\n"}
    assert usable_cores(machine(tmp_path, "0::/\n", V2.format(top="/"), files)) == cores


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None
