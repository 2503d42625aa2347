"""The two augmentation branches on a CPU; `pipelines.augment` is the definition.

The definition takes a batch as a whole, so everything between two ops goes through memory. A few
samples at a time stay in the cache instead, and one thread per core takes the next few.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from pipelines import augment
from pipelines.augment import Draw, require_images

_SAMPLES_PER_TASK = 4


def apply(
    images: torch.Tensor, parameters: Draw, *, dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """`pipelines.augment.apply` for images on the CPU: same arguments, same result."""
    require_images(images, parameters)
    n, height, width, _ = images.shape
    views = torch.empty((n, 3, height, width), dtype=dtype, memory_format=torch.channels_last)

    def some(first: int) -> None:
        rows = slice(first, first + _SAMPLES_PER_TASK)
        views[rows] = augment.apply(images[rows], parameters[rows], dtype=dtype)

    list(_threads(torch.get_num_threads()).map(some, range(0, n, _SAMPLES_PER_TASK)))
    return views


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """As many as torch computes with; within each of them torch uses one."""
    return ThreadPoolExecutor(
        number, "bt-fast-augment", initializer=torch.set_num_threads, initargs=(1,)
    )
