"""Processor cores this process may use."""

import os


def usable_cores() -> int:
    """Cores this process may run on; containers and batch systems often grant fewer than exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
