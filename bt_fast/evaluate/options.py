"""What every evaluation needs: its common flags, the encoder, the images, a folder to keep."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import nn

from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.evaluate.views import Images, Views
from bt_fast.export.encoder_files import fingerprint, read_pretrained
from bt_fast.models.networks import build_encoder, feature_width
from bt_fast.run.console import summary_table
from bt_fast.run.directory import load_config
from bt_fast.runtime import Precision, Runtime, apply_switches, choose_runtime, prepare
from pipelines.common.cpu import usable_cores
from pipelines.convert.sources.shards import is_ours
from pipelines.loading.choose import open_data, open_val
from pipelines.loading.image_files import open_folder

Options = TypeVar("Options", bound="EvalOptions")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """Flags of every evaluation."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Folder of a pretraining run, or a file of weights (ours, or the authors' resnet50.pth)."""
    data: Path | None = None
    """Labelled images to learn from: a .beton, or a folder of class folders. Default: the run's."""
    val_data: Path | None = None
    """Labelled images to classify. Default: out.val.beton beside out.beton, val/ beside train/."""
    random: bool = False
    """Take the same network at random initialisation: the run's own starting point."""
    size: int | None = None
    """Side of the images, pixels. Default: the run's; 224 for a file."""
    crop: float | None = None
    """Central crop, share of the short side. Default: the run's; 0.875 (resize 256, crop 224)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    gpus: int | None = None
    """Number of ranks; with --device cpu they are processes. Default: all GPUs of this machine, or
    one CPU process."""
    precision: Precision = "auto"
    """Of the encoder; auto is bf16 where the hardware has it."""
    workers: int | None = None
    """Decoding threads of each rank. Default: its share of the usable cores."""
    cache_gb: float = 0.0
    """Memory for decoded images, GB."""
    out: Path | None = None
    """Folder for states and results. Default: RUN/eval, or FILE.d/eval."""

    def __post_init__(self) -> None:
        for name in ("workers", "size", "gpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be in (0, 1], got {self.crop}")
        if not 0 <= self.cache_gb < 1e6:
            raise ValueError(f"--cache-gb must not be negative, got {self.cache_gb}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOptions(EvalOptions):
    """Flags of evaluations that train on the run's own images."""

    batch_size: int = 256
    """Images per step."""
    min_scale: float | None = None
    """Smallest random crop, share of the image's area. Default: the run's; 0.08 for a file."""
    seed: int = 0
    """Of everything drawn: a part of the labels, the classifier's start, the order, the crops."""

    def smallest_crop(self, subject: "Subject") -> float:
        """`min_scale`, or the run's."""
        return subject.min_scale if self.min_scale is None else self.min_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The encoder under evaluation, on its device, and how images reach it."""

    encoder: nn.Module
    projector: nn.Module | None  # of a run that saved one
    description: str
    fingerprint: str  # of the encoder's weights
    random: bool
    config: Config | None  # the run's
    runtime: Runtime
    size: int
    crop: float
    min_scale: float  # smallest random crop in pretraining
    num_threads: int
    cache_bytes: int
    folder: Path  # where evaluations of it are kept
    world: World  # the ranks that share the work

    def facts(self, *parts: "Part") -> dict[str, Any]:
        """What decides a result beside the protocol, as JSON: the encoder, images, and how."""
        return {
            "encoder": self.fingerprint,
            "random": self.random,
            "images": [part.identity for part in parts],
            "size": self.size,
            "crop": self.crop,
            "precision": self.runtime.precision,
        }

    @property
    def seed(self) -> int:
        """The run's."""
        return self.config.seed if self.config is not None else 0

    @property
    def width(self) -> int:
        """Features per image."""
        return feature_width(self.encoder)

    def views(self, reader: Images) -> Views:
        """Batches of a data set, as this encoder takes them."""
        return Views(
            reader,
            self.runtime,
            size=self.size,
            num_threads=self.num_threads,
            cache_bytes=self.cache_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some samples of a data set: those to learn from, or those to classify."""

    images: Images
    samples: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> torch.Tensor:
        """int64 [n], on the CPU."""
        return torch.from_numpy(self.images.labels[self.samples])

    @property
    def identity(self) -> str:
        """Names the contents: the data set's checksums, and which samples."""
        own = self.images.sha256() or f"{len(self.images)} {self.images.labels.sum()}"
        return hashlib.sha256(own.encode() + self.samples.tobytes()).hexdigest()


def run_on_pair(
    name: str,
    options: Options,
    measure: Callable[[Options, Subject, Images, Images], tuple[float, dict[str, str]]],
    world: World = ALONE,
) -> int:
    """`bt-fast eval NAME` on labelled images and held-out ones: print the rows that `measure`
    returns beside the accuracy; returns the exit status."""
    subject = open_subject(options, world=world)
    train, val = open_pair(options, subject)
    rows = {"encoder": subject.description, "data": f"{train.path}, {len(train)} images"}
    rows |= measure(options, subject, train, val)[1]
    Console(soft_wrap=True).print(summary_table(f"bt-fast eval {name}", rows))
    return 0


def open_subject(options: EvalOptions, *, projector: bool = False, world: World = ALONE) -> Subject:
    """Read the encoder, with its projector if asked, and settle defaults. Raises ValueError."""
    is_run = (options.run / "config.json").is_file()
    config = load_config(options.run, "RUN") if is_run else None
    runtime = choose_runtime(options.device, options.precision, "off", world.local_rank)
    apply_switches()
    if config is not None and options.random:  # needs no weights: a run that has just begun
        name, small_images = config.encoder, config.small_images
    else:
        pretrained = read_pretrained(options.run, projector=projector)
        name, small_images = pretrained.architecture, pretrained.small_images
    if options.random:
        torch.manual_seed(config.seed if config is not None else 0)  # as pretraining starts
        encoder, head = build_encoder(name, small_images=small_images), None
        description = f"{name} at random initialisation"
    else:
        encoder, head = pretrained.encoder, pretrained.projector
        description = pretrained.description
    digest = fingerprint(encoder)
    for module in (encoder, head):
        if module is not None:
            prepare(module.eval(), runtime)
    own = options.run if options.run.is_dir() else options.run.with_name(f"{options.run.name}.d")
    return Subject(
        encoder=encoder,
        projector=head,
        description=description,
        fingerprint=digest,
        random=options.random,
        config=config,
        runtime=runtime,
        size=options.size or (config.size if config else 224),
        crop=options.crop or (config.probe_crop if config else 0.875),
        min_scale=config.min_scale if config else 0.08,
        num_threads=options.workers or max(usable_cores() // world.local_size, 1),
        cache_bytes=int(options.cache_gb * 1e9),
        folder=options.out or own / "eval",
        world=world,
    )


def open_pair(options: EvalOptions, subject: Subject) -> tuple[Images, Images]:
    """Training and held-out images of the same classes. Raises ValueError."""
    train, val = open_data_and_val(options, subject)
    if val is None:
        raise ValueError(
            f"--val-data is needed: there are no held-out images beside {train.path};"
            " bt-convert keeps those of a folder that has train/ and val/"
        )
    for images in (train, val):
        if not (images.labels >= 0).any():
            raise ValueError(f"{images.path} has no classes")
    if train.class_names and val.class_names not in (None, train.class_names):
        raise ValueError(f"{val.path} has other classes than {train.path}")
    if len(np.unique(train.labels[train.labels >= 0])) < 2:
        raise ValueError(f"{train.path} has no two classes to tell apart")
    return train, val


def open_data_and_val(options: EvalOptions, subject: Subject) -> tuple[Images, Images | None]:
    """--data and --val-data, or what stands for them: the run's, and what lies beside."""
    data = options.data or (subject.config.data if subject.config else None)
    if data is None:
        raise ValueError("--data is needed: a file of weights does not say what it was trained on")
    train, val = open_images(data, "--data")
    val_data = options.val_data
    if options.data is None and subject.config:
        val_data = val_data or subject.config.val_data
    if val_data is not None:
        val = open_images(val_data, "--val-data")[0]
    return train, val


def open_images(path: Path, flag: str) -> tuple[Images, Images | None]:
    """A `.beton` or an image folder, and the held-out images beside it."""
    if is_ours(path):
        raise ValueError(
            f"{flag} {path}: evaluations do not read web shards; bt-convert {path} out.beton,"
            f" then {flag} out.beton"
        )
    if path.is_dir():
        splits = open_folder(path)
        return splits["train"], splits.get("val")
    return open_data(path, flag), open_val(path, None)


def labelled(images: Images) -> Part:
    """The samples that have a class, in the file's order."""
    return Part(images=images, samples=np.flatnonzero(images.labels >= 0))
