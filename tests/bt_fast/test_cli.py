"""The command line: a user error is one line and a non-zero exit; nothing is overwritten."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from bt_fast import authors_flags
from bt_fast.cli import main, parse_pretrain
from bt_fast.config import differences, from_json, to_json
from bt_fast.distributed.launcher import Placement, several_machines
from bt_fast.recipes import RECIPES
from pipelines.branches import VIEW_A


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--val-data", "nowhere.beton"], "--val-data nowhere.beton does not exist"),
        (["--batch-size", "1"], "--batch-size must be at least 2"),
        (["--batch-size", "65"], "--batch-size 65 is more than the 64 images"),
        (["--min-scale", "1.5"], "--min-scale must be in (0, 1]"),
        (["--projector", "64", "0"], "--projector needs positive widths"),
        (["--gpus", "32", "--batch-size", "48"], "does not divide by 32 ranks"),
        (["--gpus", "16", "--batch-size", "16"], "is less than 2 for each of 16 ranks"),
        (["--loader", "dali", "--cache-gb", "1"], "--cache-gb needs --loader native: dali"),
        (["--resume", "nowhere"], "--resume nowhere is not the folder of a run"),
        (["--view-a.blur", "7"], "blur must be a probability"),
        (["--resolution", "160:200"], "multiples of 32"),
        (["--resolution", "224:160"], "--resolution is LOW:HIGH"),
        (["--seed", "99999999999999999999"], "--seed must fit into 64 bits"),
    ],
)
def test_a_wrong_flag_is_one_line(small_beton, capsys, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    arguments = ["pretrain", "--recipe", "demo", "--data", str(small_beton), "--device", "cpu"]
    status = main([*arguments, *flags])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not os.listdir(tmp_path)


MAIN_PY = """/data/imagenet/ --epochs 1000 --batch-size 2048 --learning-rate-weights 0.2
 --learning-rate-biases 0.0048 --weight-decay 1e-6 --lambd 0.0051 --projector 8192-8192-8192
 --print-freq 100 --checkpoint-dir c --workers 8"""
EVALUATE_PY = "/data r.pth --weights finetune --train-percent 1 --lr-backbone 0.005"
AUTHORS = "docs/coming-from-barlowtwins.md"


@pytest.mark.parametrize(
    "command,end,parts",
    [
        ("pretrain --projector 8192-8192-8192", AUTHORS, ["--projector 8192 8192 8192"]),
        ("pretrain --projector=64,32", AUTHORS, ["--projector 64,32 is --projector 64 32"]),
        ("pretrain --learning_rate_biases=1", AUTHORS, ["--learning-rate-biases is --lr-biases"]),
        ("pretrain --scale-loss 0.024", AUTHORS, ["--scale-loss is --lr-biases, for its effect"]),
        ("pretrain x.beton --epochs 9", AUTHORS, ["DIR (x.beton) is --data x.beton;"]),
        (
            f"pretrain {MAIN_PY}",
            AUTHORS,
            ["DIR (/data/imagenet/) is --data out.beton, after bt-convert /data/imagenet/"]
            + ["--learning-rate-weights is --lr-weights", "--checkpoint-dir is --run-dir"]
            + ["--print-freq is --log-every", "--projector 8192 8192 8192"],
        ),
        ("eval linear d r.pth --lr-classifier 1", AUTHORS, ["--lr-classifier is --lr of"]),
        (
            f"eval semi {EVALUATE_PY}",
            AUTHORS,
            ["--weights is bt-fast eval linear (freeze)", "--percent of"],
        ),
        ("pretrain --foo 1 2", "--help", ["--foo"]),  # of neither program
        ("pretrain --epoch 3 x", "--help", ["--epoch"]),
        ("pretrain --workers", "--help", ["--workers"]),
        ("pretrain --epoch 3", "--help", ["perhaps you meant --epochs"]),
        ("pretrain --epochs many", "--help", ["--epochs: invalid"]),
        ("export run --out x.pth", "--help", ["--to is missing"]),
    ],
)
def test_what_does_not_parse_is_one_line_with_the_way_out(command, end, parts, refused):
    assert refused(main(command.split()), *parts).endswith(f"{end}\n")


@pytest.mark.parametrize("name", [*authors_flags.MAIN, *authors_flags.EVALUATE])
def test_the_document_lists_the_authors_flags(name):
    document = (ROOT / "docs" / "coming-from-barlowtwins.md").read_text()
    assert re.search(rf"`[^`]*{name}[ `]", document)


@pytest.mark.parametrize("num_gpus", [0, 2, 8])
@pytest.mark.parametrize(
    "flags,words",
    [
        ("--gpus 32", "--gpus 32 --run-dir SHARED_FOLDER"),
        ("--run_dir=x --gpus=32", "--run_dir=x --gpus=32"),
        ("--gpus 32 --resume x", "--gpus 32 --resume x"),
    ],
)
def test_the_suggested_command_has_every_flag(flags, words, num_gpus):
    placement = Placement(num_ranks=32, num_local_gpus=num_gpus, srun=None, on_gpus=True)
    message, command = several_machines(flags.split(), placement, 8).splitlines()
    assert command.endswith(f"-m bt_fast.cli pretrain {words}")
    num_machines = 16 if num_gpus == 2 else 4
    assert f"has {num_gpus or 'no'} GPUs" in message
    assert f"on each of {num_machines} machines" in message
    assert f"--nnodes {num_machines} --nproc-per-node {32 // num_machines} " in command


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--batch-size", "12"], "or run the same command on a machine with 3 GPUs"),
        ([], "--batch-size 2048 does not divide by 3 ranks"),
        (["--batch-size", "3"], "--batch-size 3 is less than 2 for each of 3 ranks"),
    ],
)
def test_more_gpus_than_there_are_for_one_machine(flags, message, capsys, monkeypatch, tmp_path):
    """Data and folder may be on other machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["pretrain", "--gpus", "3", *flags]) == 2
    assert not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_commands_and_help(capsys):
    assert main([]) == main(["train"]) == 2
    assert main(["--help"]) == 0
    assert "bt-convert" in capsys.readouterr().out


def test_a_used_run_directory_is_not_touched(small_beton, tmp_path, refused):
    (tmp_path / "mine.txt").write_text("precious")
    arguments = ["pretrain", "--recipe", "demo", "--data", str(small_beton), "--batch-size", "16"]
    refused(main([*arguments, "--device", "cpu", "--run-dir", str(tmp_path)]), "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_dry_run_prints_the_plan_and_writes_nothing(small_beton, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["pretrain", "--recipe", "demo", "--data", str(small_beton), "--batch-size", "16"]
    assert main([*arguments, "--size", "32", "--device", "cpu", "--dry-run"]) == 0
    assert "64 images, 4 classes" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


def test_flags_come_after_the_recipe():
    config = parse_pretrain(["--recipe", "cifar10", "--epochs", "7"])
    assert (config.encoder, config.epochs) == ("resnet18", 7)
    assert parse_pretrain(["--epochs=7", "--recipe=demo", "--recipe=cifar10"]) == config
    assert parse_pretrain([]) == RECIPES["imagenet"]()


def test_the_default_recipe_is_the_papers():
    config = parse_pretrain([])
    assert (config.epochs, config.batch_size, config.projector) == (1000, 2048, (8192,) * 3)
    assert (config.lr_weights, config.lr_biases, config.weight_decay) == (0.2, 0.0048, 1.5e-6)
    assert (config.lambd, config.grad_scale, config.warmup_epochs) == (5e-3, 1 / 16, 10)
    assert (config.view_a.blur, config.view_b.blur) == (1.0, 0.1)
    assert (config.view_a.solarize, config.view_b.solarize) == (0.0, 0.2)


def test_the_resolution_grows_by_epoch_to_the_last():
    config = parse_pretrain(["--resolution", "160:224", "--epochs", "100", "--size", "96"])
    sizes = [config.view_size(epoch) for epoch in range(100)]
    assert config.size == 224 and sizes == sorted(sizes)
    assert {size: sizes.count(size) for size in sizes} == {160: 25, 192: 50, 224: 25}
    assert config.view_size(100) == 224  # a step past the end
    assert parse_pretrain(["--resolution=64:64", "--epochs=1"]).view_size(0) == 64
    assert parse_pretrain(["--resolution=32:64", "--epochs=1"]).view_size(0) == 64


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_configuration_reads_back(name, tmp_path):
    config = RECIPES[name]()
    assert config.recipe == name
    assert from_json(to_json(config), tmp_path) == config


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 3}', '{"view_a": 3}', '{"epochs": 0}'])
def test_a_damaged_configuration_is_one_clear_error(text, tmp_path):
    with pytest.raises(ValueError):
        from_json(text, tmp_path / "config.json")


def test_renamed_flags_are_hidden_aliases(tmp_path, capsys):
    config = parse_pretrain(["--patience", "5"])
    assert config.timeout == 5
    saved = to_json(config).replace("timeout", "patience")
    assert from_json(saved, tmp_path) == config
    with pytest.raises(SystemExit):
        parse_pretrain(["--help"])
    assert "patience" not in capsys.readouterr().out


def test_what_a_resumed_run_may_change():
    """Where and how it is computed, never what is learned."""
    config = RECIPES["demo"]()
    mutable = {"data": Path("x"), "gpus": 2, "device": "cuda", "norm": "fused", "keep": 9}
    learned = {"seed": 1, "epochs": 99, "batch_size": 32, "precision": "bf16", "view_a": VIEW_A}
    for name, value in (mutable | learned).items():
        flags = list(differences(replace(config, **{name: value}), config))
        expected = [f"--{name.replace('_', '-')}"]
        if name == "view_a":
            expected = ["--view-a.blur", "--view-a.jitter", "--view-a.grayscale"]
        assert flags == (expected if name in learned else [])
