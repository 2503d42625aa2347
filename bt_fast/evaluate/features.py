"""Features of a frozen encoder on the central crops of a data set."""

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.evaluate.views import Images, Views, encode
from bt_fast.perf import Performance


def extract_features(
    encoder: torch.nn.Module,
    reader: Images,
    samples: np.ndarray,
    performance: Performance,
    *,
    size: int,
    crop: float,
    num_threads: int,
) -> torch.Tensor:
    """L2-normalised features of the given samples: float32 [n, width] on the encoder's device.

    The encoder runs in evaluation mode and is left in the mode it was in.
    """
    views = Views(reader, performance, size=size, num_threads=num_threads)
    return F.normalize(encode(encoder, views.central(samples, crop), performance), dim=1)
