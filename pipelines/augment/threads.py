"""The two augmentation branches on a CPU; `pipelines.augment` is the definition.

The definition takes a batch as a whole, so everything between two ops goes through memory. Some
samples at a time stay in the cache instead, and one thread per core takes the next ones.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from pipelines import augment
from pipelines.augment import Draw, require_images

_PIXELS_PER_TASK = 800_000  # 16 samples of 224 px: more leave the cache, fewer pay for the calls


def apply(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """`pipelines.augment.apply` for images on the CPU: same arguments, same result."""
    require_images(images, parameters)
    n, height, width, _ = images.shape
    views = torch.empty((n, 3, height, width), dtype=dtype, memory_format=torch.channels_last)
    num_threads = torch.get_num_threads()
    share = max(1, min(_PIXELS_PER_TASK // (height * width), -(-n // num_threads)))

    def some(first: int) -> None:
        rows = slice(first, first + share)
        views[rows] = augment.apply(images[rows], parameters[rows], dtype=dtype)

    list(_threads(num_threads).map(some, range(0, n, share)))
    return views


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """As many as torch computes with; within each of them torch uses one."""
    return ThreadPoolExecutor(
        number, "bt-fast-augment", initializer=torch.set_num_threads, initargs=(1,)
    )
