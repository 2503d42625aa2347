"""Encoders from files of every known layout, as torchvision ResNets.

Supported sources, read without running code from the file (safetensors, or `weights_only`):

    a run's folder                   encoder.safetensors, else the newest valid checkpoint
    encoder.safetensors              torchvision's names
    the authors' resnet50.pth        torchvision's names, with or without the classifier `fc`
    the authors' checkpoint.pth      {"epoch", "model", "optimizer"}; module.backbone.* and so on
    files of `bt-fast export`        torchvision, timm and safetensors

The layouts differ in the prefix of `conv1.weight`, not in the names after it. The architecture and
the CIFAR stem are recognised by names and shapes.
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

from bt_fast.finite import require_finite
from bt_fast.models.networks import Encoder, build_encoder, build_projector
from bt_fast.run import checkpoint

Tensors = dict[str, torch.Tensor]

_STEM = "conv1.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """An encoder read from a file, on the CPU."""

    encoder: nn.Module  # returns pooled features
    architecture: Encoder
    small_images: bool  # the CIFAR stem
    projector: nn.Sequential | None  # if the file is a checkpoint with one
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
        ValueError: the path does not exist, cannot be read, holds no known encoder, or its weights
            are not finite.
    """
    return read_pretrained(Path(path)).encoder.eval()


def read_pretrained(path: Path, *, projector: bool = False) -> Pretrained:
    """As `load_encoder`, with the architecture, the projector and the path of the file.

    projector: from a run's folder, read the checkpoint, because encoder.safetensors has none.
    """
    file = _weights_file(path, projector)
    tensors = _read_tensors(file)
    stems = [name for name in tensors if name == _STEM or name.endswith(f".{_STEM}")]
    prefixes = [name.removesuffix(_STEM) for name in stems if ".layer" not in f".{name}"]
    if len(prefixes) != 1:
        raise ValueError(f"{file} holds no ResNet with torchvision's names (no {_STEM})")
    weights = _without_prefix(prefixes[0], tensors)
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    architecture, small_images, encoder = _matching_encoder(weights, file)
    # The projector is a sibling of the encoder: module.backbone. -> module.projector.
    parent = prefixes[0].rstrip(".").rpartition(".")[0]
    siblings = _without_prefix(f"{parent}.projector." if parent else "projector.", tensors)
    pretrained = Pretrained(
        encoder=encoder,
        architecture=architecture,
        small_images=small_images,
        projector=_matching_projector(siblings, file) if prefixes[0] and siblings else None,
        source=file,
    )
    for module in (pretrained.encoder, pretrained.projector):
        if module is not None:
            require_finite(module.state_dict(), str(file), "choose another file or checkpoint")
    return pretrained


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (hex) over names and values of the weights, independent of the file's layout."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_file(path: Path, projector: bool) -> Path:
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
    if refusal := re.search(r"WeightsUnpickler error:\s+(.+)", str(error)):
        return refusal[1].splitlines()[0]
    if isinstance(error, KeyError | EOFError):  # an unknown opcode of the pickle; an empty file
        return "it was not written by torch, or it is truncated"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_tensors(file: Path) -> Tensors:
    """Tensors of a file by name; of a nested dictionary, those under "model" or "state_dict"."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _refuse_compressed(file)
        # Early checkpoints of the authors refer to a function of their script, a filter of LARS.
        allowed: list = [(_placeholder, "__main__.exclude_bias_and_norm")]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles; the content is checked below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many classes on damaged files
        raise ValueError(f"{file} cannot be read as weights: {_reason(error)}") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(k): value for k, value in content.items() if _is_dense(value)}
    if any(tensor.nbytes > file.stat().st_size for tensor in tensors.values()):
        raise ValueError(f"{file} cannot be read as weights: its tensors are larger than it")
    return tensors


def _is_dense(value: object) -> bool:
    """Whether this is a tensor with values: not sparse, quantised or on the device "meta"."""
    return isinstance(value, torch.Tensor) and not (
        value.layout is not torch.strided or value.is_quantized or value.is_meta
    )


def _refuse_compressed(file: Path) -> None:
    """Raise ValueError for a compressed archive: torch never compresses, a zip bomb does."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is a compressed archive, which torch does not write")


def _placeholder(*_: object) -> bool:
    """Replaces a function that a checkpoint refers to; never called."""
    return False


def _without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with the prefix, under the rest of their names."""
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def _matching_encoder(weights: Tensors, file: Path) -> tuple[Encoder, bool, nn.Module]:
    """(architecture, CIFAR stem, network with these weights). Raises ValueError."""
    shapes = _shapes(weights)
    for name in get_args(Encoder):
        for small_images in (False, True):
            with torch.device("meta"):
                candidate = build_encoder(name, small_images=small_images)
            if _shapes(candidate.state_dict()) == shapes:
                encoder = build_encoder(name, small_images=small_images)
                _load(encoder, weights)
                return name, small_images, encoder
    raise ValueError(f"{file} holds none of {', '.join(get_args(Encoder))}: names or shapes differ")


def _matching_projector(weights: Tensors, file: Path) -> nn.Sequential:
    """The projector with these weights. Raises ValueError."""
    linear = [value for _, value in sorted(weights.items(), key=_layer_index) if value.ndim == 2]
    widths = tuple([linear[0].shape[1]] + [value.shape[0] for value in linear]) if linear else ()
    batch_norm = any(name.endswith("running_mean") for name in weights)
    projector = build_projector(widths, batch_norm=batch_norm) if len(widths) > 1 else None
    if projector is None or _shapes(projector.state_dict()) != _shapes(weights):
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
