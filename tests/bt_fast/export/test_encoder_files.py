"""Encoders are read from every known layout, and nothing else is read as one.

The oracle is torchvision's ResNet-18 with the same weights, its stem replaced as other programs do.
"""

import argparse
import collections
import dataclasses
import functools
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_python
from safetensors.torch import load_file, save_file
from torch import nn

import bt_fast
from bt_fast.cli import main
from bt_fast.config import Config, to_json
from bt_fast.export.encoder_files import read_pretrained
from bt_fast.models.networks import BarlowTwins
from bt_fast.recipes import RECIPES
from bt_fast.run import checkpoint
from bt_fast.train import export_encoder


def resnet18(seed: int = 0, **arguments) -> nn.Module:
    """torchvision's, in evaluation mode, with batch norms as after training and a classifier."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=7, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1)
    return model.eval()


@torch.no_grad()
def features(model: nn.Module, side: int = 40) -> torch.Tensor:
    fc, model.fc = model.fc, nn.Identity()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    result = model(images)
    model.fc = fc
    return result


A, B = resnet18(0), resnet18(1)
EXPECTED = {"A": features(A), "B": features(B)}
WITH_FC, WITH_FC_B = dict(A.state_dict()), dict(B.state_dict())
WEIGHTS, WEIGHTS_B = (
    {name: value for name, value in weights.items() if not name.startswith("fc.")}
    for weights in (WITH_FC, WITH_FC_B)
)


def head(*names: str, bias: bool = True) -> dict[str, torch.Tensor]:
    """A projector of other widths than the paper's, and with biases."""
    layers = nn.Sequential(nn.Linear(512, 8, bias), nn.BatchNorm1d(8), nn.Linear(8, 4, bias))
    return {k: v for name in names for k, v in under(name, layers.state_dict()).items()}


def under(prefix: str, weights) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def numbered(model: nn.Module) -> dict[str, torch.Tensor]:
    """As lightly builds its backbones."""
    return nn.Sequential(*list(model.children())[:-1]).state_dict()


ADAM = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
SETTINGS = argparse.Namespace(arch="resnet18", lr=np.float64(0.1), sizes=np.arange(3))
MOCO = {**under("module.encoder_q", WITH_FC), **under("module.encoder_k", WITH_FC_B)}
MOCO["module.queue"] = torch.zeros(4, 4)
BYOL = {**under("backbone", WEIGHTS), **under("momentum_backbone", WEIGHTS_B)}
BYOL |= head("projector", "momentum_projector")
DINO = {
    "student": under("module.backbone", WEIGHTS) | head("module.head.mlp"),
    "teacher": under("backbone", WEIGHTS_B),
    "args": SETTINGS,
}
MEAN_TEACHER = {**WITH_FC, **under("ema", WITH_FC_B)}

VICREG = under("module.backbone", WEIGHTS) | head("module.projector")
SOLO = under("backbone", WEIGHTS) | head("projector", "classifier")
VISSL = {"trunk": under("_feature_blocks", WEIGHTS), "heads": {}}

ONE = {  # content of the file
    "the authors' encoder": WEIGHTS,
    "with a classifier": WITH_FC,
    "the authors' early classifier": {"model": WITH_FC, "optimizer": ADAM},
    "VICReg": {"model": VICREG, "optimizer": ADAM},
    "solo-learn": {"state_dict": SOLO, "pytorch-lightning_version": "1.6"},
    "solo-learn, early": {"state_dict": under("encoder", WEIGHTS) | head("projector")},
    "SwAV": {"state_dict": {**under("module", WEIGHTS), **head("module.projection_head")}},
    "MoCo, its projector in fc": {"state_dict": {**WEIGHTS, **head("fc")}},
    "lightly": {"state_dict": under("backbone", numbered(A)) | head("projection_head")},
    "lightly, twice": {"state_dict": under("backbone", numbered(A)) | under("m.b", numbered(A))},
    "VISSL": {"classy_state_dict": {"base_model": {"model": VISSL}}},
    "mmselfsup": {"meta": {"epoch": 3}, "state_dict": under("backbone", WEIGHTS) | head("neck")},
    "compiled": {"state_dict": under("_orig_mod.module.backbone", WEIGHTS)},
    "DDP, then compiled": under("module._orig_mod", WEIGHTS),
    "numpy and argparse beside it": {"state_dict": WITH_FC, "args": SETTINGS, "best": SETTINGS.lr},
    "equal student and teacher": {"student": WEIGHTS, "teacher": dict(WEIGHTS)},
    "without num_batches_tracked": {k: v for k, v in WEIGHTS.items() if "batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_the_only_resnet_of_a_file_is_read(name, tmp_path):
    torch.save(ONE[name], tmp_path / "w.pth")
    assert torch.equal(features(bt_fast.load_encoder(tmp_path / "w.pth")), EXPECTED["A"])


def test_half_precision_becomes_float32(tmp_path):
    torch.save({name: value.half() for name, value in WEIGHTS.items()}, tmp_path / "w.pth")
    encoder = bt_fast.load_encoder(tmp_path / "w.pth")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    scale = EXPECTED["A"].abs().max()
    assert 0 < (features(encoder) - EXPECTED["A"]).abs().max() < 2e-3 * scale


def test_timms_names_are_torchvisions(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(WEIGHTS)
    torch.save({"state_dict": model.state_dict(), "args": SETTINGS}, tmp_path / "w.pth.tar")
    assert torch.equal(features(bt_fast.load_encoder(tmp_path / "w.pth.tar")), EXPECTED["A"])


@pytest.mark.parametrize(
    "content,names",
    [
        (MOCO, ["encoder_q", "encoder_k"]),
        ({"state_dict": BYOL}, ["backbone", "momentum_backbone"]),
        (DINO, ["student", "teacher"]),
        ({"state_dict": WITH_FC, "state_dict_ema": WITH_FC_B}, ["state_dict", "state_dict_ema"]),
        (MEAN_TEACHER, [".", "ema"]),
        ({"net": {"a": under("x", WEIGHTS), "b": under("x.y", WEIGHTS_B)}}, ["a", "b"]),
    ],
    ids=["MoCo", "BYOL", "DINO", "timm", "root", "nested"],
)
def test_of_several_resnets_which_chooses(content, names, tmp_path, refused):
    file = tmp_path / "w.pth"
    torch.save(content, file)
    export = ["export", str(file), "--to", "timm", "--out", str(tmp_path / "o.pth")]
    refused(main(export), f"2 different encoders ({', '.join(names)}); choose one with --which")
    message = f"--which nobody: {file} holds only {', '.join(names)}"
    refused(main([*export, "--which", "nobody"]), message)
    for which, expected in zip(names, EXPECTED.values(), strict=True):
        assert torch.equal(features(bt_fast.load_encoder(file, which=which)), expected)
    assert main([*export, "--which", names[1]]) == 0
    assert torch.equal(features(bt_fast.load_encoder(tmp_path / "o.pth")), EXPECTED["B"])


# As other programs write them, not read from our table.
conv = functools.partial(nn.Conv2d, 3, 64, 3, bias=False)
STEMS = {
    "cifar": (conv(padding=1), nn.Identity()),
    "solo-learn": (conv(padding=2), nn.Identity()),
    "3x3-maxpool": (conv(padding=1), nn.MaxPool2d(3, 2, 1)),
    "3x3-stride2": (conv(stride=2, padding=1), nn.Identity()),
    "3x3-stride2-maxpool": (conv(stride=2, padding=1), nn.MaxPool2d(3, 2, 1)),
}


def with_stem(stem: str) -> nn.Module:
    model = resnet18()
    model.conv1, model.maxpool = STEMS[stem]
    torch.manual_seed(3)
    nn.init.normal_(model.conv1.weight)
    return model


def test_a_3x3_stem_is_not_guessed(tmp_path, refused):
    """The same weights are five networks, of which none is chosen in silence."""
    found, file = {}, tmp_path / "w.ckpt"
    for stem in STEMS:
        model = with_stem(stem)
        torch.save({"state_dict": under("backbone", model.state_dict())}, file)
        found[stem] = features(bt_fast.load_encoder(file, stem=stem), 20)
        assert torch.equal(found[stem], features(model, 20))
    assert len({float(values.sum()) for values in found.values()}) == len(STEMS)
    export = ["export", str(file), "--to", "timm", "--out", str(tmp_path / "out.pth")]
    refused(main(export), "give --stem cifar, solo-learn")
    refused(main([*export, "--stem=imagenet"]), "is a 3x3 convolution")
    with pytest.raises(ValueError, match="--stem resnet is not one of imagenet, cifar"):
        bt_fast.load_encoder(file, stem="resnet")
    torch.save(WEIGHTS, file)
    with pytest.raises(ValueError, match=r"--stem cifar: the stem of .* is imagenet"):
        bt_fast.load_encoder(file, stem="cifar")
    with pytest.raises(ValueError, match=r"--which \[\]: .* one encoder; leave --which out"):
        bt_fast.load_encoder(file, which=[])


@pytest.mark.parametrize("to,suffix", [("timm", "pth"), ("safetensors", "safetensors")])
def test_exports_record_the_stem(to, suffix, tmp_path, capsys, refused):
    model = with_stem("solo-learn")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    out = tmp_path / f"out.{suffix}"
    export = ["export", str(tmp_path / "w.pth"), "--to", to, "--out", str(out)]
    assert main([*export, "--stem", "solo-learn"]) == 0
    assert "resnet18, solo-learn stem" in capsys.readouterr().out
    assert torch.equal(features(bt_fast.load_encoder(out), 20), features(model, 20))
    if to == "safetensors":
        assert load_file(out).keys() == model.state_dict().keys() - {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match=r"--stem cifar: the stem of .* is solo-learn"):
        bt_fast.load_encoder(out, stem="cifar")
    if to == "timm":
        plain = with_stem("solo-learn")
        plain.load_state_dict(torch.load(out, weights_only=True), strict=False)
    detectron2 = ["--to", "detectron2", "--out", str(tmp_path / "d2.pth")]
    refused(main(["export", str(out), *detectron2]), "has no solo-learn stem")


def test_runs_record_the_stem(tmp_path):
    """A run's folder, its files, and its encoder moved elsewhere; also those of early versions."""
    run, moved = tmp_path / "run", tmp_path / "moved.safetensors"
    config = dataclasses.replace(RECIPES["demo"](), small_images=True, projector=(8,))
    model = BarlowTwins(config).eval()
    checkpoint.write(run, 1, (checkpoint.copied(model.state_dict()), {}), {}, keep=1)
    (run / "config.json").write_text(to_json(config))
    shutil.move(export_encoder(model, config, run), moved)
    early = tmp_path / "early.safetensors"
    save_file(model.encoder.state_dict(), early, {"architecture": "resnet18"})
    expected = features(model.encoder, 20)
    for file in (run, *run.glob("checkpoints/*/model.safetensors"), moved, early):
        assert torch.equal(features(bt_fast.load_encoder(file), 20), expected)
    save_file(model.encoder.state_dict(), run / "encoder.safetensors")
    assert torch.equal(features(bt_fast.load_encoder(run), 20), expected)
    (run / "config.json").write_text("{}")  # of another program
    with pytest.raises(ValueError, match="give --stem"):
        bt_fast.load_encoder(run / "encoder.safetensors")


class Custom(nn.Module):
    """A class of somebody's script."""


def script(path) -> None:
    with pytest.warns((FutureWarning, DeprecationWarning)):
        torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), path)


def changed(**tensors) -> dict[str, torch.Tensor]:
    return WEIGHTS | {name.replace("__", "."): value for name, value in tensors.items()}


NOT_WEIGHTS = "cannot be read as weights: it was not written by torch, or it is truncated"


@pytest.mark.parametrize(
    "content,message",
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is not the folder of a run"),
        (lambda path: path.write_bytes(b""), NOT_WEIGHTS),
        (lambda path: path.write_bytes(b"\x02" * 99), NOT_WEIGHTS),
        (lambda path: path.write_bytes(b"a: 1\n"), NOT_WEIGHTS),
        (lambda path: np.savez(path.open("wb"), np.zeros(3)), NOT_WEIGHTS),
        (lambda path: tarfile.open(path, "w").close(), NOT_WEIGHTS),
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        (A, "a pickled torchvision.models.resnet.ResNet, and reading that could run code; where"),
        ({"model": Custom()}, "Custom, and reading that could run code; where it was"),
        (script, "it is a TorchScript archive, which contains code; save its weights alone"),
        ({"conv1.weight": torch.zeros(3)}, "no layer1.0.conv1.weight); its tensors: conv1.weight"),
        ({"epoch": 3}, "its tensors: none"),
        ({"a\nb": torch.zeros(3)}, "its tensors: a\\nb"),
        (changed(conv1__weight=torch.zeros(64, 1, 7, 7)), "is [64, 1, 7, 7] instead of"),
        (changed(conv1__weight=torch.zeros(64, 3, 5, 5)), "is [64, 3, 5, 5] instead of"),
        (changed(conv1__weight=torch.zeros(64)), "conv1.weight is [64] instead"),
        (changed(conv1__weight=WEIGHTS["conv1.weight"].to(torch.int8)), "is torch.int8"),
        (changed(conv2__weight=torch.zeros(64, 64, 3, 3)), "it also has conv2.weight"),
        (changed(bn1__bias=torch.zeros(3)), "bn1.bias is [3] instead of [64]"),
        (changed(layer1__0__se__fc__weight=torch.zeros(4, 64)), "it also has layer1.0.se.fc"),
        ({k: v for k, v in WEIGHTS.items() if k != "bn1.weight"}, "it lacks bn1.weight"),
        ({k: v for k, v in WEIGHTS.items() if "layer4.1" not in k}, "stages have (2, 2, 2, 1)"),
        ({k: v for k, v in WEIGHTS.items() if k != "conv1.weight"}, "it lacks conv1.weight"),
        (
            {k.replace("conv1.weight", "conv1.0.weight", k == "conv1.weight"): v
             for k, v in WEIGHTS.items()},
            "it also has conv1.0.weight",
        ),
        (
            torchvision.models.resnext50_32x4d().state_dict(),
            "layer1.0.conv1.weight is [128, 64, 1, 1] instead of [64, 64, 1, 1]",
        ),
    ],
)  # fmt: skip
def test_what_is_no_encoder_is_refused_for_what_it_is(content, message, tmp_path, refused):
    file = tmp_path / "w.pth"
    content(file) if isinstance(content, types.FunctionType) else torch.save(content, file)
    out = tmp_path / "out.pth"
    refused(main(["export", str(file), "--to", "timm", "--out", str(out)]), message)
    assert not out.exists()


def test_dictionaries_that_contain_themselves_end(tmp_path):
    content: dict = collections.OrderedDict(WEIGHTS)
    content["self"] = content
    for number in range(40):  # 2^40 paths
        content = {"a": content, "b": content, "number": number}
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(features(bt_fast.load_encoder(tmp_path / "w.pth")), EXPECTED["A"])


@pytest.mark.parametrize("early", [False, True])
def test_the_authors_checkpoint_has_its_projector(early, tmp_path, monkeypatch):
    """The optimizer state of early ones refers to a function of main.py, which is not called."""

    def exclude_bias_and_norm(p):
        raise AssertionError("a function of the file was called")

    model = BarlowTwins(Config(encoder="resnet18", projector=(32, 48, 16)))
    weights = under("module.backbone", WEIGHTS)
    weights |= under("module.projector", model.projector.state_dict())
    weights["module.bn.running_mean"] = torch.zeros(16)
    optimizer: dict = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    if early:
        function = types.FunctionType(exclude_bias_and_norm.__code__, {}, "exclude_bias_and_norm")
        function.__module__, function.__qualname__ = "__main__", "exclude_bias_and_norm"
        main_module = sys.modules["__main__"]
        monkeypatch.setattr(main_module, "exclude_bias_and_norm", function, raising=False)
        optimizer["param_groups"][0]["lars_adaptation_filter"] = function
    torch.save({"epoch": 9, "model": weights, "optimizer": optimizer}, tmp_path / "w.pth")
    monkeypatch.undo()
    found = read_pretrained(tmp_path / "w.pth", projector=True)
    assert torch.equal(features(found.encoder.eval()), EXPECTED["A"])
    assert [m.out_features for m in found.projector if hasattr(m, "out_features")] == [32, 48, 16]
    assert read_pretrained(tmp_path / "w.pth").projector is None


def test_collapse_needs_the_papers_projector(tmp_path, small_beton, capsys):
    torch.save(ONE["VICReg"], tmp_path / "w.pth")
    flags = ["--data", str(small_beton), "--device=cpu", "--size=32", "--workers=1"]
    assert main(["eval", "knn", str(tmp_path / "w.pth"), *flags]) == 0
    assert main(["eval", "knn", str(tmp_path / "w.pth"), *flags, "--collapse"]) == 2
    assert "a projector of another architecture than the paper's" in capsys.readouterr().err


WINDOWS = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "pthread_sigmask"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "O_NONBLOCK", "fork", "pread", "sched_getaffinity"):
    delattr(os, name)
import bt_fast
from bt_fast.cli import main
file, out = sys.argv[1:]
print(type(bt_fast.load_encoder(file)).__name__)
for command in (["export", file, "--to=timm", "--out", out], ["pretrain"], ["eval", "knn", file]):
    print(main(command))
"""


@pytest.mark.slow
def test_weights_need_neither_locks_nor_signals(tmp_path):
    """As on Windows: what Python lacks there is removed before the first import."""
    torch.save(WEIGHTS, tmp_path / "w.pth")
    done = run_python("-c", WINDOWS, tmp_path / "w.pth", tmp_path / "o.pth")
    lines = done.stdout.splitlines()
    assert [lines[0], *lines[-3:]] == ["ResNet", "0", "2", "2"], done.stderr
    assert done.stderr.count("this command needs Linux") == done.stderr.count("\n") == 2
    assert torch.equal(features(bt_fast.load_encoder(tmp_path / "o.pth")), EXPECTED["A"])
