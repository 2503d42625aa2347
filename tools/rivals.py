"""Stages of a step done otherwise, timed like bt-fast's own: the released code's way, and kornia's.

Each function returns {stage: seconds per batch of n images}; `profile.py` prints the ratios.
"""

import itertools

import torch
from PIL import Image

from bt_fast.feed import distort
from bt_fast.job import Job
from pipelines.augment import Branch
from tools import reference
from tools.timing import images_per_second, seconds_of_parts, seconds_per_call


def reference_stages(job: Job, budget: float) -> dict[str, float]:
    """The released code's stages, on this job's images, model and device.

    "decode" and "augment" are one process's time divided by the workers they are spread over;
    "views" is its loader, which does all of that; "step" has no loader.
    """
    config, device, n = job.config, job.performance.device, job.config.batch_size
    transforms = reference.Views(
        config.size, (config.view_a, config.view_b), min_scale=config.min_scale
    )
    dataset = reference.Images(job.reader, transforms)
    workers, cpu = job.num_threads, torch.device("cpu")
    batch = next(job.loader.batches(0, 1))
    samples = batch.samples.tolist()

    def augment() -> None:
        for crop, branch in zip(crops, dataset.views.branches, strict=True):
            for image in crop:
                for op in branch.transforms[1:]:  # all but the crop
                    image = op(image)

    some = min(n, 16)
    crops = [[Image.fromarray(crop) for crop in view[:some].numpy()] for view in batch.views]
    seconds = {}
    each, _ = seconds_per_call(lambda: [dataset.decode(i) for i in samples[:some]], cpu, budget)
    seconds["decode"] = each / some * n / workers
    each, _ = seconds_per_call(augment, cpu, budget)
    seconds["augment"] = each / some * n / workers
    batches = reference.endless(reference.loader(dataset, n, workers))
    seconds["views"] = n / images_per_second(batches, n, cpu, 2 * budget)

    step = reference.Step(config.encoder, config.projector, device)
    views = distort(batch, (config.view_a, config.view_b), job.performance)
    view_a, view_b = (view.float().contiguous() for view in views.chunk(2))
    z: list[torch.Tensor] = []

    def forward() -> None:
        step.optimizer.zero_grad()
        z[:] = step.forward(view_a, view_b)

    def backward() -> None:
        torch.autograd.backward(z, [torch.ones_like(part) for part in z])

    parts = seconds_of_parts([forward, backward], device, budget)
    seconds["forward"], seconds["backward"] = (busy for busy, _ in parts)
    leaves = [part.detach().requires_grad_() for part in z]

    def loss() -> None:
        leaves[0].grad = leaves[1].grad = None
        step.loss(*leaves).backward()

    seconds["loss"] = seconds_per_call(loss, device, budget)[0]
    seconds["optimizer"] = seconds_per_call(step.optimizer.step, device, budget)[0]
    rate = images_per_second((step(view_a, view_b) for _ in itertools.count()), n, device, budget)
    seconds["step"] = n / rate
    return seconds


def kornia_stages(job: Job, budget: float) -> dict[str, float]:
    """kornia's augmentation of the same crops, after the crop: {"augment": seconds}."""
    branches = [kornia_branch(branch) for branch in (job.config.view_a, job.config.view_b)]
    device = job.performance.device
    batch = next(job.loader.batches(0, 1))
    crops = batch.views.to(device)

    def augment() -> list[torch.Tensor]:
        return [
            branch(crop.permute(0, 3, 1, 2).float() / 255).to(job.performance.view_dtype)
            for branch, crop in zip(branches, crops, strict=True)
        ]

    return {"augment": seconds_per_call(augment, device, budget)[0]}


def kornia_branch(branch: Branch) -> torch.nn.Module:
    """One branch from kornia's modules, in the order of `pipelines.augment`."""
    import kornia.augmentation as K

    from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD

    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=branch.flip),
        K.ColorJitter(
            branch.brightness, branch.contrast, branch.saturation, branch.hue, p=branch.jitter
        ),
        K.RandomGrayscale(p=branch.grayscale),
        K.RandomGaussianBlur((13, 13), branch.sigma, p=branch.blur),
        K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=branch.solarize),
        K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )
