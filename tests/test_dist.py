"""Any number of ranks: the loss, batch norm and whole updates against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_beton
from ranks import run_ranks
from safetensors.torch import load_file

from bt_fast import loss, norm, train
from bt_fast.cli import main, parse_pretrain
from bt_fast.config import Config
from bt_fast.dist import Traffic, World, require_same_weights
from bt_fast.feed import feed
from bt_fast.job import build
from bt_fast.launch import elsewhere, first_host
from bt_fast.model import BarlowTwins
from bt_fast.plan import count
from bt_fast.signals import EXIT_STOPPED

TINY = [
    "--recipe=demo", "--device=cpu", "--precision=fp32", "--encoder=resnet18", "--size=32",
    "--batch-size=16", "--projector", "32", "32", "--epochs=3", "--warmup-epochs=1",
    "--workers=1", "--probe-every=0", "--log-every=1", "--lr-weights=0.5",
]  # fmt: skip


def embeddings(n: int, d: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n * d)
    scale = torch.logspace(-1, 1, d, dtype=torch.float64)
    shared = torch.randn(n, d, dtype=torch.float64, generator=generator)
    noise = [torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2)]
    return [((shared + 0.7 * part) * scale + 2).requires_grad_() for part in noise]


SHAPES = [(16, 40), (64, 12), (8, 8)]


def sharded_losses(world: World, dtype: torch.dtype) -> list:
    results = []
    for n, d in SHAPES:
        for method in ("gram", "columns", "auto"):
            rows = slice(world.rank * n // world.size, (world.rank + 1) * n // world.size)
            z = [part.detach()[rows].to(dtype).requires_grad_() for part in embeddings(n, d)]
            with Traffic() as traffic:
                value = loss.barlow_twins_loss(*z, lambd=0.1, group=world.group, method=method)
                value.backward()
            grads = torch.stack([part.grad for part in z])
            results.append((value.detach(), grads, dict(traffic.calls), dict(traffic.bytes)))
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_every_sharded_form_equals_the_dense_one(size):
    ranks = run_ranks(size, sharded_losses, torch.float64)
    for case, (n, d) in enumerate((n, d) for n, d in SHAPES for _ in range(3)):
        z = embeddings(n, d)
        expected = loss.barlow_twins_loss(*z, lambd=0.1, method="dense")
        expected.backward()
        wanted = torch.stack([part.grad for part in z])
        assert all(
            rank[case][0].item() == pytest.approx(expected.item(), rel=1e-12) for rank in ranks
        )
        grads = torch.cat([rank[case][1] for rank in ranks], dim=1)
        assert (grads - wanted).norm() <= 1e-11 * wanted.norm()


def test_embeddings_travel_once_in_the_dtype_they_have():
    """gram: one gather of both views, one sum of a scalar, one of [2, D] for the gradient."""
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        _, _, calls, sent = run_ranks(2, sharded_losses, dtype)[0][0]
        n, d = SHAPES[0]
        assert calls == {"all_gather": 1, "all_reduce": 2}
        assert sent["all_gather"] == 1 * 2 * (n // 2) * d * itemsize
        assert sent["all_reduce"] == 4 + 2 * d * 4


def sharded_norm(world: World, x: torch.Tensor, grad: torch.Tensor, group_size: int) -> tuple:
    layer = norm.BatchNorm2d(x.shape[2])
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(3))
    norm.over_ranks(layer, world.subgroup(group_size))
    share = slice(
        world.rank * x.shape[1] // world.size, (world.rank + 1) * x.shape[1] // world.size
    )
    part = x[:, share].flatten(0, 1).requires_grad_()
    with Traffic() as traffic:
        y = layer(part)
        torch.relu_(y).backward(grad[:, share].flatten(0, 1))
    grads = part.grad.unflatten(0, (2, -1)), layer.weight.grad, layer.bias.grad
    return y.detach().unflatten(0, (2, -1)), *grads, layer.running_var, traffic.calls.total()


@pytest.mark.parametrize("size,group_size", [(2, 0), (4, 0), (4, 2)])
def test_batch_norm_over_ranks_equals_one_over_the_whole_batch(size, group_size):
    """Also of batch norm in groups: as many processes as there are groups."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 3, 3) * 2 + torch.arange(8).view(1, 8, 1, 1, 1)
    grad = torch.randn_like(x)
    ranks = run_ranks(size, sharded_norm, x, grad, group_size)
    num_groups = size // (group_size or size)
    alone = World(rank=0, size=1, local_rank=0, local_size=1)
    wanted = [
        sharded_norm(alone, part.clone(), part_grad, 0)
        for part, part_grad in zip(x.chunk(num_groups, 1), grad.chunk(num_groups, 1), strict=True)
    ]
    for index in (0, 1):  # outputs, input gradients
        ours = torch.cat([rank[index] for rank in ranks], 1)
        theirs = torch.cat([group[index] for group in wanted], 1)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for index in (2, 3):  # every rank has its share of the gradients of weight and bias
        assert torch.allclose(
            sum(rank[index] for rank in ranks), sum(group[index] for group in wanted), atol=1e-4
        )
    assert torch.allclose(ranks[0][4], wanted[0][4], rtol=1e-5)
    assert all(rank[5] == 2 for rank in ranks)  # one collective forwards, one backwards


def updates(world: World, data: str, num_steps: int) -> dict:
    """Train for some steps: loss and gradients of the first, weights after the last."""
    job = build(parse_pretrain([*TINY, "--data", data]), world)
    branches = job.config.view_a, job.config.view_b
    terms, gradients = [], {}
    original = job.optimizer.step

    def step(**arguments):
        if not gradients:
            named = job.model.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named})
        return original(**arguments)

    job.optimizer.step = step
    for views in feed(job.loader.batches(0, num_steps), branches, job.performance):
        train.set_learning_rates(job, 4)
        invariance, redundancy, applied = train.update(job, views)
        assert applied
        terms.append((invariance + 5e-3 * redundancy).item())
    return {"terms": terms, "gradients": gradients, "state": dict(job.model.state_dict())}


@pytest.mark.parametrize("size", [2, 4])
def test_ten_updates_are_the_same_on_any_number_of_ranks(tmp_path, size):
    data = str(write_beton(tmp_path / "data.beton", 160))
    alone = updates(World(rank=0, size=1, local_rank=0, local_size=1), data, 10)
    ranks = run_ranks(size, updates, data, 10)
    for rank in ranks:
        assert rank["terms"][0] == pytest.approx(alone["terms"][0], rel=1e-6)
        for name, wanted in alone["gradients"].items():
            tolerance = 1e-5 * wanted.norm() + 1e-9
            assert (rank["gradients"][name] - wanted).norm() <= tolerance, name
        for name, wanted in alone["state"].items():
            wanted, ours = wanted.float(), rank["state"][name].float()
            assert (ours - wanted).norm() <= 1e-4 * wanted.norm() + 1e-5, name
            assert torch.equal(ours, ranks[0]["state"][name].float()), name


def collectives_of_the_papers_model(world: World) -> dict:
    model = BarlowTwins("resnet50", (64, 64, 64))
    norm.over_ranks(model, world.group)
    with Traffic() as traffic:
        z_a, z_b = model(torch.randn(4, 3, 32, 32)).chunk(2)
        loss.barlow_twins_loss(z_a, z_b, group=world.group).backward()
    return dict(traffic.calls)


def test_collectives_of_a_step_of_the_papers_model():
    """55 batch norms, two each; three of the loss. (SyncBN as shipped and two calls: 224.)"""
    calls = run_ranks(2, collectives_of_the_papers_model)[0]
    assert calls == {"all_gather": 55 + 1, "all_reduce": 55 + 2}


def weights_that_differ(world: World, differ: bool) -> str:
    layer = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    if differ and world.rank == 1:
        with torch.no_grad():
            layer.bias[2] = 1e-30
    try:
        require_same_weights(layer, world.group)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_whose_weights_differ_is_named():
    assert run_ranks(2, weights_that_differ, False) == ["", ""]
    for told in run_ranks(2, weights_that_differ, True):
        assert "the weights of ranks [1] are no longer those of rank 0" in told


def newest(folder) -> dict[str, torch.Tensor]:
    path = max((folder / "checkpoints").glob("step-????????"))
    return load_file(path / "model.safetensors") | {
        f"momentum {name}": value
        for name, value in load_file(path / "optimizer.safetensors").items()
    }


@pytest.fixture(scope="module")
def two_ranks(small_beton, tmp_path_factory):
    """An uninterrupted run of 12 steps on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    done = start("--data", small_beton, "--run-dir", folder, "--gpus", 2)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert output.count("step 12/12") == 1 and "8 on each of 2 ranks" in output
    return folder


def start(*flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bt_fast.cli", "pretrain", *TINY, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_one_command_trains_on_two_ranks_as_one_process_does(two_ranks, small_beton, tmp_path):
    flags = ["--data", str(small_beton), "--run-dir", str(tmp_path / "one"), "--gpus", "1"]
    assert main(["pretrain", *TINY, *flags]) == 0
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (two_ranks, tmp_path / "one")
    ]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=2e-3)


def wait_for(process, path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(process) -> list[int]:
    """Process numbers of the ranks that a launching process started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def test_a_killed_rank_is_started_again_from_the_newest_checkpoint(
    two_ranks, small_beton, tmp_path
):
    folder = tmp_path / "run"
    process = start("--data", small_beton, "--run-dir", folder, "--gpus", 2, "--save-every", 1)
    wait_for(process, folder / "checkpoints" / "step-00000003")
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resuming" in output
    wanted, ours = newest(two_ranks), newest(folder)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_signal_to_any_rank_stops_all_at_the_same_step(two_ranks, small_beton, tmp_path):
    folder = tmp_path / "run"
    process = start("--data", small_beton, "--run-dir", folder, "--gpus", 2, "--save-every", 1)
    wait_for(process, folder / "checkpoints" / "step-00000003")
    os.kill(ranks_of(process)[-1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert f"bt-fast pretrain --resume {folder}" in output
    again = subprocess.run(
        [sys.executable, "-m", "bt_fast.cli", "pretrain", "--resume", folder, "--gpus", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    wanted, ours = newest(two_ranks), newest(folder)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--gpus", "3"], "--batch-size 16 does not divide by 3 ranks"),
        (["--gpus", "16"], "is less than 2 for each of 16 ranks"),
        (["--gpus", "2", "--data", "nowhere.beton"], "--data nowhere.beton does not exist"),
    ],
)
def test_what_cannot_be_launched_is_one_line(small_beton, tmp_path, capsys, flags, message):
    arguments = ["pretrain", *TINY, "--data", str(small_beton), "--run-dir", str(tmp_path / "r")]
    assert main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_another_number_of_ranks_than_torchruns_is_refused(small_beton, capsys, monkeypatch):
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert main(["pretrain", *TINY, "--data", str(small_beton), "--gpus", "2"]) == 2
    assert "--gpus 2, but 4 ranks were started" in capsys.readouterr().err


def test_more_gpus_than_a_machine_has_is_told_how(small_beton, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    flags = ["--data", str(small_beton), "--gpus", "32", "--batch-size", "64"]
    assert main(["pretrain", *flags, "--device=auto"]) == 2
    error = capsys.readouterr().err
    assert "torchrun --nnodes 4 --nproc-per-node 8" in error and "each of 4 machines" in error
    assert "--nnodes 2" in elsewhere(["--gpus", "9"], 9, 8)


def test_slurms_host_lists():
    assert first_host("gpu[03-05,9],x") == "gpu03"
    assert first_host("gpu7") == "gpu7"
    assert first_host("a,b[1-2]") == "a"


def test_32_gpus_elsewhere_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--gpus", "32"]) == 2
    error = capsys.readouterr().err
    assert "type this on each of 32 machines" in error and "--gpus 32" in error
    assert not list(tmp_path.iterdir())


def test_the_plan_of_any_number_of_ranks(tmp_path, monkeypatch, capsys, small_beton):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--gpus", "32", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in (
        "32, each 64 of 2048 images", "assuming ImageNet-1k", "1281167 images", "1000 epochs x 625",
        "gram form over 2048 x 8192", "gradients 1,353 MB, embeddings 65.0 MB", "not measured",
    ):  # fmt: skip
        assert part in " ".join(output.replace("│", " ").split()), part
    flags = ["--recipe", "demo", "--data", str(small_beton), "--batch-size", "16", "--gpus", "4"]
    assert main(["pretrain", "--dry-run", *flags]) == 0
    assert "4, each 4 of 16 images" in capsys.readouterr().out
    assert main(["pretrain", "--dry-run", "--gpus", "7"]) == 2
    assert "does not divide by 7 ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_what_the_paper_says():
    parameters, layers, flop, saved = count(Config())
    assert parameters == 174_535_744 and layers == 55
    assert flop / 2 == pytest.approx(3 * 2 * (4.09e9 + 0.151e9), rel=0.03)  # a view, both ways
    assert 60e6 < saved < 120e6
