"""The encoder under evaluation on its device, and the labelled images that it is evaluated on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bt_fast.choices import Stem, is_of_library
from bt_fast.config import Config, load_config
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.features import extract_features
from bt_fast.evaluate.knn_classifier import require_same_classes
from bt_fast.evaluate.options import EvalOptions, Options
from bt_fast.evaluate.overlap import warn_of_overlap
from bt_fast.evaluate.subset import Subset
from bt_fast.evaluate.views import Views
from bt_fast.export.encoder_files import fingerprint, read_pretrained
from bt_fast.models.library_encoders import count_features
from bt_fast.models.networks import build_encoder
from bt_fast.run.console import print_summary
from bt_fast.runtime import Runtime, apply_switches, choose_runtime, prepare
from pipelines.common.cpu import usable_cores
from pipelines.convert.sources.shards import has_dataset
from pipelines.loading.datasets import ImageDataset, open_data, open_val
from pipelines.loading.image_files import open_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSetup:
    """The encoder under evaluation, its device and ranks, and the geometry of its images."""

    encoder: nn.Module
    projector: nn.Module | None  # if requested and saved with the encoder
    description: str
    fingerprint: str  # of the encoder's weights
    stem: Stem
    random: bool  # at random initialisation
    config: Config | None  # of the run; None for a file of weights
    seed: int  # of the run; 0 for a file of weights
    runtime: Runtime
    size: int  # side of the images, pixels
    crop: float  # central crop, fraction of the short side
    min_scale: float  # smallest random crop in pretraining, fraction of the area
    num_threads: int
    cache_bytes: int
    folder: Path  # holds the folders of this encoder's evaluations
    world: World

    def identity(self, *subsets: Subset) -> dict[str, Any]:
        """Everything but the protocol that a result depends on, as JSON."""
        return {
            "encoder": self.fingerprint,
            "stem": self.stem,  # which the weights do not contain
            "random": self.random,
            "images": [subset.fingerprint for subset in subsets],
            "size": self.size,
            "crop": self.crop,
            "precision": self.runtime.precision,
        }

    def views(self, images: ImageDataset) -> Views:
        """Batches of a data set, with this encoder's size and dtype."""
        return Views(
            images,
            self.runtime,
            size=self.size,
            num_threads=self.num_threads,
            cache_bytes=self.cache_bytes,
        )

    def features(self, views: Views, samples: np.ndarray) -> torch.Tensor:
        """Features of the samples' central crops: float32 [n, width], on every rank."""
        return extract_features(self.encoder, views, samples, self.crop, self.world)


def build_setup(
    options: EvalOptions, *, projector: bool = False, world: World = ALONE
) -> EvalSetup:
    """Read the encoder, with its projector if requested; resolve defaults. Raises ValueError."""
    is_run = (options.run / "config.json").is_file()
    config = load_config(options.run, "RUN") if is_run else None
    defaults = config or Config()
    runtime = choose_runtime(options.device, options.precision, "off", world)
    apply_switches()
    if config is not None and options.random:  # works before the run's first checkpoint
        architecture, stem, size = config.encoder, config.stem, config.size
        if options.stem not in (None, stem):
            raise ValueError(f"--stem {options.stem}: the stem of {options.run} is {stem}")
    else:
        pretrained = read_pretrained(
            options.run, which=options.which, stem=options.stem, projector=projector
        )
        architecture, stem = pretrained.architecture, pretrained.stem
        size = pretrained.size or defaults.size
    if options.random:
        torch.manual_seed(defaults.seed)  # as in pretraining
        encoder = build_encoder(architecture, stem=stem, size=size, zero_init=defaults.zero_init)
        projector_module = None
        description = f"{architecture} at random initialisation"
    else:
        encoder, projector_module = pretrained.encoder, pretrained.projector
        description = pretrained.description
    if is_of_library(architecture):
        count_features(encoder, architecture, options.size or size)
    digest = fingerprint(encoder)
    for module in (encoder, projector_module):
        if module is not None:
            prepare(module.eval(), runtime)
    parent = options.run if options.run.is_dir() else options.run.with_name(f"{options.run.name}.d")
    return EvalSetup(
        encoder=encoder,
        projector=projector_module,
        description=description,
        fingerprint=digest,
        stem=stem,
        random=options.random,
        config=config,
        seed=defaults.seed,
        runtime=runtime,
        size=options.size or size,
        crop=options.crop or defaults.probe_crop,
        min_scale=defaults.min_scale,
        num_threads=options.workers or max(usable_cores() // world.local_size, 1),
        cache_bytes=int(options.cache_gb * 1e9),
        folder=options.out or parent / "eval",
        world=world,
    )


def open_labelled_splits(
    options: EvalOptions, config: Config | None
) -> tuple[ImageDataset, ImageDataset]:
    """Training and held-out images of the same classes. Raises ValueError."""
    train, val = open_splits(options, config)
    if val is None:
        raise ValueError(
            f"--val-data is required: there are no held-out images beside {train.path};"
            " bt-convert writes them for a folder that has train/ and val/"
        )
    for images in (train, val):
        if not (images.labels >= 0).any():
            raise ValueError(f"{images.path} has no classes")
    require_same_classes(train, val)
    if len(np.unique(train.labels[train.labels >= 0])) < 2:
        raise ValueError(f"{train.path} has fewer than two classes")
    return train, val


def open_splits(
    options: EvalOptions, config: Config | None
) -> tuple[ImageDataset, ImageDataset | None]:
    """--data and --val-data; by default the run's data and the held-out images beside it."""
    data = options.data or (config.data if config else None)
    if data is None:
        raise ValueError("--data is required: a file of weights does not name its training images")
    train, val = open_images(data, "--data")
    val_data = options.val_data
    if options.data is None and config:
        val_data = val_data or config.val_data
    if val_data is not None:
        val = open_images(val_data, "--val-data")[0]
    return train, val


def open_images(path: Path, flag: str) -> tuple[ImageDataset, ImageDataset | None]:
    """The images of a `.beton` or an image folder, and the held-out images beside it."""
    if has_dataset(path):
        raise ValueError(
            f"{flag} {path}: evaluations do not read web shards; bt-convert {path} out.beton,"
            f" then {flag} out.beton"
        )
    if path.is_dir():
        splits = open_folder(path)
        return splits["train"], splits.get("val")
    return open_data(path, flag), open_val(path, None)


def run_protocol(
    name: str,
    options: Options,
    measure: Callable[
        [Options, EvalSetup, ImageDataset, ImageDataset], tuple[float, dict[str, str]]
    ],
    world: World = ALONE,
) -> int:
    """Print the rows that `measure` returns for both splits; returns the exit status."""
    setup = build_setup(options, world=world)
    train, val = open_labelled_splits(options, setup.config)
    if world.is_first:
        warn_of_overlap(train, val)
    rows = {"encoder": setup.description, "data": f"{train.path}, {len(train)} images"}
    rows |= measure(options, setup, train, val)[1]
    print_summary(f"bt-fast eval {name}", rows)
    return 0
