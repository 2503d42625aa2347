"""Stages of the released code's step, reimplemented from its description as the baseline of
`profile.py` and the benchmarks.

Images are decoded, cropped, jittered and blurred by Pillow in worker processes; the encoder is
called once per view in NCHW memory under float16 AMP with a gradient scaler (float32 on a CPU,
where that AMP has no effect); the D x D cross-correlation matrix is formed; LARS loops over the
parameters in Python. Its operations across GPUs (SyncBN, an all-reduce of the matrix) are omitted.
"""

import io
import multiprocessing
import random
from collections.abc import Iterable, Iterator

import torch
from PIL import Image, ImageFilter, ImageOps
from torch import nn

from bt_fast.choices import Stem
from bt_fast.lars import parameter_groups
from bt_fast.models.networks import build_encoder, build_projector, feature_width
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, VIEW_A, VIEW_B, Branch
from pipelines.beton import BetonReader

LAMBD = 0.0051


class Views:
    """Both branches of one Pillow image: two float32 tensors [3, size, size]."""

    def __init__(
        self,
        size: int,
        branches: tuple[Branch, Branch] = (VIEW_A, VIEW_B),
        min_scale: float = 0.08,
    ) -> None:
        from torchvision import transforms

        def compose(branch: Branch):
            colours = branch.brightness, branch.contrast, branch.saturation, branch.hue
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(
                        size,
                        scale=(min_scale, 1.0),
                        interpolation=transforms.InterpolationMode.BICUBIC,
                    ),
                    transforms.RandomHorizontalFlip(branch.flip),
                    transforms.RandomApply([transforms.ColorJitter(*colours)], branch.jitter),
                    transforms.RandomGrayscale(branch.grayscale),
                    Maybe(branch.blur, Blur(branch.sigma)),
                    Maybe(branch.solarize, ImageOps.solarize),
                    transforms.ToTensor(),
                    transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ]
            )

        self.branches = tuple(compose(branch) for branch in branches)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        return self.branches[0](image), self.branches[1](image)


class Maybe:
    """Apply a function of an image with a probability."""

    def __init__(self, probability: float, function) -> None:
        self.probability, self.function = probability, function

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.function(image) if random.random() < self.probability else image


class Blur:
    """Pillow's Gaussian blur with a random sigma."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class Images(torch.utils.data.Dataset):
    """The images of a `.beton`, decoded by Pillow as from an image folder."""

    def __init__(self, reader: BetonReader, views: Views) -> None:
        self.reader, self.views = reader, views

    def __len__(self) -> int:
        return len(self.reader)

    def decode(self, index: int) -> Image.Image:
        data = self.reader.image(index)
        if self.reader.is_raw(index):
            height, width = self.reader.size(index)
            return Image.frombuffer("RGB", (width, height), bytes(data))
        return Image.open(io.BytesIO(data)).convert("RGB")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.views(self.decode(index))


def loader(
    dataset, batch_size: int, workers: int, *, epochs: bool = False
) -> torch.utils.data.DataLoader:
    """The released code's DataLoader; workers are forked from a process without CUDA.

    Adapted to small data sets for a fair comparison of speed: workers persist, and an epoch repeats
    the images until it has eight batches per worker; with `epochs` it has every image once.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    num_samples = len(dataset) if epochs else max(len(dataset), 8 * workers * batch_size)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=torch.utils.data.RandomSampler(dataset, num_samples=num_samples),
        drop_last=True,
        num_workers=workers,
        multiprocessing_context=processes,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


def endless(batches: Iterable) -> Iterator:
    while True:
        yield from batches


class Step:
    """Model, optimizer and one training step on views [n, 3, H, W] on the device."""

    def __init__(
        self,
        encoder: str,
        projector: tuple[int, ...],
        device: torch.device,
        *,
        stem: Stem = "imagenet",
        zero_init: bool = True,
        lambd: float = LAMBD,
        weight_decay: float = 1e-6,
    ) -> None:
        self.lambd = lambd
        backbone = build_encoder(encoder, stem=stem, zero_init=zero_init)
        layers = build_projector((feature_width(backbone), *projector))
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm1d):
                layers[i] = nn.BatchNorm1d(layer.num_features)
        self.model = nn.Sequential(backbone, layers).to(device)
        self.norm = nn.BatchNorm1d(projector[-1], affine=False).to(device)
        self.amp = torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        groups = parameter_groups(self.model.parameters())
        self.optimizer = Lars(groups, 0.0, weight_decay=weight_decay)

    def forward(self, view_a: torch.Tensor, view_b: torch.Tensor):
        """-> z_a, z_b [n, D]."""
        with self.amp:
            return self.model(view_a), self.model(view_b)

    def terms(self, z_a: torch.Tensor, z_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """On-diagonal and off-diagonal term."""
        with self.amp:
            correlation = self.norm(z_a).T @ self.norm(z_b) / len(z_a)  # [D, D]
            on = torch.diagonal(correlation).sub(1).pow(2).sum()
            off = correlation.pow(2).sum() - torch.diagonal(correlation).pow(2).sum()
            return on, off

    def loss(self, z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
        on, off = self.terms(z_a, z_b)
        return on + self.lambd * off

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def __call__(
        self, view_a: torch.Tensor, view_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One update -> its on-diagonal and off-diagonal term."""
        self.optimizer.zero_grad()
        on, off = self.terms(*self.forward(view_a, view_b))
        self.backward(on + self.lambd * off)
        self.update()
        return on.detach(), off.detach()


class Lars(torch.optim.Optimizer):
    """LARS as a loop over the parameters."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, step = torch.norm(p), torch.norm(update)
                    one = torch.ones_like(size)
                    trust = torch.where(step > 0, 0.001 * size / step, one)
                    update = update.mul(torch.where(size > 0, trust, one))
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(0.9).add_(update)
                p.add_(state["mu"], alpha=-group["lr"])
