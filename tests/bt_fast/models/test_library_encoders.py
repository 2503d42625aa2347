"""Encoders of timm and torchvision by name, against the libraries' own."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_runs import TINY, learned, pretrain, same
from torch import nn
from torch._dynamo.testing import CompileCounter

import bt_fast
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.export.encoder_files import read_pretrained
from bt_fast.models import batch_norm
from bt_fast.models.batch_norm import RunningStatistics
from bt_fast.models.library_encoders import DropPath, DropPaths, build_library_encoder
from bt_fast.models.networks import BarlowTwins
from bt_fast.optimizers import build_optimizer
from bt_fast.recipes import RECIPES

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    "name", ["regnety_002", "mobilenetv3_small_050", "levit_128s", "convnext_atto"]
)
def test_two_views_in_one_call_are_two_calls_of_timms_model(name):
    """With batch norms alone, with an activation, of rows of tokens; and with none."""
    size = 224 if name == "levit_128s" else 64
    ours = build_library_encoder(f"timm/{name}", size=size, per_view=True).double().train()
    theirs = timm.create_model(name, num_classes=0).double().train()
    theirs.load_state_dict(ours.state_dict())
    views = [torch.randn(3, 3, size, size, dtype=torch.float64) for _ in range(2)]
    expected = torch.cat([theirs(view) for view in views])
    features = ours(torch.cat(views))
    assert torch.allclose(features, expected, rtol=1e-9, atol=1e-9)
    assert features.shape[1] == ours.feature_width
    for key, wanted in theirs.state_dict().items():
        value = ours.state_dict()[key].double()
        assert torch.allclose(value, wanted.double(), rtol=1e-9, atol=1e-9), key
    weight = torch.randn_like(features)
    (features * weight).sum().backward()
    (expected * weight).sum().backward()
    for key, p in theirs.named_parameters():
        gradient = ours.get_parameter(key).grad
        assert torch.allclose(gradient, p.grad, rtol=1e-7, atol=1e-9), key
    views = torch.cat(views)
    assert torch.allclose(ours.eval()(views), theirs.eval()(views), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name,width",
    [
        ("timm/vit_tiny_patch16_224", 192),
        ("timm/resnetv2_50d_evos", 2048),
        ("torchvision/regnet_x_400mf", 400),
        ("torchvision/efficientnet_b0", 1280),
        ("torchvision/vit_b_16", 768),
        ("torchvision/vgg11_bn", 4096),
    ],
)
def test_the_classifier_is_removed(name, width):
    encoder = build_library_encoder(name, size=32, per_view=True)
    assert encoder.feature_width == width
    assert encoder(torch.randn(4, 3, 32, 32)).shape == (4, width)
    assert not any(p.shape[0] == 1000 for p in encoder.parameters())


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("timm/vit_tny", {}, "timm has no such model"),
        ("timm/vit_tiny_patch16", {}, "similar: .*vit_tiny_patch16_224"),
        ("torchvision/convnext", {}, "similar: convnext_"),
        ("torchvision/fcn_resnet50", {}, "torchvision has no such model"),
        ("torchvision/squeezenet1_0", {}, "no linear classifier"),
        ("timm/vit_tiny_patch16_224", {"size": 8}, "does not take images of 8 px|cannot be built"),
        ("torchvision/vit_b_16", {"size": 40}, "cannot be built|does not take images of 40 px"),
        ("timm/densenet121", {"drop_path": 0.1}, "has no stochastic depth"),
        ("torchvision/vgg11", {"drop_path": 0.1}, "has no stochastic depth"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_library_encoder(name, **{"size": 32, **options})
    assert name in str(error.value) and "\n" not in str(error.value)


class CumulativeNorm(nn.Module):
    """A norm over the batch of another kind, as timm's EvoNorm-B and InplaceABN are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(1))


@pytest.mark.parametrize(
    "layer",
    [CumulativeNorm(), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm3d(4),
     nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, track_running_stats=False)],
    ids=lambda layer: f"{layer}",
)  # fmt: skip
def test_a_norm_over_the_batch_that_cannot_be_per_view_is_an_error(layer):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    with pytest.raises(ValueError, match=f"1 is a {type(layer).__name__}, a norm over the batch"):
        batch_norm.convert_to_per_view(model, "timm/some")


def test_norms_that_are_not_over_the_batch_stay():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4))
    before = [type(layer) for layer in model]
    batch_norm.convert_to_per_view(model, "timm/some")
    assert [type(layer) for layer in model] == before


def test_running_statistics_keep_every_layers_momentum():
    layers = nn.Sequential(*(batch_norm.BatchNorm1d(4, momentum=m) for m in (0.1, 0.01, 0.3)))
    alone, x = copy.deepcopy(layers), torch.randn(8, 4)
    statistics = RunningStatistics(layers)
    assert torch.equal(layers(x), alone(x))
    statistics.update(torch.tensor(True))
    for key, value in alone.state_dict().items():
        assert torch.equal(layers.state_dict()[key], value), key


def draws(rate: float, step: int, num_images: int, rank: int = 0, seed: int = 0) -> torch.Tensor:
    """Factors [2 n, layers] of three layers."""
    model = nn.Sequential(*(DropPath(rate) for _ in range(3)), nn.Linear(1, 1))
    paths = DropPaths(model, seed=seed, rank=rank)
    paths.draw(step, num_images)
    paths.use()
    return torch.stack([layer.scale for layer in model[:3]], 1)


def test_dropped_paths_depend_on_seed_step_sample_and_view_only():
    whole = draws(0.5, step=7, num_images=32)
    halves = [draws(0.5, step=7, num_images=16, rank=rank) for rank in (0, 1)]
    for view in (0, 1):
        rows = torch.cat([half.chunk(2)[view] for half in halves])
        assert torch.equal(rows, whole.chunk(2)[view])
    others = [draws(0.5, 8, 32), draws(0.5, 7, 32, seed=1), whole.flip(1), whole.roll(32, 0)]
    assert not any(torch.equal(whole, other) for other in others)
    many = draws(0.2, step=0, num_images=20_000)
    assert set(many.unique().tolist()) == {0.0, 1.25}
    assert many.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.015)  # four deviations: 0.010


def test_drop_path_rates_grow_linearly_and_evaluation_keeps_all_paths():
    encoder = build_library_encoder("torchvision/convnext_tiny", size=32, drop_path=0.17)
    rates = [layer.rate for layer in encoder.modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.01 * index for index in range(18)])
    x = torch.randn(2, 3, 32, 32)
    without = build_library_encoder("torchvision/convnext_tiny", size=32)
    without.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder.eval()(x), without.train()(x))
    swin = build_library_encoder("timm/swin_tiny_patch4_window7_224", size=32)  # timm's is 0.1
    assert not any(layer.rate for layer in swin.modules() if isinstance(layer, DropPath))


def test_drawing_paths_does_not_compile_again():
    model = nn.Sequential(nn.Linear(4, 4), DropPath(0.5))
    paths, counter = DropPaths(model, seed=0), CompileCounter()
    compiled, x = torch.compile(model, backend=counter, dynamic=False), torch.ones(8, 4)
    outputs, addresses = [], set()
    for step in range(4):
        paths.draw(step, 4)
        paths.use()
        addresses.add(model[1].scale.data_ptr())
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], model[0](x) * model[1].scale[:, None])
    assert counter.frame_count == 1
    assert len(addresses) == 1  # which CUDA graphs record
    assert not torch.equal(outputs[0], outputs[1])


def test_embeddings_of_positions_have_no_weight_decay():
    config = replace(RECIPES["demo"](), encoder="timm/vit_tiny_patch16_224", size=32)
    model = BarlowTwins(replace(config, projector=(8,)))
    weights, biases = build_optimizer("adamw", model, 0.05).param_groups
    ids = {id(p) for p in biases["params"]}
    assert {id(model.encoder.pos_embed), id(model.encoder.cls_token)} <= ids
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.05, 0.0)
    assert id(model.encoder.blocks[0].mlp.fc1.weight) not in ids
    weights, _ = build_optimizer("lars", model, 0.05).param_groups  # whose biases' rate is small
    assert id(model.encoder.pos_embed) in {id(p) for p in weights["params"]}


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--encoder", "vit_small"), "--encoder is one of resnet18, .* timm/NAME or torchvision"),
        (("--encoder", "timm/convnext_atto", "--small-images"), "--small-images is the stem of"),
        (("--encoder", "resnet18", "--drop-path", "0.1"), "resnet18 has no stochastic depth"),
        (("--encoder", "timm/convnext_atto", "--drop-path", "1"), r"must be in \[0, 1\), got 1"),
        (
            ("--encoder", "timm/vit_tiny_patch16_224", "--resolution", "32:64"),
            "does not take images of 32 px",
        ),
    ],
)
def test_flags_that_do_not_fit_the_encoder(flags, message):
    with pytest.raises(ValueError, match=message):
        BarlowTwins(parse_pretrain([*TINY, *flags]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "regnety_002"])
def test_a_run_resumes_exactly_and_its_encoder_is_known_everywhere(
    small_beton, tmp_path, capsys, name
):
    flags = ["--data", small_beton, "--encoder", f"timm/{name}", "--drop-path", 0.2, "--size", 32]
    flags += ["--optimizer", "adamw", "--lr-weights", 1e-3, "--lr-biases", 1e-3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain(*flags, "--run-dir", whole, "--max-steps", 5) == 0
    assert pretrain(*flags, "--run-dir", parts, "--max-steps", 3) == 0
    assert main(["pretrain", "--resume", str(parts), "--max-steps", "5"]) == 0
    assert same(learned(whole), learned(parts))

    x, export = torch.randn(2, 3, 32, 32), tmp_path / "timm.pth"
    encoder = bt_fast.load_encoder(whole)
    assert main(["export", str(whole), "--to", "timm", "--out", str(export)]) == 0
    hint = capsys.readouterr().out.partition("load it with: ")[2].strip()
    scope = {"timm": timm, "torch": torch}
    exec(hint, scope)
    last = whole / "checkpoints/step-00000005/model.safetensors"
    with torch.no_grad():
        expected = encoder(x)
        for other in (export, whole / "encoder.safetensors", last):
            assert torch.equal(bt_fast.load_encoder(other)(x), expected), other
        assert torch.equal(scope["model"].eval()(x), expected)
    assert main(["export", str(whole), "--to", "detectron2", "--out", str(tmp_path / "d.pth")]) == 2
    assert "use --to timm" in capsys.readouterr().err
    for random in ([], ["--random"]):
        assert main(["eval", "knn", str(whole), "--device=cpu", *random]) == 0
    out = tmp_path / "features.npy"
    assert bt_fast.embed(whole, out=out, device="cpu") == out

    # Started from its own weights, without metadata, step 0 has the file's features.
    bare = tmp_path / "bare.pth"
    torch.save({**encoder.state_dict(), "head.fc.weight": torch.ones(7, 3)}, bare)
    config = replace(parse_pretrain([*TINY, *map(str, flags)]), init=bare)
    model = build(config).model.eval()
    with torch.no_grad():
        assert torch.allclose(model.encoder(x), expected, rtol=1e-4, atol=1e-5)  # channels-last
    with pytest.raises(ValueError, match=r"bare\.pth does not hold a timm/vit_small_patch16_224"):
        build(replace(config, encoder="timm/vit_small_patch16_224"))


def test_a_teacher_is_not_taken_for_its_student(tmp_path):
    name, size = "timm/vit_tiny_patch16_224", 32
    encoders = {part: build_library_encoder(name, size=size) for part in ("student", "teacher")}
    weights = {
        f"{part}.backbone.{key}": value
        for part, encoder in encoders.items()
        for key, value in encoder.state_dict().items()
    }
    file = tmp_path / "w.pth"
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"2 different encoders \(student, teacher\)"):
        read_pretrained(file, library=(name, size))
    found = read_pretrained(file, library=(name, size), which="teacher").encoder.state_dict()
    expected = encoders["teacher"].state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_model_without_batch_norm_trains(small_beton, tmp_path):
    flags = ["--encoder", "timm/vit_tiny_patch16_224", "--size", 32, "--projector", 16]
    assert pretrain(*flags, "--data", small_beton, "--run-dir", tmp_path / "run") == 0


def test_blocks_of_parts_of_images_have_no_drop_path():
    layer = DropPath(0.1).train()
    layer.scale = torch.ones(4)
    with pytest.raises(ValueError, match="rows are parts of images"):
        layer(torch.ones(8, 3))
