"""Other implementations of a step's stages, timed as bt-fast's: the released code and kornia."""

import itertools
import time
from collections.abc import Iterator
from itertools import islice

import torch
from PIL import Image

from bt_fast.build import TrainingSetup
from bt_fast.prefetch import augment_batch
from pipelines.augment import Branch
from tools import reference
from tools.timing import images_per_second, seconds_of_parts, seconds_per_call


def reference_stages(setup: TrainingSetup, budget: float) -> Iterator[tuple[str, float]]:
    """Times the released code's stages on this setup's images, model and device.

    Yields (stage, seconds per batch) in order of priority.
    """
    yield from _model_stages(setup, budget)
    yield from _loader_stages(setup, budget)


def _model_stages(setup: TrainingSetup, budget: float) -> Iterator[tuple[str, float]]:
    """The step without loader, and its parts."""
    config, device, n = setup.config, setup.runtime.device, setup.config.batch_size
    batch = next(setup.loader.batches(0, 1))
    step = reference.Step(config.encoder, config.projector, device)
    views = augment_batch(batch, (config.view_a, config.view_b), setup.runtime)
    view_a, view_b = (view.float().contiguous() for view in views.chunk(2))
    rate = images_per_second((step(view_a, view_b) for _ in itertools.count()), n, device, budget)
    yield "step", n / rate
    z: list[torch.Tensor] = []

    def forward() -> None:
        step.optimizer.zero_grad()
        z[:] = step.forward(view_a, view_b)

    def backward() -> None:
        torch.autograd.backward(z, [torch.ones_like(part) for part in z])

    parts = seconds_of_parts([forward, backward], device, budget)
    for name, (busy, _) in zip(("forward", "backward"), parts, strict=True):
        yield name, busy
    yield "optimizer", seconds_per_call(step.optimizer.step, device, budget)[0]
    leaves = [part.detach().requires_grad_() for part in z]

    def loss() -> None:
        leaves[0].grad = leaves[1].grad = None
        step.loss(*leaves).backward()

    yield "loss", seconds_per_call(loss, device, budget)[0]


def _loader_stages(setup: TrainingSetup, budget: float) -> Iterator[tuple[str, float]]:
    """The loader, which decodes, crops and augments; decoding and augmentation alone are measured
    in one process and divided by the number of workers.
    """
    config, n = setup.config, setup.config.batch_size
    batch = next(setup.loader.batches(0, 1))
    transforms = reference.Views(
        config.size, (config.view_a, config.view_b), min_scale=config.min_scale
    )
    dataset, workers = reference.Images(setup.dataset, transforms), setup.num_threads
    yield "views", n * seconds_per_image(dataset, workers, min(n, 32))
    num_images, cpu, samples = min(n, 16), torch.device("cpu"), batch.request.samples.tolist()
    views = [view[:num_images].numpy() for view in batch.views.cpu()]
    crops = [[Image.fromarray(crop) for crop in view] for view in views]

    def augment() -> None:
        for images, branch in zip(crops, transforms.branches, strict=True):
            for image in images:
                for op in branch.transforms[1:]:  # all except the crop
                    image = op(image)

    def decode() -> None:
        for sample in samples[:num_images]:
            dataset.decode(sample)

    for name, function in (("decode", decode), ("augment", augment)):
        yield name, seconds_per_call(function, cpu, budget)[0] / num_images * n / workers


def seconds_per_image(dataset: reference.Images, workers: int, batch_size: int) -> float:
    """Seconds per image of the released code's loader, over complete rounds of its workers.

    Workers finish their batches simultaneously, one each, so that a shorter interval would measure
    the number of prefetched batches. Batches are small to allow more rounds.
    """
    batches = reference.endless(reference.loader(dataset, batch_size, workers))
    for _ in islice(batches, 3 * workers):  # two rounds may be prefetched
        pass
    started, count = time.perf_counter(), 4 * workers
    for _ in islice(batches, count):
        pass
    return (time.perf_counter() - started) / (count * batch_size)


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
