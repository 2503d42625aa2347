"""Runs end to end on a CPU: what they leave behind, exact resume, and steps that are skipped."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import with_torchs_batch_norm, write_beton
from PIL import Image
from safetensors.torch import load_file

from bt_fast import train
from bt_fast.cli import main, parse_pretrain
from bt_fast.evaluate.features import extract_features
from bt_fast.feed import distort
from bt_fast.job import build, rehearse
from bt_fast.run_directory import RunDirectory
from bt_fast.signals import EXIT_STOPPED
from pipelines import augment

# Seconds-long runs: a small encoder on small views.
TINY = [
    "--recipe=demo", "--device=cpu", "--encoder=resnet18", "--size=32", "--batch-size=16",
    "--projector", "32", "32", "--epochs=3", "--warmup-epochs=1", "--workers=2",
    "--probe-every=2", "--log-every=2",
]  # fmt: skip


def pretrain(*flags) -> int:
    return main(["pretrain", *TINY, *map(str, flags)])


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(records: list[dict]) -> list[dict]:
    """Without what a clock says."""
    drop = ("images_per_s", "seconds")
    return [{k: v for k, v in record.items() if k not in drop} for record in records]


def learned(folder) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    newest = max((folder / "checkpoints").iterdir())
    return {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in load_file(newest / f"{name}.safetensors").items()
    }


@pytest.fixture(scope="module")
def finished(small_beton, tmp_path_factory):
    """An uninterrupted run of 12 steps: 3 epochs of 4."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert pretrain("--data", small_beton, "--run-dir", folder, "--save-every", 1) == 0
    return folder


def test_a_run_leaves_everything_in_its_directory(finished):
    records = metrics(finished)
    train_steps = [record["step"] for record in records if record["kind"] == "train"]
    assert train_steps == [1, 2, 4, 6, 8, 10, 12]
    for record in records:
        if record["kind"] == "train":
            expected = record["invariance"] + 5e-3 * record["redundancy"]
            assert record["loss"] == pytest.approx(expected)
            assert record["images_per_s"] > 0 and record["skipped"] == 0
    probes = [record for record in records if record["kind"] == "probe"]
    assert [record["step"] for record in probes] == [0, 8, 12]
    assert all(0 <= record["knn_20"] <= 1 and 0 <= record["knn_200"] <= 1 for record in probes)
    for name in ("views.png", "curves.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 300 and len(np.unique(np.array(picture))) > 20
    assert json.loads((finished / "config.json").read_text())["projector"] == [32, 32]
    assert json.loads((finished / "environment.json").read_text())[0]["torch"]
    assert any((finished / "tensorboard").iterdir())
    assert len(list((finished / "checkpoints").iterdir())) == 2


def test_the_exported_encoder_has_torchvisions_names(finished):
    from torchvision.models import resnet18

    missing, unexpected = resnet18().load_state_dict(
        load_file(finished / "encoder.safetensors"), strict=False
    )
    assert not unexpected and set(missing) == {"fc.weight", "fc.bias"}


def test_the_same_seed_gives_the_same_run(small_beton, finished, tmp_path):
    assert pretrain("--data", small_beton, "--run-dir", tmp_path / "again", "--keep", 1) == 0
    first, second = learned(finished), learned(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_run(small_beton, finished, tmp_path):
    assert pretrain("--data", small_beton, "--run-dir", tmp_path / "b", "--seed", 1) == 0
    name = "model/encoder.conv1.weight"
    assert not torch.equal(learned(finished)[name], learned(tmp_path / "b")[name])


def start(*flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bt_fast.cli", "pretrain", *TINY, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, folder, step: int) -> None:
    """Until the checkpoint of `step` is there (runs save at every step in these tests)."""
    deadline = time.monotonic() + 120
    while not any((folder / "checkpoints").glob(f"step-{step:08d}")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(small_beton, finished, tmp_path):
    folder = tmp_path / "killed"
    step = random.randint(1, 9)
    process = start("--data", small_beton, "--run-dir", folder, "--save-every", 1)
    wait_for_step(process, folder, step)
    time.sleep(random.random() * 0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 1')  # a line the kill tore

    assert main(["pretrain", "--resume", str(folder)]) == 0
    first, second = learned(finished), learned(folder)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), f"killed at {step}"

    assert comparable(metrics(folder)) == comparable(metrics(finished))


def test_a_probe_lost_to_a_kill_is_made_up_for(small_beton, finished, tmp_path, monkeypatch):
    real, folder = train.probe, tmp_path / "run"

    def killed(job, log, step):
        if step == 8:
            raise RuntimeError("killed between checkpoint and probe")
        real(job, log, step)

    monkeypatch.setattr(train, "probe", killed)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain("--data", small_beton, "--run-dir", folder)
    monkeypatch.setattr(train, "probe", real)
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert comparable(metrics(folder)) == comparable(metrics(finished))


def test_damaged_checkpoints_do_not_push_out_new_ones(small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ("--data", small_beton, "--run-dir", folder, "--save-every", 1, "--probe-every", 0)
    assert pretrain(*flags, "--max-steps", 6) == 0
    for path in (folder / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"torn")
    assert main(["pretrain", "--resume", str(folder), "--max-steps", "2"]) == 0
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"step-00000001", "step-00000002", "step-00000005.damaged"} <= names


def test_a_signal_saves_and_says_how_to_go_on(small_beton, finished, tmp_path):
    folder = tmp_path / "stopped"
    process = start("--data", small_beton, "--run-dir", folder, "--save-every", 1)
    wait_for_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert f"bt-fast pretrain --resume {folder}" in output
    assert main(["pretrain", "--resume", str(folder)]) == 0
    assert all(torch.equal(v, learned(folder)[k]) for k, v in learned(finished).items())


def test_a_damaged_newest_checkpoint_is_passed_over(
    small_beton, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "torn"
    flags = ("--data", small_beton, "--run-dir", folder, "--save-every", 1, "--max-steps", 6)
    assert pretrain(*flags) == 0
    (folder / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"torn")
    monkeypatch.chdir(tmp_path)  # a run can be continued from any folder
    assert main(["pretrain", "--resume", str(folder), "--max-steps", "12"]) == 0
    output = capsys.readouterr().out
    assert "passed over: step-00000006" in output and "at step 5 of 12" in output
    assert all(torch.equal(v, learned(folder)[k]) for k, v in learned(finished).items())


def test_resuming_with_other_data_is_refused(small_beton, finished, tmp_path, capsys):
    other = write_beton(tmp_path / "other.beton", 32)
    assert main(["pretrain", "--resume", str(finished), "--data", str(other)]) == 2
    assert "is not what this run was trained on" in capsys.readouterr().err


def test_two_processes_cannot_share_a_run(small_beton, finished, capsys):
    with RunDirectory(finished):
        assert main(["pretrain", "--resume", str(finished)]) == 2
    assert "in use by another" in capsys.readouterr().err


def test_a_step_that_is_not_finite_changes_nothing(small_beton, tmp_path):
    job = build(parse_pretrain([*TINY, "--data", str(small_beton)]))
    train.set_learning_rates(job, 5)
    views = torch.randn(32, 3, 32, 32)
    assert train.update(job, views)[2]

    def state():
        momenta = [job.optimizer.state[p]["momentum"] for p in job.model.parameters()]
        tensors = [*job.model.parameters(), *momenta, job.statistics]
        return [tensor.detach().clone() for tensor in tensors]

    before = state()
    views[19, 0, 0, 0] = float("nan")
    assert not train.update(job, views)[2]
    assert all(map(torch.equal, state(), before))
    views[19, 0, 0, 0] = 0.0
    assert train.update(job, views)[2]
    assert not any(map(torch.equal, state(), before))


def test_a_run_of_nothing_but_skipped_steps_ends(small_beton, tmp_path, monkeypatch, capsys):
    real = train.feed

    def poisoned(*arguments):
        return (views * float("nan") for views in real(*arguments))

    monkeypatch.setattr(train, "feed", poisoned)
    flags = ("--data", small_beton, "--run-dir", tmp_path / "nan", "--probe-every", 0)
    assert pretrain(*flags) == 2
    captured = capsys.readouterr()
    assert "updates skipped" in captured.out
    assert "not finite" in captured.err and captured.err.count("\n") == 1


def test_rehearsal_leaves_no_trace(small_beton):
    arguments = [*TINY, "--data", str(small_beton)]
    job, untouched = (build(parse_pretrain(arguments)) for _ in range(2))
    assert rehearse(job)[32] > 0
    ours, theirs = job.model.state_dict(), untouched.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(p.grad is None for p in job.model.parameters())


def test_learning_happens(tmp_path):
    """Coloured squares: the loss falls."""
    data = write_beton(tmp_path / "data.beton", 96)
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--epochs", 10, "--probe-every", 0)
    assert pretrain(*flags) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert np.mean(losses[len(losses) // 2 :]) < 0.8 * losses[0]


def test_images_without_classes_train_without_probe(tmp_path):
    data = write_beton(tmp_path / "data.beton", 20, num_classes=1)
    flags = ("--data", data, "--run-dir", tmp_path / "run", "--epochs", 1)
    assert pretrain(*flags) == 0
    assert all(record["kind"] == "train" for record in metrics(tmp_path / "run"))


def test_eval_knn_equals_the_last_probe(finished, capsys):
    assert main(["eval", "knn", str(finished), "--device", "cpu"]) == 0
    last = [record for record in metrics(finished) if record["kind"] == "probe"][-1]
    assert f"{100 * last['knn_20']:.2f} %" in capsys.readouterr().out


def test_eval_knn_knows_the_starting_point(finished, capsys):
    assert main(["eval", "knn", str(finished), "--random", "--device", "cpu"]) == 0
    first = next(record for record in metrics(finished) if record["kind"] == "probe")
    output = capsys.readouterr().out
    assert "random initialisation" in output and f"{100 * first['knn_200']:.2f} %" in output


def test_views_that_grow_train_and_resume(small_beton, tmp_path):
    folder = tmp_path / "run"
    flags = ("--data", small_beton, "--run-dir", folder, "--resolution", "32:64")
    assert pretrain(*flags, "--max-steps", 6) == 0
    assert main(["pretrain", "--resume", str(folder), "--max-steps", "12"]) == 0
    assert pretrain(*flags[:-4], "--run-dir", tmp_path / "whole", "--resolution", "32:64") == 0
    first, second = learned(folder), learned(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_compiled_update_equals_an_eager_one(small_beton):
    """Both through one step and a skipped one: weights, momentum and statistics."""
    states = []
    for mode in ("off", "default"):
        flags = [*TINY, "--data", str(small_beton), "--precision=fp32", f"--compile={mode}"]
        job = build(parse_pretrain(flags))
        train.set_learning_rates(job, 8)
        torch.manual_seed(0)
        views = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
        terms = [train.update(job, views)[:2]]
        views[3, 0, 0, 0] = float("nan")
        assert not train.update(job, views)[2]
        momenta = [job.optimizer.state[p]["momentum"] for p in job.model.parameters()]
        states.append([*terms[0], job.statistics, *momenta, *job.model.parameters()])
    for eager, compiled in zip(*states, strict=True):
        assert (compiled - eager).norm() <= 2e-3 * eager.norm() + 1e-6


@pytest.mark.skipif(os.environ.get("BT_FAST_SKIP_SLOW") == "1", reason="BT_FAST_SKIP_SLOW=1")
def test_the_papers_model_runs_on_a_cpu(tmp_path):
    """ResNet-50, 224 px, projector 8192 x 3: two steps of batch 8."""
    data = write_beton(tmp_path / "data.beton", 16, sizes=((300, 400),))
    flags = ["--data", data, "--run-dir", tmp_path / "run", "--batch-size=8", "--max-steps=2"]
    flags += ["--device=cpu", "--probe-every=0"]
    assert main(["pretrain", *map(str, flags)]) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == 2 and all(np.isfinite(losses))


def reference_step(model, views, momenta, rates, *, lambd, weight_decay, grad_scale) -> None:
    """One update as the paper and the released code describe it, from scratch."""
    z_a, z_b = (model(view) for view in views)
    norm_a, norm_b = (
        (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b)
    )
    correlation = norm_a.T @ norm_b / len(z_a)
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    loss = ((1 - correlation.diagonal()) ** 2).sum() + lambd * (off_diagonal**2).sum()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
            update = gradient * grad_scale
            if parameter.ndim > 1:
                update = update + weight_decay * parameter
                norms = parameter.norm(), update.norm()
                if norms[0] > 0 and norms[1] > 0:
                    update = update * (1e-3 * norms[0] / norms[1])
            momentum.mul_(0.9).add_(update)
            parameter.sub_(rates[parameter.ndim > 1] * momentum)


def test_the_loop_trains_as_the_paper_says(small_beton):
    """Every wire between the rooms: views, loss, scale, rates, decay, momentum, statistics."""
    flags = ["--encoder=resnet18", "--size=32", "--batch-size=16", "--projector", "24", "24"]
    flags += ["--epochs=12", "--precision=fp32", "--device=cpu", "--weight-decay=0.02"]
    flags += ["--lr-weights=3", "--lr-biases=0.5", "--lambd=0.02"]
    job = build(parse_pretrain(["--data", str(small_beton), *flags]))
    model = with_torchs_batch_norm(job.model)
    start = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    for batch in job.loader.batches(0, 4):
        rate = 16 / 256 * batch.step / 40  # linear warm-up: 10 epochs of 4 steps
        views = [
            augment.apply(images, augment.draw(branch, keys), dtype=torch.float32)
            for images, branch, keys in zip(
                batch.views, (augment.VIEW_A, augment.VIEW_B), batch.keys, strict=True
            )
        ]
        reference_step(
            model, views, momenta, {True: 3 * rate, False: 0.5 * rate},
            lambd=0.02, weight_decay=0.02, grad_scale=1 / 16,
        )  # fmt: skip
        rates = train.set_learning_rates(job, batch.step)
        assert rates == pytest.approx({"lr_weights": 3 * rate, "lr_biases": 0.5 * rate})
        branches = job.config.view_a, job.config.view_b
        assert train.update(job, distort(batch, branches, job.performance))[2]
    for before, ours, theirs in zip(start, job.model.parameters(), model.parameters(), strict=True):
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() <= 2e-3 * moved + 1e-9
    for name, buffer in model.named_buffers():
        assert torch.allclose(job.model.get_buffer(name), buffer, rtol=1e-3, atol=1e-5)


def test_a_probe_sees_single_images_and_leaves_no_trace(small_beton):
    job = build(parse_pretrain([*TINY, "--data", str(small_beton)]))
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    samples = np.arange(12)
    settings = {"size": 32, "num_threads": 2}
    encoder, performance = job.model.encoder, job.performance
    whole = extract_features(encoder, job.reader, samples, performance, crop=1.0, **settings)
    part = extract_features(encoder, job.reader, samples[3:5], performance, crop=1.0, **settings)
    closer = extract_features(encoder, job.reader, samples, performance, crop=0.5, **settings)
    assert torch.allclose(whole[3:5], part, atol=1e-2)  # bf16
    assert not torch.allclose(whole, closer, atol=1e-2)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
