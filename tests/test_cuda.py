"""Every CUDA path against its definition on the CPU. Needs a GPU and the kernels themselves:

TRITON_INTERPRET=0 pytest tests/test_cuda.py

Tests that compile take longer than all others together: -m "not compiled" leaves them out.
"""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, photographs, write_beton
from norm_forms import (
    FORMS,
    assert_equal_steps,
    assert_equals_definition,
    assert_repeats_bitwise,
    assert_sums_complete,
    batches_of_views,
    make_step,
)
from ranks import free_port
from safetensors.torch import load_file
from tiny_runs import learned, metrics, same

from bt_fast import loss, train
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.lars import LARS, can_fuse
from bt_fast.prefetch import prefetch
from bt_fast.runtime import choose_runtime
from pipelines import augment
from pipelines.beton import BetonReader
from pipelines.beton.writer import BetonWriter
from pipelines.crop import RandomResizedCrop
from pipelines.loading.choose import open_loader
from pipelines.order import view_keys

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU and TRITON_INTERPRET=0", allow_module_level=True)

CUDA = torch.device("cuda")
STRONG = augment.Branch(blur=0.5, solarize=0.5, grayscale=0.3, jitter=0.9)
TINY = [
    "--recipe=demo", "--encoder=resnet18", "--size=32", "--batch-size=16", "--projector", "32",
    "32", "--epochs=3", "--warmup-epochs=1", "--workers=2", "--probe-every=0", "--log-every=2",
]  # fmt: skip

COMPILED = [
    pytest.param(mode, marks=pytest.mark.compiled) for mode in ("default", "reduce-overhead")
]


def full_float32() -> None:
    """Differences from the CPU should be the path's, not TF32's."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def grey_levels(views: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    std = torch.tensor(augment.IMAGENET_STD).view(3, 1, 1)
    return ((views.cpu().float() - expected.float()) * std * 255).abs()


def require_the_definitions_views(function, branch, height: int, width: int) -> None:
    """At most 1 grey level in the mean and 3 anywhere, of 255; and no element left unwritten."""
    pictures = [np.array(photo.resize((width, height))) for photo in photographs(16)]
    images = torch.from_numpy(np.stack(pictures))
    parameters = augment.draw(branch, view_keys(np.arange(16), seed=1, epoch=0, view=0))
    expected = augment.apply(images, parameters, dtype=torch.float32)
    there = images.to(CUDA)
    torch.full((16, 3, height, width), torch.nan, device=CUDA)  # what memory may hold
    views = function(there, parameters, dtype=torch.float32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    difference = grey_levels(views, expected)
    assert difference.mean() <= 1 and difference.max() <= 3


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 47), (105, 52), (160, 192), (1, 5)])
@pytest.mark.parametrize("branch", [augment.VIEW_A, augment.VIEW_B, STRONG])
def test_fused_views_equal_the_definition(size, branch):
    from pipelines.augment import triton as augment_triton

    require_the_definitions_views(augment_triton.apply, branch, *size)


@pytest.mark.compiled
@pytest.mark.parametrize("size", [(224, 224), (33, 47)])
def test_compiled_views_equal_the_definition(size):
    function = torch.compile(augment.apply, dynamic=False)

    def compiled(images, parameters, dtype):
        return function(images, parameters.to(CUDA), dtype=dtype)

    require_the_definitions_views(compiled, STRONG, *size)


def test_fused_lars_equals_the_definition_in_double():
    shapes = [(64, 3, 7, 7), (64,), (2000, 3000), (5,), (40_001,), (1, 7), (3, 3), (256, 64, 1, 1)]
    ours = [torch.randn(shape, device=CUDA).requires_grad_() for shape in shapes]
    ours[0].data = ours[0].data.to(memory_format=torch.channels_last)
    theirs = [p.detach().double().cpu().requires_grad_() for p in ours]
    fused, plain = LARS(ours, 0.1, weight_decay=1e-2), LARS(theirs, 0.1, weight_decay=1e-2)
    assert can_fuse(ours) and not can_fuse(theirs)
    for step in range(5):
        bad = step == 3
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step - 2)
            q.grad = p.grad.double().cpu()
        if bad:
            ours[2].grad[-1, -1] = theirs[2].grad[-1, -1] = torch.inf
        for optimizer, device in ((fused, CUDA), (plain, "cpu")):
            applied = optimizer.step(guard=torch.ones((), device=device))
            assert bool(applied) == (not bad)
        for p, q in zip(ours, theirs, strict=True):
            assert (p.double().cpu() - q).norm() <= 1e-5 * q.norm()


def test_fused_lars_repeats_bit_for_bit():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        parameters = [torch.randn(3000, 3000, device=CUDA), torch.randn(77, device=CUDA)]
        optimizer = LARS([p.requires_grad_() for p in parameters], 0.1)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(parameters)
    assert all(map(torch.equal, *results))


# Fused batch norm.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [(64, 256, 56, 56), (16, 2048, 7, 7), (16, 64, 112, 112), (6, 67, 7, 5)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_fused_norms_equal_the_definition_in_double(form, shape, dtype):
    assert_equals_definition(form, shape, dtype, CUDA)
    torch.cuda.empty_cache()  # other processes test beside this one


@pytest.mark.parametrize("channels,num_rows", [(64, 16_384), (256, 8192), (2048, 1600), (70, 5000)])
def test_fused_norms_add_the_parts_of_all_programs(channels, num_rows):
    """With the queue full and memory busy, so that a missing fence would show."""
    source = torch.zeros(2**28, device=CUDA)  # 1 GiB
    target, other_stream = torch.empty_like(source), torch.cuda.Stream()

    def keep_busy(launch: int) -> None:
        if launch % 100 == 0:
            torch.cuda._sleep(50_000_000)  # 25 ms: the launches that follow are queued meanwhile
        with torch.cuda.stream(other_stream):
            target.copy_(source)

    assert_sums_complete(
        channels, num_rows, torch.bfloat16, CUDA, launches=1500, before_launch=keep_busy
    )
    torch.cuda.synchronize()


@pytest.mark.parametrize("form", FORMS)
def test_fused_norms_repeat_bit_for_bit(form):
    for shape in ((32, 256, 28, 28), (6, 67, 7, 5)):
        assert_repeats_bitwise(form, shape, torch.bfloat16, CUDA, repetitions=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compile", COMPILED)
def test_a_compiled_fused_step_equals_the_eager_one(compile, dtype):
    """Several, since graphs are recorded at the second step and replayed after it."""
    full_float32()

    def wrap(model):
        return torch.compile(model, dynamic=False, mode=compile)

    step = make_step(is_fused=True, dtype=dtype, device=CUDA, wrap=wrap)
    assert_equal_steps(step, batches_of_views(5, 64, 64), dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fused_step_can_be_recorded_as_a_cuda_graph(dtype):
    full_float32()
    step = make_step(is_fused=True, dtype=dtype, device=CUDA)
    batches = batches_of_views(4, 64, 64)
    views, stream = batches[0].to(CUDA), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(views)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(views)

    def replay(batch: torch.Tensor) -> list[torch.Tensor]:
        views.copy_(batch)
        graph.replay()
        return found

    assert_equal_steps(replay, batches, dtype, CUDA)


def test_deterministic_fused_steps_repeat_bit_for_bit(small_beton):
    flags = [*TINY, "--data", str(small_beton), "--device=cuda", "--compile=off", "--norm=fused"]
    results = []
    try:
        for _ in range(2):
            setup = build(parse_pretrain([*flags, "--deterministic"]))
            for views in batches_of_views(5, 32, 32):
                train.set_learning_rates(setup, 8)
                train.update(setup, views.to(CUDA, memory_format=torch.channels_last))
            results.append([*setup.model.state_dict().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("method", ["dense", "gram"])
def test_the_loss_and_its_gradient(method):
    full_float32()
    z = [torch.randn(96, 300, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = loss.barlow_twins_loss(*z, method="dense")
    expected.backward()
    ours = [part.detach().float().to(CUDA).requires_grad_() for part in z]
    found = loss.barlow_twins_loss(*ours, method=method)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for part, other in zip(ours, z, strict=True):
        assert (part.grad.double().cpu() - other.grad).norm() <= 1e-4 * other.grad.norm()


def is_close(ours: torch.Tensor, theirs: torch.Tensor, change: torch.Tensor) -> bool:
    """Whether results of few small images, of other kernels in fp32, are equal up to rounding.

    ReLU's gradient jumps where rounding moves a value across 0: simulated relative errors of 1e-6
    in every layer changed single tensors by up to 8 %, rounding to TF32 by up to 17 %.
    """
    difference = ours.cpu().float() - theirs.float()
    return bool(difference.norm() <= 0.2 * change.float().norm() + 1e-5)


@pytest.mark.parametrize("norm", ["compiled", "fused"])
@pytest.mark.parametrize("compile", ["off", *COMPILED])
def test_updates_equal_those_of_the_cpu(small_beton, compile, norm, parts=1):
    """fp32, five updates of which the third is not finite."""
    flags = [*TINY, "--data", str(small_beton), "--precision=fp32"]
    flags += [f"--batch-size={16 * parts}", f"--accumulate={parts}"]
    on_gpu = ["--device=cuda", f"--compile={compile}", f"--norm={norm}"]
    gpu = build(parse_pretrain([*flags, *on_gpu]))
    cpu = build(parse_pretrain([*flags, "--device=cpu"]))
    full_float32()
    start = copy.deepcopy(cpu.model.state_dict())
    for step in range(5):
        views = torch.randn(32 * parts, 3, 32, 32).to(memory_format=torch.channels_last)
        views[5, 0, 0, 0] = torch.nan if step == 2 else 0.0
        for setup in (gpu, cpu):
            train.set_learning_rates(setup, 8)
            *terms, applied = train.update(setup, views.to(setup.runtime.device))
            assert bool(applied) == bool(torch.stack(terms).isfinite().all()) == (step != 2)
    ours, theirs = gpu.model.state_dict(), cpu.model.state_dict()
    for name, value in theirs.items():
        assert is_close(ours[name], value, value.float() - start[name].float()), name


@pytest.mark.compiled
def test_parts_of_a_batch_as_cuda_graphs(small_beton):
    """Gradients, terms of the loss and statistics of a part outlive the graphs of the next one."""
    test_updates_equal_those_of_the_cpu(small_beton, "reduce-overhead", "fused", parts=2)


@pytest.mark.parametrize("loader,tolerance", [("native", 0.02), ("dali", 0.05)])
def test_prefetch_returns_every_batch_in_order(small_beton, loader, tolerance):
    """While the encoder's stream is busy, so that a missing wait or reused memory would show."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    flags = [*TINY, "--data", str(small_beton), "--precision=fp32"]
    setups = [
        build(parse_pretrain([*flags, f"--device={device}", f"--loader={name}"]))
        for device, name in (("cuda", loader), ("cpu", "native"))
    ]
    branches = (augment.VIEW_A, augment.VIEW_B)
    sums = []
    for views in prefetch(setups[0].loader.batches(0, 40), branches, setups[0].runtime):
        torch.cuda._sleep(20_000_000)  # 10 ms: more than the host takes for a batch
        sums.append(views.double().sum((1, 2, 3)))  # enqueued after the work
    expected = [
        views.double().sum((1, 2, 3))
        for views in prefetch(setups[1].loader.batches(0, 40), branches, setups[1].runtime)
    ]
    assert len(sums) == len(expected) == 40
    scale = 3 * 32 * 32
    for ours, theirs in zip(sums, expected, strict=True):
        assert (ours.cpu() - theirs).abs().max() <= tolerance * scale


def test_loaders_of_a_process_follow_each_other(small_beton):
    """Each locks memory, perhaps at the addresses of the one before, and releases it."""
    flags = [*TINY, "--data", str(small_beton), "--device=cuda"]
    for _ in range(3):
        loader = build(parse_pretrain(flags)).loader
        cpu = open_loader("native", loader.sampler.dataset, loader.sampler.crop, batch_size=16)
        for ours, theirs in zip(loader.batches(0, 9), cpu.batches(0, 9), strict=True):
            assert ours.views.is_cuda and torch.equal(ours.views.cpu(), theirs.views)
        del loader, ours


@pytest.mark.parametrize("norm", ["compiled", "fused"])
@pytest.mark.parametrize("compile", ["off", COMPILED[0]])
def test_a_run_learns(small_beton, tmp_path, compile, norm):
    """No update is skipped, the loss falls, and the encoder's features are finite."""
    flags = [*TINY, "--data", str(small_beton), "--device=cuda", "--epochs=20", "--log-every=4"]
    run = tmp_path / "run"
    flags += [f"--compile={compile}", f"--norm={norm}", "--run-dir", str(run)]
    assert main(["pretrain", *flags]) == 0
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in steps]
    assert sum(losses[-5:]) < sum(losses[:5])  # batches are small: single losses vary by a third
    assert not any(line["skipped"] for line in steps)
    assert all(value.isfinite().all() for value in load_file(run / "encoder.safetensors").values())


def test_probes_and_evaluations(tmp_path):
    """All that reads features waits for them, and gets its images from other processes."""
    data, run = write_beton(tmp_path / "x.beton", 64), str(tmp_path / "run")
    write_beton(tmp_path / "x.val.beton", 30)
    flags = [*TINY, "--data", str(data), "--device=cuda", "--compile=off", "--probe-every=1"]
    assert main(["pretrain", *flags, "--run-dir", run]) == 0
    assert len([line for line in metrics(tmp_path / "run") if line["kind"] == "probe"]) == 4
    assert main(["eval", "all", run, "--percent=25", "--semi-epochs=1"]) == 0
    assert main(["eval", "linear", run, "--cached"]) == 0
    assert main(["embed", run, "--data", str(data), "--out", str(tmp_path / "features.npy")]) == 0


def test_dali_on_the_gpu_makes_natives_views(tmp_path):
    """nvJPEG and DALI's resize on whole photographs; the views stay on the GPU."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")

    pictures = photographs(16)
    with BetonWriter(tmp_path / "x.beton", num_samples=16, class_names=["a"]) as writer:
        for picture in pictures:
            writer.add(jpeg_bytes(picture), picture.height, picture.width, 0, "a")
    reader, crop = BetonReader(tmp_path / "x.beton"), RandomResizedCrop()
    native = open_loader("native", reader, crop, batch_size=8)
    dali = open_loader("dali", reader, crop, batch_size=8, device=torch.device("cuda", 0))
    for a, b in zip(native.batches(0, 20), dali.batches(0, 20), strict=True):
        assert b.views.is_cuda and np.array_equal(a.request.samples, b.request.samples)
        difference = (a.views.int() - b.views.cpu().int()).abs().float()
        assert difference.mean(dim=(2, 3, 4)).max() < 1


@pytest.mark.parametrize("norm", ["compiled", "fused"])
def test_no_step_waits_for_the_device(small_beton, tmp_path, monkeypatch, norm):
    """Neither at log lines nor at checkpoints; those of the first steps prepare memory."""
    update, finish, steps = train.update, train.finish, 0

    def counted(setup, views):
        nonlocal steps
        steps += 1
        if steps == 6:
            torch.cuda.set_sync_debug_mode("error")
        return update(setup, views)

    def finished(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        return finish(*arguments)

    monkeypatch.setattr(train, "update", counted)
    monkeypatch.setattr(train, "finish", finished)
    flags = [*TINY, "--data", str(small_beton), "--device=cuda", "--compile=off"]
    flags += [
        f"--norm={norm}",
        "--log-every=1",
        "--save-every=4",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    try:
        assert main(["pretrain", *flags]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 12


@pytest.mark.parametrize(
    "compile,norm",
    [
        ("off", "compiled"),
        ("off", "fused"),
        pytest.param("default", "compiled", marks=pytest.mark.compiled),
        pytest.param("auto", "fused", marks=pytest.mark.compiled),
    ],
)
def test_a_deterministic_run_resumes_bit_for_bit(small_beton, tmp_path, compile, norm):
    """Beside a whole run that compiles for itself: nothing was compiled before either."""
    flags = [*TINY, "--data", small_beton, "--deterministic", f"--norm={norm}"]
    flags += ["--device=cuda", f"--compile={compile}"]

    def pretrain(name, *more) -> subprocess.Popen:
        command = [sys.executable, "-m", "bt_fast.cli", "pretrain", *map(str, more)]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{name}-compiled")}
        return subprocess.Popen(command, env=os.environ | caches)

    uninterrupted = pretrain("whole", *flags, "--run-dir", tmp_path / "whole")
    stopped = pretrain("part", *flags, "--run-dir", tmp_path / "part", "--max-steps=7")
    assert stopped.wait() == 0
    assert pretrain("part", "--resume", tmp_path / "part", "--max-steps=12").wait() == 0
    assert uninterrupted.wait() == 0
    assert same(learned(tmp_path / "whole"), learned(tmp_path / "part"))


@pytest.mark.parametrize("norm", ["compiled", "fused"])
@pytest.mark.parametrize("compile", ["off", COMPILED[0]])
def test_a_group_of_one_rank_trains_over_nccl(small_beton, tmp_path, compile, norm):
    """Every collective of a step, on the one GPU that is there: the eager run without them."""
    rank = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "BT_FAST_GROUP_OF_ONE": 1}
    command = [sys.executable, "-m", "bt_fast.cli", "pretrain", *TINY, "--data", str(small_beton)]
    command += ["--device=cuda", "--precision=fp32", "--deterministic", "--max-steps=3"]
    command += [f"--norm={norm}"]
    full = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}  # no TF32, see `is_close`
    grouped = full | {name: str(value) for name, value in rank.items()}
    runs = [
        subprocess.Popen([*command, f"--compile={mode}", "--run-dir", tmp_path / name], env=env)
        for name, mode, env in (("alone", "off", full), ("grouped", compile, grouped))
    ]
    assert [run.wait() for run in runs] == [0, 0]
    expected, found = learned(tmp_path / "alone"), learned(tmp_path / "grouped")
    assert expected.keys() == found.keys()
    initial = build(parse_pretrain([*TINY, "--data", str(small_beton)])).model.state_dict()
    for name, value in expected.items():
        start = initial.get(name.removeprefix("model/"), torch.zeros(()))  # momenta are 0
        assert is_close(found[name], value, value.float() - start.cpu().float()), name


@pytest.mark.parametrize("compile", ["off", pytest.param("auto", marks=pytest.mark.compiled)])
def test_views_grow_on_a_gpu(small_beton, tmp_path, compile):
    flags = ["pretrain", *TINY, "--data", str(small_beton), "--device=cuda"]
    flags += [f"--compile={compile}"]
    assert main([*flags, "--run-dir", str(tmp_path / "run"), "--resolution=32:64"]) == 0


def test_bf16_is_chosen():
    assert choose_runtime("auto", "auto", "auto").precision == "bf16"
