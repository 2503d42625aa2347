"""--init: the features of step 0 are those of the file."""

import shutil

import pytest
import torch
import torchvision
from tiny_runs import TINY, pretrain

import bt_fast
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.models.networks import build_projector


def random_resnet(seed: int):
    torch.manual_seed(seed)
    model = torchvision.models.resnet18()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)
    return model


def released_checkpoint(widths, folder):
    """As the authors' main.py saves it under DDP."""
    projector = build_projector((512, *widths))
    parts = {"backbone": random_resnet(1), "projector": projector}
    weights = {
        f"module.{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
        if not name.startswith("fc.")
    }
    torch.save({"epoch": 7, "model": weights}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth", projector


def features(encoder, images):
    with torch.no_grad():
        return encoder.eval()(images)


@pytest.mark.parametrize("widths", [(32, 32), (64, 64)])
def test_a_released_checkpoint_and_its_projector_if_it_fits(small_beton, tmp_path, widths):
    file, projector = released_checkpoint(widths, tmp_path)
    setup = build(parse_pretrain([*TINY, "--data", str(small_beton), "--init", str(file)]))
    images = torch.randn(3, 3, 32, 32)
    encoders = setup.model.encoder, bt_fast.load_encoder(file)
    ours, theirs = (features(encoder, images) for encoder in encoders)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)  # channels-last, and not
    fits = widths == (32, 32)
    ours, theirs = setup.model.projector.state_dict(), projector.state_dict()
    if fits:
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    expected = "encoder and projector of" if fits else "its projector has other widths"
    assert expected in setup.initial_weights


def test_torchvisions_weights_train_and_resume(small_beton, tmp_path, capsys):
    file = tmp_path / "tv.pth"
    torch.save(random_resnet(2).state_dict(), file)
    flags = ["--data", small_beton, "--init", file, "--probe-every", 0]
    assert pretrain(*flags, "--run-dir", tmp_path / "run", "--max-steps", 1) == 0
    assert "no projector of this form" in " ".join(capsys.readouterr().out.split())
    file.unlink()  # the run has its own weights now
    assert main(["pretrain", "--resume", str(tmp_path / "run"), "--max-steps", "2"]) == 0


def test_a_run_that_is_killed_before_its_first_checkpoint_starts_again_from_the_file(
    small_beton, tmp_path
):
    """As Slurm does, which starts the first job, too, by --resume."""
    file = tmp_path / "tv.pth"
    torch.save(random_resnet(2).state_dict(), file)
    flags = ["--data", small_beton, "--init", file, "--probe-every", 0, "--max-steps", 1]
    assert pretrain(*flags, "--run-dir", tmp_path / "run") == 0
    first = bt_fast.load_encoder(tmp_path / "run").state_dict()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    resume = ["pretrain", "--resume", str(tmp_path / "run")]
    assert main(resume) == 2  # its result would be deleted
    (tmp_path / "run" / "encoder.safetensors").unlink()
    assert main(resume) == 0
    again = bt_fast.load_encoder(tmp_path / "run").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_projector_with_nan_is_refused(small_beton, tmp_path, refused):
    file, _ = released_checkpoint((32, 32), tmp_path)
    content = torch.load(file)
    content["model"]["module.projector.0.weight"][0] = float("nan")
    torch.save(content, file)
    flags = ["--data", small_beton, "--init", file]
    refused(pretrain(*flags, "--run-dir", tmp_path / "run"), "0.weight")


def test_another_encoder_is_refused(small_beton, tmp_path, capsys):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    flags = ["--data", small_beton, "--init", tmp_path / "r34.pth"]
    assert pretrain(*flags, "--run-dir", tmp_path / "run") == 2
    assert "holds a resnet34 with the imagenet stem, the run has" in capsys.readouterr().err
