"""The configuration of a run: its fields, what they may be, and how it is saved with the run.

Precedence is one sentence: the recipe's values (`recipes`), changed by the ablation if there is one
(`ablations`), then flags.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bt_fast.loss_variants import Objective
from bt_fast.models.batch_norm import Norm
from bt_fast.models.networks import Encoder
from bt_fast.runtime import Compile, Precision
from pipelines.augment import VIEW_A, VIEW_B, Branch
from pipelines.common.cpu import usable_cores

RecipeName = Literal["imagenet", "imagenet-8gpu", "cifar10", "cifar10-cpu", "demo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train an encoder with Barlow Twins. Defaults are those of the recipe."""

    # What and where
    recipe: RecipeName = "imagenet"
    """Named set of defaults for everything below."""
    ablation: str | None = None
    """One of the paper's changes to the recipe, by its name in docs/ablations.md."""
    data: Path = Path("out.beton")
    """Training images, made by bt-convert: a .beton, or a folder of web shards."""
    val_data: Path | None = None
    """Held-out images for the kNN probe. Default: out.val.beton beside out.beton if it exists,
    else a part of the training images."""
    run_dir: Path | None = None
    """Folder for everything the run writes. Default: runs/RECIPE-DATE-TIME."""
    resume: Path | None = None
    """Continue the run in this folder from its newest valid checkpoint."""
    dry_run: bool = False
    """Print the plan and stop."""
    seed: int = 0
    """Of the initialisation, the order and every view."""

    # Machine
    gpus: int | None = None
    """Number of ranks, on all machines together; with --device cpu they are processes. Default:
    all GPUs of this machine, or one CPU process."""
    slurm: str | None = None
    """Submit the run to this partition of a Slurm cluster; --dry-run shows the job."""
    gpus_per_node: int = 8
    """With --slurm: GPUs of each of its nodes; with --device cpu, processes."""
    time_limit: str | None = None
    """With --slurm: of one job, as Slurm writes it (1-12:00:00). The run saves before and goes on
    in the next. Default: the partition's."""
    slurm_args: str = ""
    """With --slurm: more flags for sbatch, as in --slurm-args="--account=vision --qos=high"."""
    bn_group: int = 0
    """Ranks whose samples batch norm normalises together, in a row; 0 = all, as in the paper."""
    separate_communicators: bool = True
    """Separate communicators for gradients and for batch norm and loss; without, one for all."""
    compress_gradients: bool = False
    """Send gradients between ranks as bf16."""
    patience: float = 600
    """Seconds after which a rank that does not answer ends the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """Of the encoder and projector; auto is bf16 where the hardware has it. The loss is fp32. (On
    a GPU, products in fp32 are TF32.)"""
    compile: Compile = "auto"
    """Mode of torch.compile for model and loss; auto is "default" on a GPU and "off" on a CPU."""
    norm: Norm = "auto"
    """Batch norm, residual sum and ReLU on a GPU: as torch's compiler makes them, or as fused
    Triton kernels, which need a GPU and move three quarters of the bytes; auto is compiled."""
    deterministic: bool = False
    """On a GPU, repeat a run bit for bit: only such kernels, chosen by rule and not by trial. On a
    CPU that is always so."""
    loader: Literal["auto", "native", "ffcv", "dali"] = "auto"
    """What reads the images; auto takes DALI for web shards, else native or, on a GPU and if it is
    installed, the faster of the two on these images. A resumed run keeps its own."""
    workers: int | None = None
    """Decoding threads per rank. Default: the usable cores, shared by the ranks of a machine."""
    cache_gb: float = 0.0
    """Memory per rank for decoded images, GB (an ImageNet image takes half a megabyte). With room
    for all of them, only the first epoch decodes."""

    # Length
    epochs: int = 1000
    """Passes over the data; the schedule's length."""
    max_steps: int | None = None
    """Stop after this many steps without shortening the schedule."""
    batch_size: int = 2048
    """Global batch, shared equally by the ranks."""
    accumulate: int = 1
    """Batches per update. Only 1: this loss is a function of the whole batch."""

    # Views
    size: int = 224
    """Side of the views, pixels."""
    resolution: str | None = None
    """Views that grow, as in 160:224: from 160 px in the first epoch to 224 px in the last, in
    steps of 32. The last replaces --size."""
    min_scale: float = 0.08
    """Smallest random crop, share of the image's area."""
    view_a: Branch = VIEW_A
    """First branch."""
    view_b: Branch = VIEW_B
    """Second branch."""

    # Model
    encoder: Encoder = "resnet50"
    """Torchvision ResNet."""
    small_images: bool = False
    """The CIFAR stem: 3x3 convolution of stride 1, no max-pool."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projector's layers."""
    projector_norm: bool = True
    """Batch norm between them."""
    predictor: bool = False
    """Two more layers of the last width, for view A only."""
    stop_gradient: bool = False
    """Let no gradient through view B."""

    # Objective and optimizer
    objective: Objective = "barlow-twins"
    """What is minimised; the others are variants the paper compares with."""
    temperature: float = 0.1
    """Of the objective cross-entropy."""
    lambd: float = 5e-3
    """Weight of the redundancy term (paper: 5e-3; released code: 5.1e-3)."""
    lr_weights: float = 0.2
    """Learning rate of matrices at batch 256."""
    lr_biases: float = 0.0048
    """Learning rate of biases and norm parameters at batch 256."""
    weight_decay: float = 1.5e-6
    """Of matrices only (paper: 1.5e-6; released code: 1e-6)."""
    warmup_epochs: float = 10
    """Linear rise of the learning rate."""
    grad_scale: float = 1 / 16
    """Factor on all gradients: what the released code's 16 GPUs did to them by not
    differentiating its all-reduce. A constant; never depends on the number of GPUs."""

    # Probe, log, checkpoints
    probe_every: int = 10
    """Epochs between kNN probes; 0 = never. Also before the first step and after the last."""
    probe_images: int = 20_000
    """At most this many images in the probe's bank, and half as many queries."""
    probe_crop: float = 0.875
    """Central crop of the probe, share of the short side (0.875 = resize 256, crop 224)."""
    log_every: int = 10
    """Steps between log lines, the only moments at which values are read from the device."""
    save_every: int = 0
    """Steps between checkpoints; 0 = at the end of every epoch."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    if_save_fails: Literal["go-on", "stop"] = "go-on"
    """When the disk does not take a checkpoint: train on and try again at the next, or stop. Those
    before it stay in either case."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            finite = not isinstance(value, float) or abs(value) < 1e30  # as float32, times a batch
            _require(finite, name, value, "must be finite, below 1e30")
        for name in (
            "epochs",
            "batch_size",
            "size",
            "gpus_per_node",
            "log_every",
            "keep",
            "probe_images",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("gpus", "max_steps", "workers"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be at least 1")
        for name in (
            "probe_every",
            "save_every",
            "warmup_epochs",
            "cache_gb",
            "lambd",
            "weight_decay",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        _require(self.epochs <= 10**6, "epochs", self.epochs, "must be at most 1000000")
        _require(self.bn_group >= 0, "bn_group", self.bn_group, "must not be negative")
        for name in ("lr_weights", "lr_biases", "grad_scale", "patience", "temperature"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("min_scale", "probe_crop"):
            value = getattr(self, name)
            _require(0 < value <= 1, name, value, "must be in (0, 1]")
        if self.resolution is not None:
            low, high = _parse_resolution(self.resolution)
            # torch.compile makes a program for each size, and stops at eight.
            few = (high - low) // 32 < 8
            _require(few, "resolution", self.resolution, "has more than 8 sizes in steps of 32")
            object.__setattr__(self, "size", high)  # frozen for everyone else
        _require(
            not (self.deterministic and self.compile == "max-autotune"),
            "deterministic",
            self.deterministic,
            "excludes --compile max-autotune, which chooses kernels by trial",
        )
        _require(
            self.accumulate == 1,
            "accumulate",
            self.accumulate,
            "must be 1 (the loss and its batch statistics are functions of the whole batch, so"
            " summed gradients of parts are those of another loss; take a smaller --batch-size"
            " with the learning rate for it, or more GPUs)",
        )
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "must be at least 2")
        _require(abs(self.seed) < 2**63, "seed", self.seed, "must fit into 64 bits")
        widths = self.projector
        _require(len(widths) > 0 and min(widths) > 0, "projector", widths, "needs positive widths")

    def num_threads(self, local_ranks: int = 1) -> int:
        """Decoding threads of each of a machine's ranks: `workers`, or a share of its cores."""
        return self.workers or max(usable_cores() // local_ranks, 1)

    def size_of(self, epoch: int) -> int:
        """Side of the views in an epoch, pixels: `size`, or a point of the `resolution` ramp."""
        if self.resolution is None:
            return self.size
        low, high = _parse_resolution(self.resolution)
        share = min(epoch / (self.epochs - 1), 1) if self.epochs > 1 else 1
        exact = low + (high - low) * share
        return 32 * math.floor(exact / 32 + 0.5)

    @property
    def title(self) -> str:
        """The recipe, and what was changed in it."""
        return self.recipe + (f", {self.ablation}" if self.ablation else "")

    @property
    def effective_warmup_epochs(self) -> float:
        """`warmup_epochs`, or a tenth of a run that is not longer than that."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 10


def _parse_resolution(text: str) -> tuple[int, int]:
    """ "160:224" -> (160, 224)."""
    low, _, high = text.partition(":")
    valid = low.isdecimal() and high.isdecimal() and int(low) % 32 == int(high) % 32 == 0
    _require(
        valid and 0 < int(low) <= int(high),
        "resolution",
        text,
        "is LOW:HIGH in pixels, multiples of 32, as in 160:224",
    )
    return int(low), int(high)


def _require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} {what}, got {value}")


def to_json(config: Config) -> str:
    """The resolved configuration, as it is saved with the run."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str | bytes, source: Path) -> Config:
    """Read a saved configuration. Raises ValueError for what is not one: unknown keys included."""
    try:
        values = json.loads(text)
        types = get_type_hints(Config)
        if not isinstance(values.get("compile", ""), str):  # of runs from before it was a mode
            values["compile"] = {None: "auto", True: "default", False: "off"}[values["compile"]]
        for name, value in values.items():
            if get_origin(types[name]) is Literal and value not in get_args(types[name]):
                raise ValueError(f"{name} is {value!r}")
            if types[name] is Branch:
                values[name] = Branch(**{**value, "sigma": tuple(value["sigma"])})
            elif types[name] in (Path, Path | None) and value is not None:
                values[name] = Path(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        return Config(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} is not a configuration of this version: {error}") from None
