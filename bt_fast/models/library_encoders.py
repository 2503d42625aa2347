"""Encoders of timm and torchvision by name, such as timm/vit_small_patch16_224.

The classifier is removed, dropout is off, and two kinds of layers are replaced by ours, which add
no state, so that names and shapes of the weights stay the library's:

    batch norm, also with an activation    each view by its own statistics over all ranks, as in
                                           `batch_norm`; no other norm over the batch is accepted
    stochastic depth                       `DropPath`, whose draws are functions of (seed, step,
                                           sample): the same at any number of ranks, in both passes
                                           of `--accumulate`, and after a resume
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import nn

from bt_fast.models import batch_norm
from pipelines.order import step_keys, uniforms

_DROP_PATH = 5  # stream of the draws; smaller ones are those of crops and augmentations


def build_library_encoder(
    name: str, *, size: int, drop_path: float = 0.0, per_view: bool = False
) -> nn.Module:
    """A randomly initialised model: images [n, 3, size, size] -> features [n, feature_width].

    Args:
        name: timm/NAME or torchvision/NAME.
        size: side of the images, pixels; a model for one size is built for this one.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        per_view: batch norms of pretraining, which normalise each of two views.

    Raises:
        ValueError: there is no such model, it does not take such images or return [n, features], it
            has no stochastic depth for `drop_path`, or it has a norm over the batch that cannot be
            computed per view.
    """
    library, _, model_name = name.partition("/")
    build = _build_timm if library == "timm" else _build_torchvision
    encoder = build(model_name, size, drop_path)
    _replace_drop_paths(encoder, name, drop_path)
    for layer in encoder.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.p = 0.0
        if getattr(layer, "inplace", False) is True:  # the norm before it keeps its output
            layer.inplace = False  # type: ignore[assignment]
    if per_view:
        batch_norm.convert_to_per_view(encoder, name)
    encoder.feature_width = count_features(encoder, name, size)  # type: ignore[assignment]
    return encoder


def size_options(name: str, size: int) -> dict[str, int]:
    """The argument with which a library builds a model whose images have one size."""
    library, _, model_name = name.partition("/")
    if library == "torchvision":
        return {"image_size": size} if model_name.startswith("vit_") else {}
    pretrained = _import("timm").get_pretrained_cfg(model_name)
    return {"img_size": size} if getattr(pretrained, "fixed_input_size", False) else {}


def _build_timm(name: str, size: int, drop_path: float) -> nn.Module:
    timm = _import("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:5]
        raise ValueError(_no_model(f"timm/{name}", near))
    options: dict[str, Any] = {**size_options(f"timm/{name}", size)}
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        if "drop_path_rate" in str(error):
            raise ValueError(_no_drop_path(f"timm/{name}")) from None
        raise ValueError(f"--encoder timm/{name} cannot be built: {_line(error)}") from None


def _build_torchvision(name: str, size: int, drop_path: float) -> nn.Module:
    models = _import("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(
            _no_model(f"torchvision/{name}", [n for n in names if name.rstrip("0123456789_") in n])
        )
    options: dict[str, Any] = {**size_options(f"torchvision/{name}", size)}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    try:
        model = models.get_model(name, weights=None, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"--encoder torchvision/{name} cannot be built: {_line(error)}") from None
    classifiers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not classifiers or model.get_submodule(classifiers[-1]).out_features != 1000:
        raise ValueError(f"--encoder torchvision/{name}: its last layer is no linear classifier")
    model.set_submodule(classifiers[-1], nn.Identity())
    layers = [m for m in model.modules() if type(m).__name__ == "StochasticDepth"]
    for index, layer in enumerate(layers):
        layer.p = drop_path * index / max(len(layers) - 1, 1)  # type: ignore[assignment]
    return model


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"--encoder {module}/... needs pip install 'bt-fast[{module}]'") from None


def _no_drop_path(name: str) -> str:
    return f"--drop-path: --encoder {name} has no stochastic depth"


def _no_model(name: str, near: list[str]) -> str:
    library = name.partition("/")[0]
    suggestion = f"; similar: {', '.join(near[:5])}" if near else ""
    return f"--encoder {name}: {library} has no such model{suggestion}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def count_features(encoder: nn.Module, name: str, size: int) -> int:
    """Number of features, by a forward pass of one image. Raises ValueError unless the encoder
    takes images of this side."""
    parameter = next(encoder.parameters())
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            features = encoder(torch.zeros(1, 3, size, size, device=parameter.device))
    except Exception as error:  # the models' authors chose these
        raise ValueError(
            f"--encoder {name} does not take images of {size} px: {_line(error)}"
        ) from None
    finally:
        encoder.train(was_training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ValueError(f"--encoder {name} does not return one vector per image")
    return features.shape[1]


class DropPath(nn.Module):
    """Sets the residual branch of a sample to 0 with probability `rate`, and divides it by
    1 - rate otherwise (stochastic depth, Huang et al., 2016). Drawn by `DropPaths`."""

    scale: torch.Tensor | None = None  # 0 or 1 / (1 - rate) for every row of the next batch, [2 n]

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [2 n, ...]."""
        if not self.training or self.rate == 0:
            return x
        if self.scale is None:
            raise ValueError(
                "stochastic depth needs DropPaths.draw and .use before a training batch"
            )
        if len(x) != len(self.scale):
            raise ValueError(
                "--drop-path: this encoder has blocks whose rows are parts of images; use 0"
            )
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPaths:
    """The draws of all `DropPath` of a model for a step, the same at any number of ranks."""

    def __init__(self, model: nn.Module, *, seed: int, rank: int = 0) -> None:
        """rank: of this process; every rank has the same number of images."""
        self._layers = [m for m in model.modules() if isinstance(m, DropPath) and m.rate > 0]
        self._rates = np.array([layer.rate for layer in self._layers])
        self._seed, self._rank = seed, rank
        self._device = next(model.parameters()).device
        self._scales = torch.empty(0)
        self._used = torch.empty(0)  # [layers, rows]: one address, which CUDA graphs record

    def draw(self, step: int, num_images: int) -> None:
        """Draw for a step with so many images on every rank."""
        if not self._layers:
            return
        rows = np.arange(num_images) + self._rank * num_images
        keys = [step_keys(rows, seed=self._seed, step=step, view=view) for view in (0, 1)]
        kept = uniforms(np.concatenate(keys), _DROP_PATH, len(self._layers)) >= self._rates
        scales = torch.from_numpy((kept / (1 - self._rates)).astype(np.float32))
        if self._device.type == "cuda":
            scales = scales.pin_memory()
        self._scales = scales.to(self._device, non_blocking=True)  # [2 n, layers], view A first

    def use(self, number: int = 0, num_parts: int = 1) -> None:
        """Let the layers drop as drawn for a part of both views, in its next passes."""
        if self._layers:
            part = torch.cat([view.chunk(num_parts)[number] for view in self._scales.chunk(2)]).T
            if self._used.shape != part.shape:
                self._used = torch.empty_like(part, memory_format=torch.contiguous_format)
                for layer, scale in zip(self._layers, self._used, strict=True):
                    layer.scale = scale
            self._used.copy_(part)


def _replace_drop_paths(encoder: nn.Module, name: str, drop_path: float) -> None:
    found = False
    for parent in list(encoder.modules()):
        for child_name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in ("DropPath", "StochasticDepth") and not isinstance(child, DropPath):
                rate = getattr(child, "drop_prob", None) or getattr(child, "p", 0.0) or 0.0
                setattr(parent, child_name, DropPath(rate if drop_path else 0.0))
                found = True
    if drop_path and not found:
        raise ValueError(_no_drop_path(name))
