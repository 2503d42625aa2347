"""`bt-fast export`: an encoder in the format of another library.

    torchvision  .pth, the names of torchvision.models.resnet*, without fc (as the authors released)
    timm         .pth, the same names: timm's resnets use torchvision's
    safetensors  the same names
    detectron2   .pth, the names of detectron2's ResNet, for DetectionCheckpointer
    onnx         normalised images [n, 3, H, W] -> features [n, width]; n is free, and of our
                 ResNets also H and W

The first three record architecture and stem as metadata, the .pth files as a state_dict() does.
Images are RGB in all of them, scaled to [0, 1] and normalised with ImageNet's mean and deviation.
detectron2's pixels lie in [0, 255]: PIXEL_MEAN and PIXEL_STD are 255 times as large, and
INPUT.FORMAT must be RGB (its default is BGR); `bt_fast/evaluate/detectron2/` sets both.
"""

import io
import logging
import os
import re
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from bt_fast.export.encoder_files import (
    Pretrained,
    Tensors,
    describe_encoder,
    read_pretrained,
)
from bt_fast.export.options import SUFFIXES, Export, Target
from bt_fast.models.library_encoders import size_options
from bt_fast.models.networks import STEMS
from pipelines.common.atomic import atomic_file, require_place


def run_export(options: Export) -> int:
    """Write the file and print how to load it; returns the exit status."""
    suffixes = SUFFIXES[options.to]
    if options.out.suffix not in suffixes:
        raise ValueError(f"--out {options.out} must end in {' or '.join(suffixes)}")
    require_place(options.out, "--out")
    if os.path.lexists(options.out) and not options.overwrite:
        raise ValueError(f"--out {options.out} exists; add --overwrite to replace it")
    pretrained = read_pretrained(options.source, which=options.which, stem=options.stem)
    content = serialise(pretrained, options.to)
    with atomic_file(options.out, overwrite=options.overwrite) as file:
        file.write(content)
    print(f"{options.out}: {pretrained.description}")
    print(loading_hint(pretrained, options.to, options.out))
    return 0


def serialise(pretrained: Pretrained, to: Target) -> bytes:
    """Content of the file. Raises ValueError for an encoder that the format cannot express."""
    if to == "onnx":
        return _onnx(pretrained.encoder, pretrained.size)
    weights = OrderedDict(
        (name, t.detach().contiguous()) for name, t in pretrained.encoder.state_dict().items()
    )
    library = pretrained.architecture.partition("/")[0] if pretrained.size else None
    if library and to not in (library, "safetensors"):
        raise ValueError(
            f"--to {to}: the encoder is {library}'s; use --to {library} or safetensors"
        )
    metadata = {
        "architecture": pretrained.architecture,
        **describe_encoder(pretrained.architecture, pretrained.stem, pretrained.size or 0),
    }
    if to == "safetensors":
        return safetensors.torch.save(weights, metadata={"format": "pt", **metadata})
    if to == "detectron2":
        if pretrained.stem != "imagenet":
            raise ValueError(f"--to detectron2: its ResNet has no {pretrained.stem} stem")
        if pretrained.architecture.startswith("wide"):
            raise ValueError("--to detectron2: the paper's configurations have no wide ResNets")
        content: dict = {
            "model": detectron2_names(weights),
            "__author__": "bt-fast",
            "matching_heuristics": True,  # res5 to roi_heads.res5, the others to backbone
        }
    else:
        weights._metadata = {"": metadata}  # type: ignore[attr-defined]  # as of a state_dict()
        content = weights
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def detectron2_names(weights: Tensors) -> Tensors:
    """torchvision's names -> detectron2's, tensors unchanged.

    conv1, bn1                  stem.conv1, stem.conv1.norm
    layer1 .. layer4            res2 .. res5
    layerI.J.convK, .bnK        resI+1.J.convK, .convK.norm
    layerI.J.downsample.0, .1   resI+1.J.shortcut, .shortcut.norm

    Source: detectron2's tools/convert-torchvision-to-d2.py. (STRIDE_IN_1X1 must be False, because
    torchvision puts a stage's stride into its first 3x3 convolution.)
    """
    renamed = {}
    for name, tensor in weights.items():
        stage = re.match(r"layer(\d)\.", name)
        new = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
        new = re.sub(r"\bbn(\d)\b", r"conv\1.norm", new)
        new = new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[new] = tensor
    return renamed


def _onnx(encoder: nn.Module, size: int | None) -> bytes:
    """size: the only one of the images, pixels; None: any."""
    try:
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        raise ValueError("--to onnx needs more packages: pip install 'bt-fast[onnx]'") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        encoder.eval(),
        (torch.zeros(2, 3, size or 64, size or 64),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: dynamic} if size else {0: dynamic, 2: dynamic, 3: dynamic},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model_proto.SerializeToString()


def loading_hint(pretrained: Pretrained, to: Target, out: Path) -> str:
    """Line with the Python statement or configuration that reads the file."""
    name, stem = pretrained.architecture.rpartition("/")[2], ""
    options = size_options(pretrained.architecture, pretrained.size) if pretrained.size else {}
    sizes_of_images = ", ".join(f"{key}={value}" for key, value in options.items())
    if pretrained.stem != "imagenet":
        *sizes, max_pool = STEMS[pretrained.stem]
        stem = f"model.conv1 = torch.nn.Conv2d(3, 64, {', '.join(map(str, sizes))}, bias=False); "
        stem += "" if max_pool else "model.maxpool = torch.nn.Identity(); "
    lines = {
        "torchvision": f"model = torchvision.models.{name}({sizes_of_images}); {stem}"
        f'model.load_state_dict(torch.load("{out}"), strict=False)  # no classifier',
        "timm": f'model = timm.create_model("{name}", num_classes=0'
        f"{sizes_of_images and f', {sizes_of_images}'}); {stem}"
        f'model.load_state_dict(torch.load("{out}"))',
        "safetensors": f'bt_fast.load_encoder("{out}")',
        "detectron2": f"MODEL.WEIGHTS {out}, with the configurations in"
        f" {Path(__file__).parents[1] / 'evaluate' / 'detectron2'}",
        "onnx": f'onnxruntime.InferenceSession("{out}").run(None, {{"images": images}})',
    }
    return f"load it with: {lines[to]}"
