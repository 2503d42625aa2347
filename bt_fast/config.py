"""The configuration of a run: its fields, their valid values, and how it is saved with the run.

The recipe's values (`recipes`), changed by the ablation if there is one (`ablations`), then by
flags. Free of torch, so that --help and wrong flags need none.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bt_fast.choices import (
    Compile,
    Device,
    Encoder,
    LoaderName,
    Norm,
    Objective,
    OptimizerName,
    Precision,
    RecipeName,
    Stem,
    Tracker,
    is_of_library,
)
from pipelines.branches import VIEW_A, VIEW_B, Branch
from pipelines.common.cpu import usable_cores

# Earlier names of fields: their flags and saved configurations are accepted for one version.
RENAMED = {"patience": "timeout"}
# The largest rate with which an optimizer can train at all. Which learns most depends on the data.
LARGEST_RATES = {"adamw": 0.1, "sgd": 1.0}
# Fields that a resumed run may change: they decide where and how it is computed, not what is
# learned.
_MUTABLE = {"mutable": True}
# Those of them without which the results of two runs cannot be compared.
RESULTS_DEPEND_ON = ("data", "val_data", "max_steps", "probe_images")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Train an encoder with Barlow Twins. Defaults are those of the recipe."""

    # What and where
    recipe: RecipeName = "imagenet"
    """Named set of defaults for all other flags."""
    ablation: str | None = None
    """Named change to the recipe from the paper's ablations, listed in docs/ablations.md."""
    data: Path = field(default=Path("out.beton"), metadata=_MUTABLE)
    """Training images, made by bt-convert: a .beton, or a folder of web shards."""
    val_data: Path | None = field(default=None, metadata=_MUTABLE)
    """Held-out images for the kNN probe. Default: out.val.beton beside out.beton if it exists,
    else a tenth of the training images."""
    run_dir: Path | None = None
    """Folder for all files of the run. Default: runs/RECIPE-DATE-TIME."""
    resume: Path | None = field(default=None, metadata=_MUTABLE)
    """Folder of a run to continue from its newest valid checkpoint."""
    dry_run: bool = field(default=False, metadata=_MUTABLE)
    """Plan of the run (with --slurm, the job script), printed without training."""
    seed: int = 0
    """Seed of the initialisation, the sample order and all augmentations."""

    # Machine
    gpus: int | None = field(default=None, metadata=_MUTABLE)
    """Number of ranks on all machines together: GPUs, or processes with --device cpu. Default: all
    GPUs of this machine, or one CPU process."""
    slurm: str | None = field(default=None, metadata=_MUTABLE)
    """Partition of a Slurm cluster to which the run is submitted; --dry-run prints the job."""
    gpus_per_node: int = field(default=8, metadata=_MUTABLE)
    """GPUs per node with --slurm; processes per node with --device cpu."""
    time_limit: str | None = field(default=None, metadata=_MUTABLE)
    """Time limit of one job with --slurm, in Slurm's notation (1-12:00:00). The run saves before
    the limit and continues in the next job. Default: the partition's."""
    slurm_args: str = field(default="", metadata=_MUTABLE)
    """Additional sbatch flags with --slurm, as in --slurm-args="--account=vision --qos=high"."""
    bn_group: int = 0
    """Number of consecutive ranks that share batch-norm statistics; 0 = all, as in the paper."""
    separate_communicators: bool = field(default=True, metadata=_MUTABLE)
    """Separate communicators for gradients and for batch norm and loss, instead of one for all."""
    compress_gradients: bool = False
    """Compression of gradients to bf16 for the all-reduce."""
    timeout: float = field(default=600.0, metadata=_MUTABLE)
    """Timeout of collectives, seconds. If a rank does not respond in time, all ranks end and
    restart from the newest checkpoint."""
    device: Device = field(default="auto", metadata=_MUTABLE)
    """Training device; auto selects the GPU if there is one."""
    precision: Precision = "auto"
    """Precision of encoder and projector; auto selects bf16 where the hardware supports it. The
    loss is fp32. (On a GPU, fp32 matrix products use TF32.)"""
    compile: Compile = field(default="auto", metadata=_MUTABLE)
    """Mode of torch.compile for model and loss; auto is "reduce-overhead" (CUDA graphs) on one GPU,
    "default" on several or outside the main thread, and "off" on a CPU."""
    norm: Norm = field(default="auto", metadata=_MUTABLE)
    """Implementation of batch norm, residual sum and ReLU: torch's compiler, or fused Triton
    kernels, which need a GPU and move three quarters of the bytes. auto is fused on a GPU of
    compute capability 8.0 or higher, and compiled elsewhere."""
    deterministic: bool = field(default=False, metadata=_MUTABLE)
    """Deterministic kernels on a GPU, so that a run repeats bit for bit. On a CPU it always
    does."""
    loader: LoaderName = field(default="auto", metadata=_MUTABLE)
    """Library that decodes and crops the images. auto: native."""
    workers: int | None = field(default=None, metadata=_MUTABLE)
    """Decoding threads per rank, or processes for a GPU. Default: the usable cores, divided among a
    machine's ranks."""
    cache_gb: float = field(default=0.0, metadata=_MUTABLE)
    """Memory per rank for decoded images, GB (an ImageNet image takes half a megabyte). If all fit,
    only the first epoch decodes."""

    # Length
    epochs: int = 1000
    """Number of epochs: the length of the schedule."""
    extend: int | None = field(default=None, metadata=_MUTABLE)
    """Number of epochs of a longer schedule, with which --resume continues a run: its learning
    rates are those that a schedule of this length has at the same step."""
    peak: float = field(default=1.0, metadata=_MUTABLE)
    """Factor on the learning rates of the schedule of --extend."""
    max_steps: int | None = field(default=None, metadata=_MUTABLE)
    """Maximum number of steps; the schedule keeps its length."""
    batch_size: int = 2048
    """Global batch size, divided equally among the ranks."""
    accumulate: int = 1
    """Number of parts in which each rank computes its batch, one after the other, with the memory
    of one part and one more forward pass. The gradient is that of the whole batch; batch norm's
    statistics are those of a part."""

    # Views
    size: int = 224
    """Side of the views, pixels."""
    resolution: str | None = None
    """Progressive view size, as in 160:224: from 160 px in the first epoch to 224 px in the last,
    in steps of 32. The last size replaces --size."""
    min_scale: float = 0.08
    """Smallest random crop, as a fraction of the image's area."""
    view_a: Branch = VIEW_A
    """Augmentations of view A."""
    view_b: Branch = VIEW_B
    """Augmentations of view B."""

    # Model
    init: Path | None = None
    """Weights to start from: a run, or a file of weights of bt-fast or of another program."""
    which: str | None = None
    """Encoder of --init's file, if it holds several, such as "teacher"."""
    encoder: str = "resnet50"
    """Encoder: resnet18, 34, 50, 101, 152, wide_resnet50_2, or a model of timm or torchvision by
    name, as in timm/vit_small_patch16_224."""
    drop_path: float = 0.0
    """Rate of stochastic depth in the last block of a timm or torchvision encoder; it grows
    linearly from 0 in the first."""
    small_images: bool = False
    """CIFAR stem of the encoder: 3x3 convolution of stride 1, no max-pool."""
    zero_init: bool = True
    """Residual branches of a ResNet that start at zero, as in the released code; other encoders
    have their own initialisation."""
    projector: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of the projector's layers."""
    projector_norm: bool = True
    """Batch norm between the projector's layers."""
    predictor: bool = False
    """Predictor behind the projector for view A only: two more layers of the last width."""
    stop_gradient: bool = False
    """Stop-gradient on view B."""

    # Objective and optimizer
    objective: Objective = "barlow-twins"
    """Training objective. All except barlow-twins are variants from the paper's comparison."""
    temperature: float = 0.1
    """Softmax temperature of the cross-entropy objective."""
    lambd: float = 5e-3
    """Weight of the off-diagonal (redundancy reduction) term (paper: 5e-3; released code:
    5.1e-3)."""
    optimizer: OptimizerName = "lars"
    """Optimizer: lars as in the paper, which learned most in every short run compared; adamw; or
    sgd."""
    lr_weights: float = 0.2
    """Learning rate of matrices at batch 256."""
    lr_biases: float = 0.0048
    """Learning rate of biases and norm parameters at batch 256."""
    weight_decay: float = 1.5e-6
    """Weight decay of matrices; biases and norm parameters have none (paper: 1.5e-6; released
    code: 1e-6)."""
    warmup_epochs: float = 10
    """Length of the linear learning-rate warm-up, epochs."""
    grad_scale: float = 1 / 16
    """Constant factor on all gradients. 1/16 reproduces the released code on 16 GPUs, whose
    all-reduce is not differentiated; it never depends on the number of GPUs."""

    # Probe, log, checkpoints
    probe_every: int = field(default=10, metadata=_MUTABLE)
    """Epochs between probes of the features; 0 = none. Probes also run before the first step and
    after the last."""
    probe_minutes: float = field(default=0.0, metadata=_MUTABLE)
    """Minimum minutes between additional probes, at ends of epochs; 0 = no additional probes."""
    probe_images: int = field(default=20_000, metadata=_MUTABLE)
    """Maximum number of images in the probe's feature bank; half as many queries."""
    probe_crop: float = 0.875
    """Central crop of the probe, as a fraction of the short side (0.875 = resize 256, crop 224)."""
    tracker: Tracker = field(default="none", metadata=_MUTABLE)
    """Experiment tracker beside metrics.jsonl and TensorBoard; wandb records offline without a
    network."""
    log_every: int = field(default=10, metadata=_MUTABLE)
    """Steps between log lines; values are read from the device only for them."""
    save_every: int = field(default=0, metadata=_MUTABLE)
    """Steps between checkpoints; 0 = one at the end of every epoch."""
    keep: int = field(default=2, metadata=_MUTABLE)
    """Number of newest checkpoints to keep."""
    if_save_fails: Literal["go-on", "stop"] = field(default="go-on", metadata=_MUTABLE)
    """Action when a checkpoint cannot be written: continue training until the next one, or stop.
    Earlier checkpoints are kept in either case."""

    def __post_init__(self) -> None:
        require_types(self)
        _require(
            self.which is None or self.init is not None,
            "which",
            self.which,
            "selects an encoder of --init; give both",
        )
        encoders = get_args(Encoder)
        _require(
            self.encoder in encoders or is_of_library(self.encoder),
            "encoder",
            self.encoder,
            f"is one of {', '.join(encoders)}, timm/NAME or torchvision/NAME",
        )
        _require(
            not (is_of_library(self.encoder) and self.small_images),
            "small_images",
            self.encoder,
            "is the stem of our ResNets; leave it out",
        )
        for name, value in dataclasses.asdict(self).items():
            finite = not isinstance(value, float) or abs(value) < 1e30  # as float32, times a batch
            _require(finite, name, value, "must be finite, below 1e30")
        for names, is_valid, requirement in _RULES:
            for name in names.split():
                value = getattr(self, name)
                _require(value is None or is_valid(value), name, value, requirement)
        _require(
            max(self.lr_weights, self.lr_biases) <= LARGEST_RATES.get(self.optimizer, math.inf),
            "optimizer",
            self.optimizer,
            "needs lower rates than lars: compare the probes of short runs, from"
            " --lr-weights 1e-3 --lr-biases 1e-3 upwards",
        )
        if self.resolution is not None:
            low, high = _parse_resolution(self.resolution)
            # torch.compile recompiles for each size, at most eight times.
            few = (high - low) // 32 < 8
            _require(few, "resolution", self.resolution, "has more than 8 sizes in steps of 32")
            object.__setattr__(self, "size", high)
        _require(
            not (self.deterministic and self.compile == "max-autotune"),
            "deterministic",
            self.deterministic,
            "excludes --compile max-autotune, which selects kernels by timing",
        )

    def num_threads(self, local_ranks: int = 1) -> int:
        """Decoding threads per rank: `workers`, or the usable cores divided by the local ranks."""
        return self.workers or max(usable_cores() // local_ranks, 1)

    def view_size(self, epoch: int) -> int:
        """Side of the views in an epoch, pixels: `size`, or interpolated in `resolution`."""
        if self.resolution is None:
            return self.size
        low, high = _parse_resolution(self.resolution)
        progress = min(epoch / (self.epochs - 1), 1) if self.epochs > 1 else 1
        exact = low + (high - low) * progress
        return 32 * math.floor(exact / 32 + 0.5)

    def last_step(self, steps_per_epoch: int) -> int:
        """The number of steps of a run: the end of the schedule, or `max_steps`."""
        end = self.epochs * steps_per_epoch
        return min(end, self.max_steps if self.max_steps is not None else end)

    @property
    def stem(self) -> Stem:
        """Stem of the encoder."""
        return "cifar" if self.small_images else "imagenet"

    @property
    def title(self) -> str:
        """Recipe and ablation."""
        return self.recipe + (f", {self.ablation}" if self.ablation else "")

    @property
    def effective_warmup_epochs(self) -> float:
        """`warmup_epochs`, or a tenth of `epochs` if the run is not longer than the warm-up."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 10


def require_fields(options: type, names: Iterable[str], title: str) -> None:
    """Raise ValueError unless a dataclass has fields of these names."""
    unknown = sorted(set(names) - {each.name for each in dataclasses.fields(options)})
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such field of {title}")


def require_types(options: Any) -> None:
    """Raise ValueError unless every field of a dataclass has its type.

    Text becomes a path, and a list a tuple.
    """
    for name, hint in get_type_hints(type(options)).items():
        value, parts = getattr(options, name), (hint, *get_args(hint))
        if isinstance(value, str) and Path in parts:
            object.__setattr__(options, name, value := Path(value))  # the dataclass is frozen
        if isinstance(value, list) and any(get_origin(part) is tuple for part in parts):
            object.__setattr__(options, name, value := tuple(value))
        if not _has_type(value, hint):
            choices = [x for part in parts if get_origin(part) is Literal for x in get_args(part)]
            _require(not choices, name, value, f"is one of {', '.join(choices)}")
            kind = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{name} must be {kind}, got {value!r}")


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; integers are floats, too, and booleans are not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(part, arguments[0]) for part in value)
    if origin is Literal:
        return value in arguments
    if arguments:  # a union
        return any(_has_type(value, argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


# Names of fields, the condition on their values, and the message if it does not hold.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("epochs batch_size size gpus_per_node log_every keep", lambda n: n >= 1, "must be at least 1"),
    ("gpus max_steps workers accumulate", lambda n: n >= 1, "must be at least 1"),
    ("probe_images", lambda n: n >= 4, "must be at least 4"),
    (
        "probe_every probe_minutes save_every warmup_epochs",
        lambda x: x >= 0,
        "must not be negative",
    ),
    ("cache_gb lambd weight_decay bn_group", lambda x: x >= 0, "must not be negative"),
    ("lr_weights lr_biases grad_scale peak", lambda x: x > 0, "must be positive"),
    ("timeout temperature", lambda x: x > 0, "must be positive"),
    ("drop_path", lambda x: 0 <= x < 1, "must be in [0, 1)"),
    ("min_scale probe_crop", lambda x: 0 < x <= 1, "must be in (0, 1]"),
    ("epochs", lambda n: n <= 10**6, "must be at most 1000000"),
    ("batch_size", lambda n: n >= 2, "must be at least 2"),
    ("seed", lambda n: abs(n) < 2**63, "must fit into 64 bits"),
    ("projector", lambda widths: widths and min(widths) > 0, "needs positive widths"),
)


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


def _require(condition: bool, name: str, value: Any, requirement: str) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} {requirement}, got {value}")


def to_json(config: Config) -> str:
    """The resolved configuration, as it is saved with the run."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str | bytes, source: Path) -> Config:
    """Read a saved configuration. Raises ValueError for what is not one: unknown keys included."""
    try:
        values = {RENAMED.get(name, name): value for name, value in json.loads(text).items()}
        types = get_type_hints(Config)
        if not isinstance(values.get("compile", ""), str):  # a boolean in early runs
            values["compile"] = {None: "auto", True: "default", False: "off"}[values["compile"]]
        for name, value in values.items():
            if types[name] is Branch:
                values[name] = Branch(**{**value, "sigma": tuple(value["sigma"])})
            elif isinstance(value, list):
                values[name] = tuple(value)
        return Config(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{source} is not a configuration of this version: {error}") from None


def load_config(path: Path, flag: str) -> Config:
    """The configuration of the run in a folder. Raises ValueError if there is no run."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{flag} {path} is not the folder of a run (it has no config.json)")
    return from_json(file.read_bytes(), file)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with paths that mean the same in any working directory."""
    return dataclasses.replace(
        config,
        data=config.data.resolve(),
        val_data=config.val_data and config.val_data.resolve(),
        init=config.init and config.init.resolve(),
    )


def resumed(config: Config, saved: Config | None) -> Config:
    """The configuration of a run to resume, whose saved one is `saved`, or of a new one; applies
    --extend and --peak.

    Raises ValueError for changes that would change what a resumed run learns.
    """
    if saved is None:
        if config.extend is not None:
            raise ValueError(f"--extend {config.extend} continues a run: add --resume RUN")
        return config
    changed = list(differences(config, saved))
    if "--run-dir" in changed:
        raise ValueError(
            f"--run-dir {config.run_dir}: a resumed run stays where --resume says; leave it out"
        )
    if changed:
        longer = ", or continue with a longer schedule: --extend N" * ("--epochs" in changed)
        raise ValueError(
            f"{' '.join(changed)} cannot change when a run is resumed, because what it learns"
            f" would differ; leave it out or start a new run{longer}"
        )
    return _extended(config, saved)


def _extended(config: Config, saved: Config) -> Config:
    """Both flags are saved with the run: with the same values, as after a restart, nothing changes.

    --peak is a factor of the rates with which the run began.
    """
    if (config.extend, config.peak) == (saved.extend, saved.peak):
        return config
    if config.extend is None:
        raise ValueError(f"--peak {config.peak:g} is a factor of --extend; give both")
    if config.extend < saved.epochs or (config.extend, config.peak) == (saved.epochs, saved.peak):
        raise ValueError(
            f"--extend {config.extend}: the run's schedule has {saved.epochs} epochs already"
        )
    return dataclasses.replace(
        config,
        epochs=config.extend,
        lr_weights=config.lr_weights * config.peak / saved.peak,
        lr_biases=config.lr_biases * config.peak / saved.peak,
    )


def written(flag: str, value: Any) -> str:
    """A flag and its value as on a command line; "no --init" for one that is left out."""
    if value is None:
        return f"no {flag}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def differences(config: Any, other: Any, *, also: Collection[str] = ()) -> dict[str, Any]:
    """{flag: value in `config`} of what differs between two configurations and affects learning.

    also: names of further fields to compare.
    """
    found: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        value, of_other = getattr(config, each.name), getattr(other, each.name)
        flag = f"--{each.name.replace('_', '-')}"
        if value == of_other or (each.metadata.get("mutable") and each.name not in also):
            continue
        if dataclasses.is_dataclass(value):
            parts = differences(value, of_other).items()
            found |= {f"{flag}.{part.removeprefix('--')}": v for part, v in parts}
        else:
            found[flag] = value
    return found
