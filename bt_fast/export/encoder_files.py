"""Encoders from files of every known layout.

Read without running code from the file (safetensors, or `weights_only`):

    a run's folder                   encoder.safetensors, else the newest valid checkpoint
    files of `bt-fast export`        torchvision, timm and safetensors
    the authors' files               resnet50.pth, with or without `fc`, and checkpoint.pth
    files of other programs          a ResNet with torchvision's names, or numbered as in
                                     nn.Sequential(*resnet.children()), at any place in nested
                                     dictionaries, with any other modules beside it

Layouts differ in the prefix of a ResNet's names. Names and shapes tell the architecture, but not
stride and padding: a 7x7 stem is torchvision's, a 3x3 stem is what the file's metadata, the run's
configuration or the caller say; the other strides are torchvision's.

Encoders of timm and torchvision by name are read from what bt-fast wrote, whose metadata or run
name them, or from a file of weights that the caller says is one of them.
"""

import hashlib
import re
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import nn

from bt_fast.choices import Encoder, Stem, is_of_library
from bt_fast.config import Config, load_config
from bt_fast.finite import require_finite
from bt_fast.models.library_encoders import build_library_encoder
from bt_fast.models.networks import ARCHITECTURES, STEMS, build_encoder, build_projector
from bt_fast.run import checkpoint
from pipelines.common.console import printable

Tensors = dict[str, torch.Tensor]

# A name that every ResNet has, after its prefix: torchvision's, or by number.
_MARK = re.compile(r"((?:.*\.)?)(layer1|4)\.0\.conv1\.weight", re.DOTALL)
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_PARTS = set(_NUMBERED.values())
_PROJECTED = ("backbone", "encoder")  # names of encoders beside which `projector` is theirs
# What training programs save beside weights, replaced by objects without behaviour.
_SETTINGS = (
    "__main__.exclude_bias_and_norm",  # early checkpoints of the authors: a filter of LARS
    "argparse.Namespace",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)  # fmt: skip
_DICTIONARIES = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """An encoder read from a file, on the CPU."""

    encoder: nn.Module  # returns pooled features
    architecture: str
    stem: Stem
    size: int | None  # side of the images of timm's and torchvision's encoders, pixels
    projector: nn.Sequential | None  # if it was requested and is beside the encoder
    source: Path  # the file or checkpoint it was read from
    name: str  # of the encoder, if the file holds several; else ""

    @property
    def description(self) -> str:
        stem = "" if self.stem == "imagenet" else f", {self.stem} stem"
        return f"{self.architecture}{stem}, {self.source}{self.name and f', {self.name}'}"


def load_encoder(
    path: str | Path, *, which: str | None = None, stem: Stem | None = None
) -> nn.Module:
    """A pretrained encoder: images [n, 3, H, W], normalised as ImageNet's -> features [n, width].

    Args:
        path: a run's folder, or a file of weights of bt-fast or of another program that holds a
            ResNet with torchvision's names; see docs/evaluation.md.
        which: the ResNet of a file that holds several, by its name in the file or a part of it,
            such as "teacher", "encoder_q" or "momentum_backbone".
        stem: stride, padding and max-pool of a 3x3 stem, if the file does not say: one of
            `bt_fast.models.networks.STEMS`, "cifar" for stride 1, padding 1 and no max-pool.

    Returns:
        a `torchvision.models.ResNet` whose `fc` is the identity, or the model of timm or
        torchvision that was trained, without its classifier; float32, on the CPU, in evaluation
        mode.

    Raises:
        ValueError: the path does not exist, cannot be read, holds no known encoder, or could mean
            several; the message names `--which` or `--stem`; or its weights are not finite.
    """
    return read_pretrained(Path(path), which=which, stem=stem).encoder.eval()


def read_pretrained(
    path: Path,
    *,
    which: str | None = None,
    stem: Stem | None = None,
    projector: bool = False,
    library: tuple[str, int] | None = None,
) -> Pretrained:
    """As `load_encoder`, with the architecture, the projector and the path of the file.

    projector: read it, too; from a run's folder, read the checkpoint, because encoder.safetensors
    has none.
    library: name and image size of an encoder of timm or torchvision, if the file does not say.
    """
    file = weights_file(path, projector)
    tensors, metadata = _read_tensors(file)
    architecture, size = _find_library(metadata, file) or library or ("", None)
    if size is not None:
        if stem is not None:
            raise ValueError(f"{file} holds {architecture}: leave out --stem")
        encoder, stem = build_library_encoder(architecture, size=size), "imagenet"
        encoders = _find_library_encoders(tensors, encoder, f"{architecture} for {size} px", file)
        prefix = _choose_encoder(encoders, which, file)
    else:
        encoders = _find_resnets(tensors, file)
        prefix = _choose_encoder(encoders, which, file)
        architecture = _find_architecture(encoders[prefix], file)
        stem = _choose_stem(encoders[prefix], stem, metadata, file)
        encoder = build_encoder(architecture, stem=stem)
    _load(encoder, encoders[prefix])
    # The projector is a sibling of the encoder: module.backbone. -> module.projector.
    parent, _, name = prefix.rstrip(".").rpartition(".")
    siblings = _without_prefix(f"{parent}.projector." if parent else "projector.", tensors)
    has_projector = projector and siblings and name in _PROJECTED
    pretrained = Pretrained(
        encoder=encoder,
        architecture=architecture,
        stem=stem,
        size=size,
        projector=_matching_projector(siblings, file) if has_projector else None,
        source=file,
        name=_labels(encoders)[prefix] if len(encoders) > 1 else "",
    )
    for module in (pretrained.encoder, pretrained.projector):
        if module is not None:
            require_finite(module.state_dict(), str(file), "choose another file or checkpoint")
    return pretrained


def describe_encoder(architecture: str, stem: Stem, size: int) -> dict[str, str]:
    """What a file of the encoder's weights records, because their names and shapes do not tell."""
    if is_of_library(architecture):
        return {"architecture": architecture, "size": str(size)}
    return {"stem": stem}


def _find_library(metadata: Mapping[str, Any], file: Path) -> tuple[str, int] | None:
    """(name, image size) of a timm or torchvision encoder, if the file or its run says so."""
    architecture, size = metadata.get("architecture"), metadata.get("size")
    if architecture is None and (config := _config_of_run(file)) is not None:
        architecture, size = config.encoder, config.size
    if not isinstance(architecture, str) or not is_of_library(architecture):
        return None
    if not str(size).isdecimal():
        raise ValueError(f"{file} holds {printable(architecture)}, but not the size of its images")
    return architecture, int(str(size))


def _find_library_encoders(
    tensors: Tensors, encoder: nn.Module, title: str, file: Path
) -> dict[str, Tensors]:
    """{prefix: its tensors} wherever in the file weights fit the encoder. Raises ValueError."""
    expected = encoder.state_dict()
    first = next(iter(expected))
    found, reason = {}, f"it lacks {first}"
    for prefix in [name.removesuffix(first) for name in tensors if name.endswith(first)]:
        beside = _without_prefix(prefix, tensors)  # with others, such as a classifier's
        weights = {name: beside[name] for name in expected if name in beside}
        if difference := _difference(expected, weights):
            reason = difference
        else:
            found[prefix] = weights
    if not found:
        raise ValueError(f"{file} does not hold a {title}: {printable(reason)}")
    return found


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) over names and values of the weights, independent of the file's layout."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_file(path: Path, projector: bool = False) -> Path:
    """The path itself, or the file to read in a run's folder. Raises ValueError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a run's folder or a file of weights")
    export = path / "encoder.safetensors"
    if export.exists() and not projector:
        return export
    newest, _ = checkpoint.newest(path)
    if newest is not None:
        return newest.folder / "model.safetensors"
    if export.exists():
        return export
    if not (path / "config.json").exists():
        raise ValueError(f"{path} is not the folder of a run (it has no config.json)")
    raise ValueError(f"{path} has neither encoder.safetensors nor a checkpoint yet")


def _reason(error: Exception) -> str:
    """One line, without torch's advice to load the file with `weights_only=False`."""
    if pickled := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a pickled {pickled[1]}, and reading that could run code; where it was"
            " written, save weights alone: torch.save(model.state_dict(), ...)"
        )
    foreign = "Unsupported operand|magic number|legacy .tar|inline_container|PytorchStreamReader"
    if isinstance(error, LookupError | EOFError) or re.search(foreign, str(error)):
        return "it was not written by torch, or it is truncated"
    if refusal := re.search(r"WeightsUnpickler error:\s+(.+)", str(error)):
        return refusal[1].splitlines()[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_tensors(file: Path) -> tuple[Tensors, Mapping[str, Any]]:
    """(tensors of a file by name, in nested dictionaries as "outer.inner"; its metadata)."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
                return {n: opened.get_tensor(n) for n in names}, opened.metadata() or {}
        _refuse_archive(file)
        allowed: list = [(_Setting, name) for name in _SETTINGS]
        allowed += [(OrderedDict, name) for name in _DICTIONARIES]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles; the content is checked below
            content = torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # torch raises exceptions of many classes on damaged files
        raise ValueError(f"{file} cannot be read as weights: {_reason(error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = dict(_named_tensors(content))
    if any(tensor.nbytes > file.stat().st_size for tensor in tensors.values()):
        raise ValueError(f"{file} cannot be read as weights: its tensors are larger than it")
    metadata = getattr(content, "_metadata", None)
    metadata = metadata.get("") if isinstance(metadata, Mapping) else None
    return tensors, metadata if isinstance(metadata, Mapping) else {}


def _named_tensors(content: Mapping) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of nested dictionaries, each of which is visited once."""
    pending, visited = deque([("", content)]), {id(content)}
    while pending:
        prefix, mapping = pending.popleft()
        for key, value in mapping.items():
            if _is_dense(value):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping) and id(value) not in visited:
                visited.add(id(value))
                pending.append((f"{prefix}{key}.", value))


def _is_dense(value: object) -> bool:
    """Whether this is a tensor with values: not sparse, quantised or on the device "meta"."""
    return isinstance(value, torch.Tensor) and not (
        value.layout is not torch.strided or value.is_quantized or value.is_meta
    )


def _refuse_archive(file: Path) -> None:
    """Raise ValueError for TorchScript, which contains code, and for a compressed archive: torch
    never compresses tensors, a zip bomb does."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(re.search(r"/code/|/constants\.pkl$", entry.filename) for entry in entries):
            raise ValueError(
                "it is a TorchScript archive, which contains code; save its weights alone:"
                " torch.save(torch.jit.load(FILE).state_dict(), ...)"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is a compressed archive, which torch does not write")


class _Setting:
    """Replaces an object or function of _SETTINGS, whose code is never run."""

    def __new__(cls, *_: object) -> "_Setting":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def _find_resnets(tensors: Tensors, file: Path) -> dict[str, Tensors]:
    """{prefix: tensors under torchvision's names} of every ResNet. Raises ValueError without one.

    What is beside it, such as `fc` or a projector, is left out, except convolutions: with those
    torchvision's ResNet would be another network.
    """
    marks = {found[1]: found[2] for name in tensors if (found := _MARK.fullmatch(name))}
    resnets: dict[str, Tensors] = {
        prefix: {}
        for prefix, mark in marks.items()
        if mark == "layer1" or f"{prefix}0.weight" in tensors
    }
    if not resnets:
        some = ", ".join(printable(name) for name in list(tensors)[:3]) or "none"
        raise ValueError(
            f"{file} holds no ResNet with torchvision's names (no layer1.0.conv1.weight); its"
            f" tensors: {some}{', ...' if len(tensors) > 3 else ''}"
        )
    for name, tensor in tensors.items():
        prefix = max((p for p in resnets if name.startswith(p)), key=len, default=None)
        if prefix is not None:
            first, dot, rest = name.removeprefix(prefix).partition(".")
            if marks[prefix] != "layer1":
                first = _NUMBERED.get(first, first)
            if first in _PARTS or tensor.ndim == 4:
                resnets[prefix][first + dot + rest] = tensor
    return resnets


def _labels(encoders: Mapping[str, Tensors]) -> dict[str, str]:
    """For each prefix its first part that no other one has, else all of it."""
    paths = {prefix: prefix.rstrip(".").split(".") for prefix in encoders}
    labels = {}
    for prefix, path in paths.items():
        others = {part for other in paths if other != prefix for part in paths[other]}
        label = next((part for part in path if part not in others), ".".join(path))
        labels[prefix] = printable(label) or "."
    return labels


def _choose_encoder(encoders: Mapping[str, Tensors], which: str | None, file: Path) -> str:
    """The prefix of the encoder that is meant; several with equal weights are one."""
    labels = _labels(encoders)
    listed = ", ".join(labels.values()) if len(labels) > 1 else "one encoder; leave --which out"
    exact = [p for p in encoders if which in (None, labels[p], p.rstrip("."))]
    prefixes = exact or [p for p in encoders if which in p.split(".")]
    if not prefixes:
        raise ValueError(f"--which {which}: {file} holds only {listed}")
    chosen = encoders[prefixes[0]]
    for other in (encoders[prefix] for prefix in prefixes[1:]):
        if chosen.keys() != other.keys() or any(
            not torch.equal(tensor, other[name]) for name, tensor in chosen.items()
        ):
            raise ValueError(
                f"{file} holds {len(encoders)} different encoders ({listed}); choose one with"
                f" --which, such as --which {next(iter(labels.values()))}"
            )
    return prefixes[0]


def _choose_stem(
    weights: Tensors, stem: Stem | None, metadata: Mapping[str, Any], file: Path
) -> Stem:
    """The stem that is given, recorded or the only one with this kernel. Raises ValueError."""
    if stem not in (None, *STEMS):
        raise ValueError(f"--stem {stem} is not one of {', '.join(STEMS)}")
    kernel, fitting = weights["conv1.weight"].shape[-1], _fitting_stems(weights)
    # Exports of early versions have no stem; a 3x3 one was "cifar".
    known = metadata.get("stem", "cifar" if "architecture" in metadata else None)
    if known not in fitting:
        config = _config_of_run(file)
        known = fitting[0] if len(fitting) == 1 else config and config.stem
    known = known if known in fitting else None
    chosen = stem or known
    if chosen is None:
        raise ValueError(
            f"{file}: its stem is a {kernel}x{kernel} convolution, whose stride, padding and"
            f" max-pool are not in the file: give --stem {', '.join(fitting)} (cifar: stride 1,"
            " padding 1, no max-pool; solo-learn: padding 2)"
        )
    if chosen not in fitting or known not in (None, chosen):
        kind = known or f"a {kernel}x{kernel} convolution"
        raise ValueError(f"--stem {chosen}: the stem of {file} is {kind}")
    return chosen


def _fitting_stems(weights: Tensors) -> list[Stem]:
    """The stems with the kernel of the first convolution; torchvision's if none has it."""
    kernel = weights["conv1.weight"].shape[-1:] if "conv1.weight" in weights else ()
    return [name for name, (size, *_) in STEMS.items() if kernel == (size,)] or ["imagenet"]


def _config_of_run(file: Path) -> Config | None:
    """The configuration of the run that a file belongs to, if it is a run's."""
    parents = file.absolute().parents
    folders = {"encoder.safetensors": parents[:1], "model.safetensors": parents[2:3]}
    for folder in folders.get(file.name, ()):
        try:
            return load_config(folder, "RUN")
        except (ValueError, OSError):  # not a run, or damaged
            pass
    return None


def _find_architecture(weights: Tensors, file: Path) -> Encoder:
    """The architecture with these names and shapes. Raises ValueError with the difference."""
    stages = tuple(
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    block = "Bottleneck" if "layer1.0.conv3.weight" in weights else "BasicBlock"
    names = get_args(Encoder)
    differences = {}
    for name in names:
        if ARCHITECTURES[name][:2] == (block, stages):
            with torch.device("meta"):
                expected = build_encoder(name, stem=_fitting_stems(weights)[0]).state_dict()
            differences[name] = _difference(expected, weights)
            if not differences[name]:
                return name
    reason = next(iter(differences.values()), f"its stages have {stages} {block} blocks")
    raise ValueError(f"{file} holds none of {', '.join(names)}: {printable(reason)}")


def _difference(expected: Tensors, weights: Tensors) -> str:
    """How names, shapes or types of the weights differ from those expected; "" if they do not."""
    shapes, found = _shapes(expected), _shapes(weights)
    for name in sorted(shapes.keys() ^ found.keys()):
        return f"{'it lacks' if name in shapes else 'it also has'} {name}"
    for name, shape in shapes.items():
        if found[name] != shape:
            return f"{name} is {list(found[name])} instead of {list(shape)}"
        if weights[name].is_floating_point() != expected[name].is_floating_point():
            return f"{name} is {weights[name].dtype}"
    return ""


def _matching_projector(weights: Tensors, file: Path) -> nn.Sequential:
    """The projector with these weights. Raises ValueError."""
    linear = [value for _, value in sorted(weights.items(), key=_layer_index) if value.ndim == 2]
    widths = tuple([linear[0].shape[1]] + [value.shape[0] for value in linear]) if linear else ()
    batch_norm = any(name.endswith("running_mean") for name in weights)
    projector = build_projector(widths, batch_norm=batch_norm) if len(widths) > 1 else None
    if projector is None or _difference(projector.state_dict(), weights):
        raise ValueError(f"{file} holds a projector of another architecture than the paper's")
    _load(projector, weights)
    return projector


def _layer_index(item: tuple[str, torch.Tensor]) -> int:
    number = item[0].partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _load(module: nn.Module, weights: Tensors) -> None:
    """Copy the weights; old files lack `num_batches_tracked`, which is left as it is."""
    module.load_state_dict({**module.state_dict(), **weights})


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
