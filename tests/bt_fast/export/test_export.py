"""Exported weights reproduce the encoder's features in other libraries."""

import importlib.resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import photographs
from safetensors.torch import load_file, save_file

import bt_fast
from bt_fast.cli import main
from bt_fast.export.encoder_files import read_pretrained
from bt_fast.models.networks import build_encoder

ARCHITECTURES = ("resnet18", "resnet50")


@torch.no_grad()
def trained(name: str, stem="imagenet") -> torch.nn.Module:
    """An encoder without any weight or statistic at its constant initial value."""
    torch.manual_seed(1)
    encoder = build_encoder(name, stem=stem)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.copy_(0.5 + torch.rand(module.weight.shape))
            module.bias.copy_(0.1 * torch.randn(module.bias.shape))
            module.momentum = 0.5
    encoder(torch.randn(16, 3, 64, 64))  # batch statistics as after training: features of size 1
    return encoder.eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """64 photographs, uint8 [64, 3, 64, 64]."""
    pictures = [np.asarray(picture.resize((64, 64))) for picture in photographs(64)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def images(pixels) -> torch.Tensor:
    """The same as torchvision normalises them."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory, images):
    """(architecture, file of weights, its features of the 64 images)."""
    encoder = trained(request.param)
    path = tmp_path_factory.mktemp(request.param) / "encoder.safetensors"
    save_file(encoder.state_dict(), path)
    with torch.no_grad():
        return request.param, path, encoder(images)


def export(source, to: str, out) -> None:
    assert main(["export", str(source), "--to", to, "--out", str(out)]) == 0


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    # Else a tolerance of 1e-5 would be meaningless.
    assert expected.abs().max() > 0.5 and expected.std() > 0.05
    return (ours - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_torchvision_gives_the_same_features(saved, images, tmp_path):
    name, source, expected = saved
    export(source, "torchvision", tmp_path / "weights.pth")
    model = getattr(torchvision.models, name)()
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    model.fc = torch.nn.Identity()
    assert close(model.eval()(images), expected)


@torch.no_grad()
def test_timm_gives_the_same_features(saved, images, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    name, source, expected = saved
    export(source, "timm", tmp_path / "weights.pth")
    model = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / "weights.pth"))
    assert close(model.eval()(images), expected)


def detectron2_features(weights: dict, pixels: torch.Tensor, settings: dict) -> torch.Tensor:
    """detectron2's ResNet in functions of its own names, on pixels from 0 to 255.

    Written from its modeling/backbone/resnet.py: convolution, norm and ReLU; the stage's stride in
    the 3x3 convolution unless STRIDE_IN_1X1; a shortcut convolution where the width changes.
    """
    assert settings["INPUT"]["FORMAT"] == "RGB"
    model = settings["MODEL"]
    in_1x1 = model["RESNETS"]["STRIDE_IN_1X1"]
    mean, std = (torch.tensor(model[key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    used = set()

    def unit(x, name, stride=1):
        names = ("running_mean", "running_var", "weight", "bias")
        parts = [f"{name}.weight", *(f"{name}.norm.{part}" for part in names)]
        used.update(parts)
        kernel, *norm = (weights[part] for part in parts)
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        return F.batch_norm(x, *norm, eps=1e-5)

    x = F.relu(unit((pixels.float() - mean) / std, "stem.conv1", 2))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(2, 6):
        block = 0
        while f"res{stage}.{block}.conv1.weight" in weights:
            name = f"res{stage}.{block}"
            stride = 2 if stage > 2 and block == 0 else 1
            has_shortcut = f"{name}.shortcut.weight" in weights
            shortcut = unit(x, f"{name}.shortcut", stride) if has_shortcut else x
            if f"{name}.conv3.weight" in weights:
                first, second = (stride, 1) if in_1x1 else (1, stride)
                y = F.relu(unit(x, f"{name}.conv1", first))
                y = F.relu(unit(y, f"{name}.conv2", second))
                y = unit(y, f"{name}.conv3")
            else:
                y = unit(F.relu(unit(x, f"{name}.conv1", stride)), f"{name}.conv2")
            x = F.relu(y + shortcut)
            block += 1
    assert used == {name for name in weights if not name.endswith("num_batches_tracked")}
    return x.mean((2, 3))


@torch.no_grad()
@pytest.mark.parametrize("name", ["voc_faster_rcnn_c4_24k.yaml", "coco_mask_rcnn_c4_1x.yaml"])
def test_detectron2_gives_the_same_features(saved, pixels, tmp_path, name):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    _, source, expected = saved
    folder = importlib.resources.files("bt_fast.evaluate") / "detectron2"
    export(source, "detectron2", tmp_path / "weights.pth")
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)["model"]
    settings = yaml.safe_load((folder / name).read_text())
    assert close(detectron2_features(weights, pixels, settings), expected)


@pytest.mark.slow
@torch.no_grad()
def test_onnx_gives_the_same_features(images, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    encoder = trained("resnet18")
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    export(tmp_path / "encoder.safetensors", "onnx", tmp_path / "encoder.onnx")
    session = runtime.InferenceSession(tmp_path / "encoder.onnx")
    for shape in (images, images[:3, :, :48, :40]):  # the batch and the sides are free
        (features,) = session.run(None, {"images": shape.numpy()})
        assert close(torch.from_numpy(features), encoder(shape))


def test_safetensors_read_back(saved, images, tmp_path):
    name, source, expected = saved
    export(source, "safetensors", tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert close(bt_fast.load_encoder(tmp_path / "weights.safetensors")(images), expected)
    assert load_file(tmp_path / "weights.safetensors").keys() == load_file(source).keys()
    assert read_pretrained(tmp_path / "weights.safetensors").architecture == name


def test_overwriting_needs_the_flag(tmp_path, capsys):
    save_file(trained("resnet18").state_dict(), tmp_path / "e.safetensors")
    out = tmp_path / "weights.pth"
    out.write_text("precious")
    arguments = ["export", str(tmp_path / "e.safetensors"), "--to", "timm", "--out", str(out)]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "precious"
    assert main([*arguments, "--overwrite"]) == 0
    assert out.stat().st_size > 1e6
