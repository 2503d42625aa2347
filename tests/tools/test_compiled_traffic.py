"""tools/compiled_traffic.py: what it counts, and the bytes of a bottleneck of each stage.

Nothing is compiled or run, and no GPU is needed. Each measurement is made in a process of its own.
"""

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton", reason="Inductor's GPU code needs triton")

from triton import language as tl  # noqa: E402

from bt_fast.models import batch_norm  # noqa: E402
from tools import lowering  # noqa: E402
from tools.lowering import Kernel, Traffic  # noqa: E402

SHAPE = (512, 3, 224, 224)  # both views of 256 images
# By version of torch, in GB: what the fused and own kernels of a network with one bottleneck per
# stage move, every access counted and every argument once; what is saved. The same on any number of
# ranks: nothing of an activation's size is added for them.
BOUNDS = {"2.11": (52.9, 54.4, 9.55), "2.14": (56.7, 59.0, 8.72)}
VERSION = ".".join(torch.__version__.split(".")[:2])


@triton.jit
def _doubling(x, y, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, 2 * tl.load(x + index, index < numel), index < numel)


@torch.library.triton_op("bt_fast_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), 1024),)
    torch.library.wrap_triton(_doubling)[grid](x, y, x.numel(), BLOCK=1024)
    return y


@torch.library.custom_op("bt_fast_test::with_sums", mutates_args=())
def with_sums(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.clone(), x.sum(1)


@torch.library.custom_op("bt_fast_test::count", mutates_args=("counter",))
def count(counter: torch.Tensor) -> None:
    counter.add_(1)


with_sums.register_fake(lambda x: (torch.empty_like(x), x.new_empty(len(x))))
count.register_fake(lambda counter: None)
doubled.register_autograd(lambda ctx, grad: doubled(grad))
with_sums.register_autograd(lambda ctx, grad, grad_sums: with_sums(grad)[0])


class OwnKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1024))
        self.register_buffer("counter", torch.empty(4096))

    def forward(self, x):
        count(self.counter)
        # The GPU's path: a model sees CUDA tensors.
        y, sums = with_sums(doubled(x * self.weight) if x.is_cuda else x * self.weight)
        return y + sums[:, None]


class Centred(nn.Module):
    """Reads x twice in one kernel: for the mean and then to subtract it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16384))

    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) * self.weight


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1024))

    def forward(self, x):
        return x[: len(x) // 2] * self.weight


class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x):
        return x.reshape(3, -1) * self.weight.of_no_use


def step(num_ranks: int, fused: bool = False, blocks: tuple[int, ...] = (1, 1, 1, 1)) -> Traffic:
    model = lowering.build(blocks=blocks)
    if fused:
        batch_norm.fuse(model)
    return lowering.measure(model, SHAPE, num_ranks=num_ranks)


def small(kind: type[nn.Module], shape: tuple[int, ...]) -> Traffic:
    with torch.device("meta"):
        model = kind()
    return lowering.measure(model, shape)


def error(*, tested: tuple[str, ...], moved: bool) -> str:
    """What a wrong model, or a right one where torch's internals have moved, raises."""
    removed = mock.patch.object(lowering.compile_fx, "view_to_reshape", None)
    with (
        mock.patch.object(lowering, "TESTED", tested),
        removed if moved else contextlib.nullcontext(),
    ):
        try:
            small(Half if moved else Wrong, (64, 1024))
        except Exception as found:
            return f"{type(found).__name__}: {found}"
    return ""


@pytest.fixture(scope="module")
def workers():
    """Processes with triton itself, of which the other tests use the interpreter."""
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        yield pool


@pytest.fixture(scope="module")
def steps(workers):
    return {num_ranks: workers.submit(step, num_ranks) for num_ranks in (1, 8)}


def result(future):
    try:
        return future.result()
    except lowering.Unsupported as unsupported:
        pytest.skip(str(unsupported))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_a_bottleneck_of_each_stage_moves_no_more_than_this(steps, num_ranks):
    if VERSION not in BOUNDS:
        pytest.skip(f"no bounds are known for torch {VERSION}")
    traffic = result(steps[num_ranks])
    accesses, once, saved = BOUNDS[VERSION]
    assert 0.5 * accesses < traffic.gigabytes() <= accesses
    assert traffic.gigabytes(once=True) <= once
    assert traffic.saved / 1e9 <= saved
    # 17 convolutions and 3 linear layers, each with a gradient of weights and one of its input.
    assert len(traffic.of("library", backward=False)) == 20
    assert bool(traffic.of("collective")) == (num_ranks > 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks,blocks", [(1, (3, 4, 6, 3)), (8, (1, 1, 1, 1))])
def test_fused_norms_pass_through_the_compiler_whole(workers, num_ranks, blocks):
    """Nothing of an activation's size is copied, filled or added beside them; and torch 2.11 must
    not print a deep network for each operator that is new to it."""
    traffic = result(workers.submit(step, num_ranks, True, blocks))
    most, saved = (101.5, 21.8) if num_ranks == 1 else (39.0, 9.0)
    assert 0.9 * most < traffic.gigabytes("custom") < most
    assert traffic.saved / 1e9 < saved
    # Weights' gradients, bf16 to float32: 1.05 GB with ResNet-50; and the pooled features'.
    assert traffic.gigabytes("fused", backward=True) < 1.3
    # Of a norm three passes over the batch; but 4 of them share all but their statistics with
    # another. With ranks, an all-reduce for each pass that sums.
    passes = 3 * sum(blocks) + 1 + 2
    own = [len(traffic.of("custom", backward=backward)) for backward in (False, True)]
    assert own == [2 * passes, 2 * passes]
    assert len(traffic.of("collective")) == (2 * passes if num_ranks > 1 else 0)


@pytest.mark.slow
def test_a_tensor_counts_in_every_loop_that_reads_it(workers):
    traffic = result(workers.submit(small, Centred, (4096, 16384)))
    (kernel,) = traffic.of(backward=False)
    x, y, weight = 4096 * 16384 * 2, 4096 * 16384 * 4, 16384 * 4
    means = 4096 * 2  # kept for the backward pass
    assert 2 * x + y + weight <= kernel.accesses <= 2 * x + y + weight + 2 * means
    assert x + y + weight <= kernel.once <= x + y + weight + 2 * means
    assert traffic.saved == means


def test_a_slice_counts_what_is_read(workers):
    (kernel,) = result(workers.submit(small, Half, (4096, 1024))).of(backward=False)
    assert kernel.accesses == 2048 * 1024 * (2 + 4) + 1024 * 4
    assert kernel.once == 4096 * 1024 * 2 + 2048 * 1024 * 4 + 1024 * 4


def test_own_kernels_count(workers):
    traffic = result(workers.submit(small, OwnKernels, (2048, 1024)))
    own = {(k.name, k.backward): k for k in traffic.of("custom")}
    values, sums = 2048 * 1024 * 4, 2048 * 4
    expected = {
        ("_doubling", False): 2 * values,
        ("bt_fast_test.with_sums.default", False): 2 * values + sums,
        ("bt_fast_test.count.default", False): 4096 * 4,
        ("_doubling", True): 2 * values,
        ("bt_fast_test.with_sums.default", True): 2 * values,  # its sums are not used
    }
    assert {key: kernel.accesses for key, kernel in own.items()} == expected
    assert all(isinstance(kernel, Kernel) for kernel in traffic.of("fused"))
    assert traffic.gigabytes("custom") == pytest.approx(sum(expected.values()) / 1e9)


@pytest.mark.slow
def test_a_wrong_model_fails_and_a_version_that_differs_says_so(workers):
    tested = (f"{VERSION}.",)
    wrong = workers.submit(error, tested=(), moved=False)
    moved = workers.submit(error, tested=(), moved=True)
    known = workers.submit(error, tested=tested, moved=True)
    assert wrong.result() and not wrong.result().startswith("Unsupported")
    assert moved.result().startswith(f"Unsupported: torch {torch.__version__}: TypeError")
    assert known.result() and not known.result().startswith("Unsupported")
