"""Flags of every `bt-fast eval` command: torch-free, so that --help needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from bt_fast.choices import Device, Precision
from bt_fast.config import require_types
from bt_fast.export.options import WeightsOptions

Options = TypeVar("Options", bound="EvalOptions")

# Flags that are at least 1, in every command that has them.
_COUNTS = "workers size gpus epochs batch_size semi_epochs semi_batch_size clusters"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(WeightsOptions):
    """Flags that all evaluations have in common."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Folder of a pretraining run, or file of weights (bt-fast's, or another program's)."""
    data: Path | None = None
    """Training images: a .beton, or a folder of images. Default: the run's."""
    val_data: Path | None = None
    """Held-out images. Default: out.val.beton beside out.beton, val/ beside train/."""
    random: bool = False
    """Random initialisation, the same as the run's, in place of the pretrained weights."""
    size: int | None = None
    """Side of the images, pixels. Default: the run's; 224 for a file."""
    crop: float | None = None
    """Central crop, fraction of the short side. Default: the run's; 0.875 for a file."""
    device: Device = "auto"
    """Device of the encoder; auto selects the GPU if there is one."""
    gpus: int | None = None
    """Number of ranks, processes with --device cpu. Default: all GPUs, or one CPU process."""
    precision: Precision = "auto"
    """Precision of the encoder; auto selects bf16 where the hardware supports it."""
    workers: int | None = None
    """Decoding threads per rank. Default: the usable cores divided by the ranks of this machine."""
    cache_gb: float = 0.0
    """Memory of each rank for decoded images, GB."""
    out: Path | None = None
    """Folder for states and results. Default: RUN/eval, or FILE.d/eval."""

    def __post_init__(self) -> None:
        require_types(self)
        for name in _COUNTS.split():
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        percent = getattr(self, "percent", 100)
        if not 0 < percent <= 100:
            raise ValueError(f"--percent must be in (0, 100], got {percent:g}")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f"--crop must be in (0, 1], got {self.crop}")
        if not 0 <= self.cache_gb < 1e6:
            raise ValueError(f"--cache-gb must not be negative, got {self.cache_gb}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalAll(EvalOptions):
    """Compare random initialisation with pretraining: kNN, linear and 10 % of the labels."""

    full_linear: bool = False
    """The paper's linear protocol instead of the quick one."""
    percent: float = 10
    """Percentage of the labels for fine-tuning."""
    semi_epochs: int = 20
    """Epochs of fine-tuning."""
    semi_batch_size: int = 256
    """Number of images per step of fine-tuning."""
    seed: int = 0
    """Seed of the labelled subset, the classifiers, the order and the crops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalKnn(EvalOptions):
    """Measure the weighted kNN accuracy of an encoder and the rank of its features."""

    augmented: bool = False
    """Additional accuracy on augmented held-out images, once per branch."""
    collapse: bool = False
    """Collapse report on the projector's embeddings; needs a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedOptions(EvalOptions):
    """Flags of evaluations that train on the run's images."""

    batch_size: int = 256
    """Number of images per step."""
    min_scale: float | None = None
    """Smallest random crop, fraction of the image's area. Default: the run's; 0.08 for a file."""
    seed: int = 0
    """Seed of the labelled subset, the classifier's initialisation, the order and the crops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalLinear(TrainedOptions):
    """Train a linear classifier on the frozen encoder and test it on the held-out images."""

    cached: bool = False
    """Quick protocol: features extracted once, then a grid of classifiers trained at once."""
    views: int = 4
    """Views of each training image in the quick protocol: the central crop, then random ones.
    Memory of each: 0.5 GB per 128,000 images of a ResNet-50."""
    epochs: int = 100
    """Passes over the images (or their features)."""
    lr: float = 0.3
    """Learning rate, not scaled by the batch size; cosine to 0. The grid has several others."""
    weight_decay: float = 1e-6
    """Weight decay of weights and bias. The grid has several others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSemi(TrainedOptions):
    """Fine-tune the encoder on a fraction of the labels and test it on the held-out images."""

    percent: float = 10
    """Percentage of the labels, the same in every class."""
    train_list: Path | None = None
    """File with the names of the labelled images instead, one per line, as published."""
    protocol: Literal["paper", "released"] = "paper"
    """Learning rates of the paper (0.002 / 0.5, in steps) or of its code (0.005 / 0.5, cosine)."""
    epochs: int = 20
    """Passes over the subset; the paper's steps are after 60 % and 80 % of them."""
    lr_encoder: float | None = None
    """Learning rate of the encoder. Default: the protocol's."""
    lr_head: float = 0.5
    """Learning rate of the classifier."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalTransfer(TrainedOptions):
    """Evaluate the frozen encoder on another data set."""

    dataset: Literal["places205", "inat18", "voc07", "folder"] = "folder"
    """Data set at --data, in its published layout; folder: class folders, or a .beton."""
    epochs: int | None = None
    """Passes over the images. Default: 84 for inat18, else 14."""
    lr: float = 0.01
    """Learning rate of the classifier, divided by 10 after a third and two thirds."""
    weight_decay: float = 5e-4
    """Weight decay of weights and bias."""
    min_scale: float = 0.08
    """Smallest random crop, fraction of the image's area."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curate(EvalOptions):
    """Find near duplicates and outliers by an encoder's features; choose a subset of the images."""

    threshold: float = 0.85
    """Cosine similarity of whitened features above which two images are near duplicates."""
    clusters: int | None = None
    """Number of clusters. Default: the square root of the number of images."""
    by: Literal["semdedup", "balanced", "random"] | None = None
    """Subset to choose: without the most redundant images, balanced over clusters, or random."""
    fraction: float | None = None
    """Fraction of the images to keep. Default of semdedup: all but near duplicates."""
    seed: int = 0
    """Seed of the clusters and the subset."""
    overwrite: bool = False
    """Permission to replace the results of another command in the folder."""

    def __post_init__(self) -> None:
        EvalOptions.__post_init__(self)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold must be in (0, 1], got {self.threshold}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"--fraction must be in (0, 1], got {self.fraction}")
        if self.fraction is not None and self.by is None:
            raise ValueError("--fraction needs --by semdedup, balanced or random")
        if self.fraction is None and self.by in ("balanced", "random"):
            raise ValueError(f"--by {self.by} needs --fraction, such as --fraction 0.5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Embed(EvalOptions):
    """Write the features of a data set's images to a file, with their names and labels."""

    data: Path | None = None
    """Images: a .beton, or a folder, of whose splits it is the training images. Default: the
    run's."""
    out: Path = Path("features.npy")
    """Output file: .npy, beside which a .csv has names and labels, or .parquet with all columns."""
    overwrite: bool = False
    """Permission to replace an existing file."""
