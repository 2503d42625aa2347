"""Processor cores available to this process."""

import os


def usable_cores() -> int:
    """Number of cores this process may run on; containers and batch systems often limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
