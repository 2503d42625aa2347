"""Features of a frozen encoder on the central crops of a `.beton`."""

import numpy as np
import torch
import torch.nn.functional as F

from bt_fast.perf import Performance
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.loader import center_crops


@torch.no_grad()
def extract_features(
    encoder: torch.nn.Module,
    reader: BetonReader,
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
    was_training = encoder.training
    encoder.eval()
    device = performance.device
    crops = center_crops(
        reader,
        samples,
        size=size,
        share=crop,
        num_threads=num_threads,
        pin_memory=device.type == "cuda",
    )
    features = []
    for images in crops:
        images = images.to(device, non_blocking=True)
        with performance.autocast():
            batch = encoder(augment.plain(images, dtype=performance.view_dtype))
        features.append(F.normalize(batch.float(), dim=1))
    encoder.train(was_training)
    return torch.cat(features)
