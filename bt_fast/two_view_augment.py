"""The paper's two augmentations as a module, for other training loops."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from bt_fast.runtime import augmentation_on
from pipelines import augment
from pipelines.branches import VIEW_A, VIEW_B, Branch


class TwoViewAugment(nn.Module):
    """Both views of a batch of crops, augmented and normalised with ImageNet's statistics.

    Fused Triton kernels on an NVIDIA GPU, one thread per core on a CPU; `pipelines.augment` is the
    definition. Also random in evaluation mode; torch.compile leaves it as it is. Use it in the
    training process rather than in DataLoader workers: they would each start threads for all cores.

    Args:
        view_a: augmentations of view A; default: the paper's.
        view_b: augmentations of view B; default: the paper's.
        dtype: of the views, a floating-point type.
        channels_first: whether crops are [2, n, 3, h, w] instead of [2, n, h, w, 3].
    """

    def __init__(
        self,
        view_a: Branch = VIEW_A,
        view_b: Branch = VIEW_B,
        *,
        dtype: torch.dtype = torch.float32,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point type of torch, got {dtype!r}")
        for name, branch in ("view_a", view_a), ("view_b", view_b):
            if not isinstance(branch, Branch):
                raise ValueError(f"{name} must be a Branch, got {branch!r}")
        self.branches = view_a, view_b
        self.dtype = dtype
        self.channels_first = channels_first

    @torch.compiler.disable  # the draws are NumPy's, whose integers torch.compile cannot trace
    def forward(
        self,
        crops: torch.Tensor,
        *,
        keys: np.ndarray | Sequence[np.ndarray] | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Augment the crops of both views.

        Args:
            crops: uint8 [2, n, h, w, 3], crops of view A first, on any device.
            keys: uint64 [2, n], or one [n] per view, the random key of every view (a loader's
                `batch.request.keys`; `pipelines.order.view_keys`): the same keys give the same
                views. Default: drawn from the generator.
            generator: on the CPU; default: torch's. Seed each rank differently, or all draw alike.

        Returns:
            `dtype` [2 n, 3, h, w], view A first, channels-last, on the device of the crops.

        Raises:
            ValueError: another dtype or shape, or both keys and a generator.
            RuntimeError: a generator of a GPU.
        """
        expected = "[2, n, 3, h, w]" if self.channels_first else "[2, n, h, w, 3]"
        channels = 2 if self.channels_first else 4
        valid = crops.dtype == torch.uint8 and crops.ndim == 5
        if not valid or (crops.shape[0], crops.shape[channels]) != (2, 3):
            raise ValueError(
                f"crops must be uint8 {expected}, got {crops.dtype} {list(crops.shape)}; see"
                " channels_first for the other memory layout"
            )
        if self.channels_first:
            crops = crops.movedim(2, 4)
        if keys is not None and generator is not None:
            raise ValueError("keys are not drawn from a generator: give one of them")
        if keys is None:
            high = torch.iinfo(torch.int64).max
            shape = 2, crops.shape[1]
            keys = torch.randint(high, shape, generator=generator, device="cpu").numpy()
        keys = np.asarray(keys)
        if keys.dtype.kind not in "iu" or keys.shape != crops.shape[:2]:
            raise ValueError(
                f"keys must be uint64 {list(crops.shape[:2])}, got {keys.dtype} {list(keys.shape)}"
            )
        keys = keys.astype(np.uint64)
        parameters = augment.draw_views(self.branches, keys)
        apply = augmentation_on(crops.device)
        with torch.cuda.device_of(crops):
            return apply(crops.flatten(0, 1), parameters, dtype=self.dtype)
