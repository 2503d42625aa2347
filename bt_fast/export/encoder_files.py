"""Encoders from files: whatever layout they were saved in, a torchvision ResNet comes out.

What is read, all of it without running code from the file (safetensors, or `weights_only`):

    a run's folder                   encoder.safetensors, else the newest valid checkpoint
    encoder.safetensors              torchvision's names
    the authors' resnet50.pth        torchvision's names, with or without the classifier `fc`
    the authors' checkpoint.pth      {"epoch", "model", "optimizer"}; module.backbone.* and so on
    what `bt-fast export` writes     torchvision, timm and safetensors

The names in front of `conv1.weight` differ; what follows them does not. Which network it is and
whether it has the CIFAR stem follow from the names and shapes.
"""

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file
from torch import nn

from bt_fast.models.networks import Encoder, build_encoder, build_projector
from bt_fast.run import checkpoint

Tensors = dict[str, torch.Tensor]

_STEM = "conv1.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """An encoder read from a file, on the CPU."""

    encoder: nn.Module  # ends in its pooled features
    architecture: Encoder
    small_images: bool  # has the CIFAR stem
    projector: nn.Sequential | None  # of a checkpoint that holds one
    source: Path  # the file or checkpoint it was read from

    @property
    def description(self) -> str:
        stem = ", CIFAR stem" if self.small_images else ""
        return f"{self.architecture}{stem}, {self.source}"


def load_encoder(path: str | Path) -> nn.Module:
    """A pretrained encoder: images [n, 3, H, W], normalised as ImageNet's -> features [n, width].

    Args:
        path: a run's folder, an encoder.safetensors, the authors' resnet50.pth or full
            checkpoint, or a file of `bt-fast export --to torchvision|timm|safetensors`.
    Returns:
        a `torchvision.models.ResNet` whose `fc` is the identity, on the CPU, in evaluation mode.
    Raises:
        ValueError: nothing is there, it cannot be read, or it is none of our encoders.
    """
    return read_pretrained(Path(path)).encoder.eval()


def read_pretrained(path: Path, *, projector: bool = False) -> Pretrained:
    """As `load_encoder`, with what else is known of the file.

    projector: of a run's folder, read the checkpoint, which has it, not encoder.safetensors.
    """
    file = _find(path, projector)
    tensors = _read(file)
    stems = [name for name in tensors if name == _STEM or name.endswith(f".{_STEM}")]
    prefixes = [name.removesuffix(_STEM) for name in stems if ".layer" not in f".{name}"]
    if len(prefixes) != 1:
        raise ValueError(f"{file} holds no ResNet with torchvision's names (no {_STEM})")
    weights = _below(prefixes[0], tensors)
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    architecture, small_images, encoder = _recognise(weights, file)
    # The projector lies beside the encoder: module.backbone. -> module.projector.
    outer = prefixes[0].rstrip(".").rpartition(".")[0]
    beside = _below(f"{outer}.projector." if outer else "projector.", tensors)
    return Pretrained(
        encoder=encoder,
        architecture=architecture,
        small_images=small_images,
        projector=_projector(beside, file) if prefixes[0] and beside else None,
        source=file,
    )


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) over names and values: the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _find(path: Path, projector: bool) -> Path:
    """The file to read: itself, or the best of a run's folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a run's folder or a file of weights")
    export = path / "encoder.safetensors"
    if export.exists() and not projector:
        return export
    found, _ = checkpoint.newest(path)
    if found is not None:
        return found.folder / "model.safetensors"
    if export.exists():
        return export
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: no run is there (it has no config.json)")
    raise ValueError(f"{path} has no encoder yet: neither a finished run nor a checkpoint")


def _reason(error: Exception) -> str:
    """One line, without torch's advice to load what it refuses all the same."""
    if refused := re.search(r"WeightsUnpickler error:\s+(.+)", str(error)):
        return refused[1]
    if isinstance(error, KeyError | EOFError):  # of a byte that no pickle has, of no bytes
        return "torch did not write it, or it is cut off"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read(file: Path) -> Tensors:
    """Every tensor of a file by name; of nested dictionaries, those under "model" or the like."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _require_no_bomb(file)
        # Early checkpoints of the authors name two functions of their script, for LARS' filters.
        known: list = [(_unused, "__main__.exclude_bias_and_norm")]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: what comes of them is checked below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on damaged files
        raise ValueError(f"{file} cannot be read as weights: {_reason(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(k): value for k, value in content.items() if _is_plain(value)}
    if any(tensor.nbytes > file.stat().st_size for tensor in tensors.values()):
        raise ValueError(f"{file} cannot be read as weights: it claims more than it holds")
    return tensors


def _is_plain(value: object) -> bool:
    """A tensor with values: not sparse, quantised or of the device "meta"."""
    return isinstance(value, torch.Tensor) and not (
        value.layout is not torch.strided or value.is_quantized or value.is_meta
    )


def _require_no_bomb(file: Path) -> None:
    """torch stores what it saves; only a malicious archive unpacks to more than its own size."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is a compressed archive, which torch does not write")


def _unused(*_) -> bool:
    """Stands for a function that a file names and nobody calls."""
    return False


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def _recognise(weights: Tensors, file: Path) -> tuple[Encoder, bool, nn.Module]:
    """The network that has these names and shapes, filled."""
    shapes = _shapes(weights)
    for name in get_args(Encoder):
        for small_images in (False, True):
            with torch.device("meta"):
                candidate = build_encoder(name, small_images=small_images)
            if _shapes(candidate.state_dict()) == shapes:
                encoder = build_encoder(name, small_images=small_images)
                _fill(encoder, weights)
                return name, small_images, encoder
    raise ValueError(f"{file} holds none of {', '.join(get_args(Encoder))}: names or shapes differ")


def _projector(weights: Tensors, file: Path) -> nn.Sequential:
    """The projector whose linear layers have these shapes, filled."""
    linear = [value for _, value in sorted(weights.items(), key=_layer) if value.ndim == 2]
    widths = tuple([linear[0].shape[1]] + [value.shape[0] for value in linear]) if linear else ()
    batch_norm = any(name.endswith("running_mean") for name in weights)
    projector = build_projector(widths, batch_norm=batch_norm) if len(widths) > 1 else None
    if projector is None or _shapes(projector.state_dict()) != _shapes(weights):
        raise ValueError(f"{file} holds a projector of another kind than the paper's")
    _fill(projector, weights)
    return projector


def _layer(item: tuple[str, torch.Tensor]) -> int:
    number = item[0].partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _fill(module: nn.Module, weights: Tensors) -> None:
    """Copy the values; counters of seen batches, which old files lack and nothing reads, stay."""
    filled = {**module.state_dict(), **weights}
    module.load_state_dict(filled)


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
