"""Processor cores available to this process, which containers and batch systems often limit."""

import math
import os
import re
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Number of cores this process may keep busy: its affinity, or its CPU quota, rounded up."""
    limited = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU time per time, in cores: the lowest quota of this process's control group and those that
    contain it; of version 1, of a container only. None without one. `root` has proc/ and sys/.
    """
    top = root / "sys/fs/cgroup"
    try:
        found = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.M)
    except OSError:  # not Linux
        return None
    group = top / (found[1] if found else "")  # in a container, perhaps one outside of it
    folders = [top / "cpu", *(f for f in (group, *group.parents) if f.is_relative_to(top))]
    return min((quota for quota in map(_quota, folders) if quota is not None), default=None)


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
