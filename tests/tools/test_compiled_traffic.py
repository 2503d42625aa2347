"""tools/compiled_traffic.py: what it counts, and the bytes of a bottleneck of each stage.

Nothing is compiled or run, and no GPU is needed. Each measurement is made in a process of its own.
"""

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
from tools.compiled_traffic import Traffic, build, measure  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(("2.11.", "2.14.")), reason="other internals of torch"
)
SHAPE = (512, 3, 224, 224)  # both views of 256 images
# By version of torch, in GB: what the kernels of a network with one bottleneck per stage move; what
# is saved. The same on any number of ranks: nothing of an activation's size is added for them.
FIGURES = {"2.11": (52.4, 9.45), "2.14": (56.1, 8.63)}
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


@torch.library.custom_op("bt_fast_test::count", mutates_args=("counter",))
def count(counter: torch.Tensor) -> None:
    counter.add_(1)


count.register_fake(lambda counter: None)
doubled.register_autograd(lambda ctx, grad: doubled(grad))


class OwnKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1024))
        self.register_buffer("counter", torch.empty(4096))

    def forward(self, x):
        count(self.counter)
        # The GPU's path: a model sees CUDA tensors.
        return doubled(x * self.weight) if x.is_cuda else x * self.weight


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


def step(num_ranks: int, fused: bool = False, blocks: tuple[int, ...] = (1, 1, 1, 1)) -> Traffic:
    model = build(blocks)
    if fused:
        batch_norm.fuse(model)
    return measure(model, SHAPE, num_ranks=num_ranks)


def small(kind: type[nn.Module], shape: tuple[int, ...]) -> Traffic:
    with torch.device("meta"):
        model = kind()
    return measure(model, shape)


@pytest.fixture(scope="module")
def workers():
    """Processes with triton itself, of which the other tests use the interpreter."""
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="0"),
        ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool,
    ):
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_a_bottleneck_of_each_stage_moves_the_documented_bytes(workers, num_ranks):
    traffic = workers.submit(step, num_ranks).result()
    moved, saved = FIGURES[VERSION]
    assert traffic.gigabytes("fused", "custom") == pytest.approx(moved, rel=0.01)
    assert traffic.saved / 1e9 == pytest.approx(saved, rel=0.01)
    # 17 convolutions and 3 linear layers, each with a gradient of weights and one of its input.
    assert len(traffic.of("library", backward=False)) == 20
    assert bool(traffic.of("collective")) == (num_ranks > 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks,blocks", [(1, (3, 4, 6, 3)), (8, (1, 1, 1, 1))])
def test_fused_norms_pass_through_the_compiler_whole(workers, num_ranks, blocks):
    """Nothing of an activation's size is copied, filled or added beside them; and torch 2.11 must
    not print a deep network for each operator that is new to it."""
    traffic = workers.submit(step, num_ranks, True, blocks).result()
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
    traffic = workers.submit(small, Centred, (4096, 16384)).result()
    (kernel,) = traffic.of("fused", backward=False)
    x, y, weight = 4096 * 16384 * 2, 4096 * 16384 * 4, 16384 * 4
    means = 4096 * 2  # kept for the backward pass
    assert 2 * x + y + weight <= kernel.bytes <= 2 * x + y + weight + 2 * means
    assert traffic.saved == means


def test_a_slice_counts_what_is_read(workers):
    (kernel,) = workers.submit(small, Half, (4096, 1024)).result().of("fused", backward=False)
    assert kernel.bytes == 2048 * 1024 * (2 + 4) + 1024 * 4


def test_own_kernels_count(workers):
    traffic = workers.submit(small, OwnKernels, (2048, 1024)).result()
    own = {(k.name, k.backward): k.bytes for k in traffic.of("custom")}
    values = 2048 * 1024 * 4
    assert own == {
        ("_doubling", False): 2 * values,
        ("bt_fast_test.count.default", False): 4096 * 4,
        ("_doubling", True): 2 * values,
    }
