"""What this machine has and how fast it is, as numbers: measured, or asked of the system."""

import mmap
import os
import re
import shutil
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from pipelines.crop import RandomResizedCrop, cut, random_boxes
from pipelines.order import epoch_order

SECONDS = 1.0  # of each measurement
BLOCK = 1 << 17  # bytes a read: an ImageNet image
_GROUP = Path("/sys/fs/cgroup")  # limits of the container, if this is one
_HEIGHT, _WIDTH = 375, 500  # of the picture that is decoded: ImageNet's usual


def decode_rate() -> tuple[float, int]:
    """(images a core decodes and cuts two views of 224 px from in a second, bytes of the JPEG)."""
    jpeg = simplejpeg.encode_jpeg(_picture(), quality=90, colorsubsampling="420")
    keys = np.arange(2000, dtype=np.uint64)
    heights, widths = np.full(2000, _HEIGHT), np.full(2000, _WIDTH)
    boxes = random_boxes(RandomResizedCrop(), keys, heights, widths).reshape(1000, 2, 4)
    view = torch.empty(224, 224, 3, dtype=torch.uint8)
    before, count = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < SECONDS:
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False)
        for box in boxes[count % 1000]:
            cut(torch.from_numpy(pixels).permute(2, 0, 1), box, out=view)
        count += 1
    torch.set_num_threads(before)
    return count / seconds, len(jpeg)


def _picture() -> np.ndarray:
    """uint8 [375, 500, 3], of about as many bytes as JPEG as a photograph has."""
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    waves = [np.sin(x / (9 + 7 * c)) * np.cos(y / (31 - 8 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 9, (_HEIGHT, _WIDTH, 1))
    return np.clip(128 + 90 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


def read_rate(path: Path, num_threads: int) -> tuple[float, bool]:
    """Bytes/s of random reads of an image's size, and whether they came from the disk.

    Direct reads leave the page cache alone: it may be feeding a run. Where the file system has
    none, the system is asked to forget the file first, which it does not have to.
    """
    try:
        descriptor, direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except (OSError, AttributeError):
        descriptor, direct = os.open(path, os.O_RDONLY), False
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    blocks = iter(epoch_order(min(path.stat().st_size // BLOCK, 1 << 20), seed=0, epoch=0).tolist())
    started, lock, done = time.perf_counter(), threading.Lock(), [0]

    def read() -> None:
        buffer = mmap.mmap(-1, BLOCK)  # aligned, as direct reads want it
        while time.perf_counter() - started < SECONDS:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            num_bytes = os.preadv(descriptor, [buffer], block * BLOCK)
            with lock:
                done[0] += num_bytes

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return done[0] / seconds, direct


def free_memory() -> int:
    """Bytes that can still be taken, of the machine or of the container's share."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = int((_GROUP / "memory.max").read_text())
        return min(free, limit - int((_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit
        return free


def bytes_of_batch(num_images: int, size: int) -> int:
    """Both uint8 views of a batch, as the loader holds them. Beside a GPU that is page-locked
    memory, of which torch takes powers of two (its CachingHostAllocator, to use them again)."""
    num_bytes = 2 * num_images * size**2 * 3
    return 1 << (num_bytes - 1).bit_length() if torch.cuda.is_available() else num_bytes


def granted_cores() -> float | None:
    """Cores' worth of time that the container may take; None where nothing limits it."""
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max", or no such control here
        return None


def nvidia_driver() -> str | None:
    """Version of the driver in the kernel, None without one."""
    try:
        match = re.search(r"Module\s+([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match[1] if match else "of unknown version"


def c_compiler() -> tuple[str | None, str | None]:
    """(the compiler Triton would take, Python.h), None for what is not there."""
    found = (os.environ.get("CC"), *map(shutil.which, ("cc", "gcc", "clang")))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return next(filter(None, found), None), str(header) if header.exists() else None
