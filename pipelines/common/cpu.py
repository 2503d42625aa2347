"""Processor cores available to this process, which containers and batch systems often limit."""

import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores this process may keep busy: its affinity, or its CPU quota, rounded up."""
    limited = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time per time, in cores: the lowest quota of this process's control group and those that
    contain it, versions 1 and 2; None without one. `root` is the folder with proc/ and sys/.
    """
    quotas = []
    for folder, top in _control_groups(root):
        while True:
            quotas.append(_quota(folder))
            if folder == top:
                break
            folder = folder.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _control_groups(root: Path) -> list[tuple[Path, Path]]:
    """(folder of the group that limits this process, folder of the topmost visible group)."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    paths = {
        name: path
        for _, names, path in (g.split(":", 2) for g in groups)
        for name in names.split(",")
    }
    found = []
    for mount in mounts:  # 36 35 98:0 /top /mount/point options - type source options
        before, _, after = mount.partition(" - ")
        kind, _, options = after.split(" ", 2)
        name = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if name in paths and name in ("", *options.split(",")):
            mounted, point = before.split()[3:5]
            inside = os.path.relpath(paths[name], mounted)  # ../ if the group is not visible
            top = root / point.lstrip("/")
            found.append((top if inside.startswith("..") else top / inside, top))
    return found


def _quota(folder: Path) -> float | None:
    """The quota of one control group, in cores."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no limit ("max"), or the topmost group
        return None
