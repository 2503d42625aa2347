"""The supervised protocols: training loop, continuation, error messages and results."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_runs import classifier, evaluate, failing, result, same
from torch.optim import lr_scheduler

from bt_fast.evaluate import supervised
from bt_fast.evaluate.eval_directory import EvalDirectory
from bt_fast.evaluate.eval_setup import build_setup, open_labelled_splits
from bt_fast.evaluate.options import EvalOptions
from bt_fast.evaluate.semi import class_balanced
from bt_fast.evaluate.subset import Subset, labelled_subset
from bt_fast.evaluate.supervised import Protocol
from bt_fast.export.encoder_files import load_encoder
from bt_fast.runtime import choose_runtime
from pipelines.order import epoch_order

COMMANDS = {
    "linear": ["linear", "--epochs=3", "--batch-size=24"],
    "cached": ["linear", "--cached", "--epochs=4", "--batch-size=24"],
    "semi": ["semi", "--percent=50", "--epochs=3", "--batch-size=12"],
}


def test_rates_drop_as_by_torchs_scheduler():
    """The cosine is in the test of the linear protocol."""
    protocol = Protocol(epochs=20, batch_size=256, lr_head=0.3, drops=(12, 16), factor=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], protocol.lr_head)
    scheduler = lr_scheduler.MultiStepLR(optimizer, protocol.drops, 0.2)
    for epoch in range(protocol.epochs):
        expected = optimizer.param_groups[0]["lr"]
        assert protocol.lr_head * protocol.lr_factor(epoch) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_linear_protocol_is_plain_sgd_on_frozen_features(labelled_run, tmp_path):
    assert evaluate(labelled_run, tmp_path, *COMMANDS["linear"]) == 0
    setup = build_setup(EvalOptions(run=labelled_run, device="cpu", precision="fp32"))
    train, val = open_labelled_splits(EvalOptions(run=labelled_run), setup.config)
    views = setup.views(train)
    head = torch.nn.Linear(512, 4)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(4, 512, generator=torch.Generator().manual_seed(0)))
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), 0.3, momentum=0.9, weight_decay=1e-6)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for epoch in range(3):
        order = epoch_order(64, 0, epoch)
        batches = views.random(order, min_scale=0.25, seed=0, epoch=epoch, batch_size=24)
        for number, images in enumerate(batches):
            labels = torch.from_numpy(train.labels[order[24 * number :][:24]])
            assert len(images) == (24, 24, 16)[number]  # no image is dropped
            with torch.no_grad():
                features = setup.encoder.eval()(images)
            optimizer.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()
        scheduler.step()
    saved = classifier(tmp_path)
    assert torch.allclose(saved["head.weight"], head.weight, atol=1e-6)
    assert torch.allclose(saved["head.bias"], head.bias, atol=1e-6)
    assert not torch.allclose(head.weight, torch.zeros(()), atol=1e-2)
    with torch.no_grad():
        (images,) = setup.views(val).central(np.arange(30), setup.crop)
        right = head(setup.encoder(images)).argmax(1) == torch.from_numpy(val.labels)
    assert result(tmp_path)["top1"] == pytest.approx(right.float().mean().item())


@pytest.mark.parametrize("command", ["linear", "semi"])
def test_only_fine_tuning_changes_the_encoder(command, labelled_run, tmp_path):
    before = load_encoder(labelled_run).state_dict()
    options = EvalOptions(run=labelled_run, device="cpu", precision="fp32", out=tmp_path)
    setup = build_setup(options)
    train, val = (labelled_subset(i) for i in open_labelled_splits(options, setup.config))
    tuned = command == "semi"
    protocol = Protocol(epochs=1, batch_size=24, lr_head=0.3, lr_encoder=0.1 if tuned else 0.0)
    supervised.train_classifier(setup, command, train, val, protocol)
    after = setup.encoder.state_dict()
    if tuned:
        for name in ("conv1.weight", "bn1.running_mean", "layer4.1.conv2.weight"):
            assert not torch.equal(after[name], before[name])
    else:
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert ("encoder.conv1.weight" in classifier(tmp_path)) is tuned


@pytest.mark.parametrize(
    "command,saves",  # cached: saves 1 to 4 are the grid's epochs, 5 the choice
    [
        *(("linear", 1), ("cached", 2), ("cached", 7)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("semi", 2), ("cached", 5))),
    ],
)
def test_interrupted_and_run_again_ends_the_same(command, saves, labelled_run, tmp_path, capsys):
    assert evaluate(labelled_run, tmp_path / "whole", *COMMANDS[command]) == 0
    with failing(EvalDirectory, "save", KeyboardInterrupt(), at=saves, after=True):
        assert evaluate(labelled_run, tmp_path / "again", *COMMANDS[command]) == 130
    assert not list((tmp_path / "again").glob("*/result.json"))
    assert evaluate(labelled_run, tmp_path / "again", *COMMANDS[command]) == 0
    assert same(classifier(tmp_path / "whole"), classifier(tmp_path / "again"))
    assert result(tmp_path / "whole") == result(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*/state.safetensors"))
    capsys.readouterr()
    assert evaluate(labelled_run, tmp_path / "again", *COMMANDS[command]) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_damaged_state_is_named(labelled_run, tmp_path, capsys, refused):
    with failing(EvalDirectory, "finish", KeyboardInterrupt()):
        assert evaluate(labelled_run, tmp_path, *COMMANDS["linear"]) == 130
    (state,) = tmp_path.glob("*/state.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    capsys.readouterr()
    refused(evaluate(labelled_run, tmp_path, *COMMANDS["linear"]), str(state), "delete it")


def test_other_settings_and_the_random_encoder_have_separate_folders(labelled_run, tmp_path):
    for flags in ([], ["--lr=0.1"], ["--random"], ["--seed=1"]):
        assert evaluate(labelled_run, tmp_path, "linear", "--epochs=1", *flags) == 0
    assert len(list(tmp_path.glob("linear-*/result.json"))) == 4


def test_every_held_out_image_counts_once():
    generator = torch.Generator().manual_seed(0)
    logits, samples = torch.randn(60, 9, generator=generator), np.arange(5, 58)
    labels = torch.randint(0, 9, (60,), generator=generator)
    views = SimpleNamespace(  # whose images are logits, in batches of 7
        central=lambda samples, crop: iter(logits[torch.from_numpy(samples)].split(7)),
        images=SimpleNamespace(labels=labels.numpy()),
        runtime=choose_runtime("cpu", "fp32", compile="off"),
    )
    top1, top5 = supervised.accuracy(torch.nn.Identity(), views, samples, 1.0)
    ranks = [sorted(range(9), key=lambda c: -logits[s, c]).index(int(labels[s])) for s in samples]
    assert top1 == pytest.approx(sum(rank == 0 for rank in ranks) / 53)
    assert top5 == pytest.approx(sum(rank < 5 for rank in ranks) / 53)
    assert 0 < top1 < top5 < 1


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_a_subset_has_the_same_percentage_of_every_class(percent):
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 5, 2000)
    chosen = class_balanced(labels, percent, seed=3)
    assert np.array_equal(chosen, np.unique(chosen)) and (labels[chosen] >= 0).all()
    for label in range(5):
        expected = round((labels == label).sum() * percent / 100)
        assert (labels[chosen] == label).sum() == expected
    assert np.array_equal(chosen, class_balanced(labels, percent, seed=3))
    assert not np.array_equal(chosen, class_balanced(labels, percent, seed=4))


def test_a_published_list_names_the_images(labelled_run, tmp_path, capsys, refused):
    names = [f"{index:03d}.jpg" for index in (0, 1, 2, 3, 8, 13)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    flags = ["semi", "--epochs=1", "--train-list", tmp_path / "list.txt", "--protocol=released"]
    assert evaluate(labelled_run, tmp_path / "out", *flags) == 0
    assert "6 images, those in" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("000.jpg\nn01440764_10026.JPEG\n")
    refused(evaluate(labelled_run, tmp_path / "out", *flags), "n01440764_10026.JPEG")


@pytest.mark.parametrize(
    "flags,message",
    [
        (["linear", "--epochs=0"], "--epochs must be at least 1"),
        (["linear", "--lr=-1"], "must lie in [0, 1e30)"),
        (["linear", "--lr=1e29"], "was not finite; lower the learning rates"),
        (["linear", "--data=nowhere.beton"], "--data nowhere.beton does not exist"),
        (["linear", "--min-scale=2"], "--min-scale must be in (0, 1]"),
        (["semi", "--percent=0"], "--percent must be in (0, 100]"),
        (["semi", "--train-list=nowhere.txt"], "--train-list nowhere.txt cannot be read"),
        (["knn", "--random", "--stem=cifar"], "is imagenet"),
        (["knn", "--stem=cifar"], "is imagenet"),
        (["transfer"], "--data is required"),
        (["transfer", "--data=.", "--dataset=voc07"], "does not hold VOC07"),
        (["transfer", "--data=.", "--dataset=places205"], "does not hold Places-205"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, message, labelled_run, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(evaluate(labelled_run, tmp_path / "out", *flags), message)


def test_a_file_of_weights_needs_data_and_then_works(labelled_run, tmp_path, capsys, refused):
    file = labelled_run / "encoder.safetensors"
    refused(evaluate(file, tmp_path, "linear"), "--data is required")
    flags = ["--data", labelled_run.parent / "train.beton", "--size=32", "--crop=1"]
    assert evaluate(file, tmp_path, "linear", "--epochs=1", *flags) == 0
    assert "resnet18, " in capsys.readouterr().out


def test_one_command_compares_random_and_pretrained(labelled_run, tmp_path, capsys):
    assert evaluate(labelled_run, tmp_path, "all", "--percent=25", "--semi-epochs=1") == 0
    table = capsys.readouterr().out.partition("bt-fast eval all")[2]
    assert "30 held-out images" in table and table.count("%") >= 6
    assert len(list(tmp_path.glob("*/result.json"))) == 4  # linear and semi, twice each


@pytest.mark.slow
def test_fine_tuning_skips_a_last_batch_of_one_image(labelled_run, tmp_path, capsys):
    """32 labelled images, whose last features are 1 x 1 pixel, in batches of 31."""
    assert evaluate(labelled_run, tmp_path, "semi", "--percent=50", "--batch-size=31") == 0
    assert "top-1 of 30" in capsys.readouterr().out


@pytest.mark.parametrize("of_train,of_val,shown", [(6, 5, True), (5, 6, True), (5, 5, False)])
def test_top_5_of_five_classes_is_not_shown(of_train, of_val, shown):
    train, val = (
        Subset(SimpleNamespace(num_classes=number), np.arange(9)) for number in (of_train, of_val)
    )
    rows = supervised.accuracy_rows({"top1": 0.5, "top5": 0.75}, train, val)
    assert rows == {"top-1 of 9": "50.00 %"} | ({"top-5": "75.00 %"} if shown else {})
