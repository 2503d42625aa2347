"""Hardware of this machine and its speed: measured, or reported by the system.

Free of torch and numpy at its top, which a broken installation may lack.
"""

import mmap
import os
import re
import shutil
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 1.0  # duration of each measurement
BLOCK = 1 << 17  # bytes per read, about those of an ImageNet image
_CGROUP = Path("/sys/fs/cgroup")  # limits of a container
_HEIGHT, _WIDTH = 375, 500  # of the image that is decoded: the usual size in ImageNet


def decode_rate() -> tuple[float, int]:
    """(images/s of one core: decoding and cutting two views of 224 px; bytes of the JPEG)."""
    import numpy as np
    import simplejpeg
    import torch

    from pipelines.crop import RandomResizedCrop, crop_and_resize, random_boxes

    # An image whose JPEG has about the size of a photograph's.
    y, x = np.mgrid[:_HEIGHT, :_WIDTH]
    waves = [np.sin(x / (9 + 7 * c)) * np.cos(y / (31 - 8 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 9, (_HEIGHT, _WIDTH, 1))
    image = np.clip(128 + 90 * np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)
    jpeg = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
    keys = np.arange(2000, dtype=np.uint64)
    heights, widths = np.full(2000, _HEIGHT), np.full(2000, _WIDTH)
    boxes = random_boxes(RandomResizedCrop(), keys, heights, widths).reshape(1000, 2, 4)
    view = np.empty((224, 224, 3), np.uint8)
    num_threads, count = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < SECONDS:
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False)
        for box in boxes[count % 1000]:
            crop_and_resize(pixels, box, out=view)
        count += 1
    torch.set_num_threads(num_threads)
    return count / seconds, len(jpeg)


def read_rate(path: Path, num_threads: int) -> tuple[float, bool]:
    """(bytes/s of random reads of an image's size, whether they bypassed the page cache).

    Direct reads leave the page cache as it is, because a run may be using it.
    """
    from pipelines.order import epoch_order

    try:
        descriptor, direct = os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        descriptor, direct = os.open(path, os.O_RDONLY), False
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    blocks = epoch_order(min(path.stat().st_size // BLOCK, 1 << 20), seed=0, epoch=0).tolist()
    started = time.perf_counter()

    def read(first: int) -> int:
        """Read every num_threads-th block until the time is over; returns the bytes."""
        buffer, num_read = mmap.mmap(-1, BLOCK), 0  # aligned, as direct reads require
        for block in blocks[first::num_threads]:
            if time.perf_counter() - started > SECONDS:
                break
            num_read += os.preadv(descriptor, [buffer], block * BLOCK)
        return num_read

    with ThreadPoolExecutor(num_threads) as pool:
        num_read = sum(pool.map(read, range(num_threads)))
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return num_read / seconds, direct


def free_memory() -> int:
    """Available bytes of the machine's memory, or of the container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (free,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        return min(free, limit - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit
        return free


def nvidia_driver() -> str | None:
    """Version of the kernel's NVIDIA driver; None without one."""
    try:
        match = re.search(r"Module\s+([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match[1] if match else "of unknown version"


def c_compiler() -> tuple[str | None, str | None]:
    """(path of the compiler that Triton uses, path of Python.h), None for a missing one."""
    candidates = (os.environ.get("CC"), *map(shutil.which, ("cc", "gcc", "clang")))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return next(filter(None, candidates), None), str(header) if header.exists() else None
