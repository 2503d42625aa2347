"""The fused kernels of batch norm against the definition, in Triton's interpreter."""

import itertools
import os
import shutil
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from conftest import INTERPRETER_FAILS
from norm_forms import (
    FORMS,
    SmallNet,
    assert_equal_steps,
    assert_equals_definition,
    assert_moments,
    assert_repeats_bitwise,
    assert_sums_complete,
    batches_of_views,
    definition,
    fused,
    gradients,
    inputs,
    leaves,
    make_step,
    output_gradients,
    relative_error,
    torch_reference,
)
from operators import Operators, tensors_of
from ranks import run_ranks
from triton.runtime import interpreter

from bt_fast.config import Config
from bt_fast.distributed.collectives import World
from bt_fast.models import batch_norm
from bt_fast.models.networks import BarlowTwins

if os.environ.get("TRITON_INTERPRET") == "1":
    from bt_fast.models import batch_norm_triton

pytestmark = [
    pytest.mark.skipif(INTERPRETER_FAILS is not None, reason=str(INTERPRETER_FAILS)),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter"),
]


TILINGS = ("MOMENTS", "SUMS", "FORWARD", "BACKWARD", "TWO_NORMS")
SMALL = [(4, 64, 14, 14), (6, 67, 7, 5), (2, 24, 9, 8), (4, 130, 4, 4)]
OF_MODELS = [  # shapes in models for views of 224 px and of 32 px
    *[("pool", (2, 64, 112, 112)), ("residual", (2, 64, 56, 56)), ("two norms", (2, 128, 28, 28))],
    *[("two consumers", (2, 64, 32, 32)), ("relu", (2, 64, 32, 32)), ("norm", (2, 512, 7, 7))],
]


def replace_tilings(monkeypatch, **options: int) -> None:
    for name in TILINGS:
        tiling = getattr(batch_norm_triton, name)._replace(**options)
        monkeypatch.setattr(batch_norm_triton, name, tiling)


@pytest.mark.parametrize(
    "form,shape,offset",
    [*itertools.product(FORMS, SMALL, (0.5, 8.0)), *((*case, 0.5) for case in OF_MODELS)],
)
def test_results_and_gradients_are_at_least_as_accurate_as_torchs(form, shape, offset, monkeypatch):
    if (form, shape) in OF_MODELS:
        # With many small programs the interpreter takes minutes.
        replace_tilings(monkeypatch, num_programs=8, block_rows=256)
        monkeypatch.setattr(batch_norm_triton, "POOL_BLOCK", 64)
        monkeypatch.setattr(batch_norm_triton, "POOL_ROWS", 56)
    tensors, g = inputs(form, shape, offset=offset), output_gradients(form, shape)
    exact = leaves(tensors, torch.float64)
    true = definition(form, *exact)
    true_gradients = gradients(true, true, exact, [t.double() for t in g])
    theirs = leaves(tensors)
    y = torch_reference(form, *theirs)
    their_errors = [relative_error(y, true)]
    their_errors += map(relative_error, gradients(y, y, theirs, g), true_gradients)
    ours = leaves(tensors)
    y, alias, moments = fused(form, *ours)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, alias)
    our_errors = [relative_error(y, true)]
    our_errors += map(relative_error, gradients(y, alias, ours, g), true_gradients)
    for our_value, their_value in zip(our_errors, their_errors, strict=True):
        assert our_value <= max(their_value, 4e-7), (our_errors, their_errors)
    assert_moments(form, moments, exact)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_activations_are_rounded_once(form):
    """Within one bf16 step, because the interpreter truncates where a GPU rounds."""
    assert_equals_definition(form, (4, 64, 14, 14), torch.bfloat16, bf16_error=2**-7)


def test_assertions_of_the_gpu_tests():
    """The assertions of test_cuda.py at small sizes."""
    assert_equals_definition("two norms", (4, 8, 3, 3), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        assert_sums_complete(10, 3 * batch_norm_triton.ROW_MULTIPLE + 1, dtype, launches=3)
    assert_repeats_bitwise("residual", (4, 8, 5, 5), torch.float32, repetitions=2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
def test_a_compiled_step_equals_the_eager_one():
    """With the code that runs on a GPU around the kernels: the order of calls, and all strides."""
    step = make_step(is_fused=True, wrap=lambda model: torch.compile(model, dynamic=False))
    assert_equal_steps(step, batches_of_views(1, 8, 12), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_results_of_four_dimensions_are_channels_last_images(form):
    """The compiler gives other strides to other tensors of four dimensions; kernels would not know.

    (On a GPU, the compiled gradients were wrong when the moments had four dimensions.)
    """
    shape = (4, 8, 6, 6)
    tensors = leaves(inputs(form, shape))
    with Operators("bt_fast::") as operators:
        y, alias, _ = fused(form, *tensors)
        gradients(y, alias, tensors, output_gradients(form, shape))
    images = [t for call in operators.calls for t in tensors_of(call.results) if t.ndim == 4]
    assert images and all(t.shape[:2] == (4, 8) for t in images)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in images)


@pytest.mark.parametrize("form", ["norm", "relu"])
def test_inputs_of_two_dimensions(form):
    x, weight, bias = (t.requires_grad_() for t in inputs(form, (10, 70)))
    y, alias, _ = fused(form, x, weight, bias)
    true = definition(form, *(t.double() for t in (x, weight, bias)))
    torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(y, alias, [x, weight, bias], [y, 0 * y]))


def test_another_memory_layout_gives_the_same_result():
    tensors, g = inputs("residual", (4, 16, 5, 5)), output_gradients("residual", (4, 16, 5, 5))
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        leaf_tensors = leaves(tensors, layout=layout)
        y, alias, _ = fused("residual", *leaf_tensors)
        found.append([y, *gradients(y, alias, leaf_tensors, g)])
    assert all(map(torch.equal, *found))


def test_a_constant_channel_has_no_variance():
    x, weight, bias = inputs("relu", (4, 8, 3, 3))
    x[:, 3] = 4097.0
    leaf_tensors = leaves((x, weight, bias))
    y, _, moments = fused("relu", *leaf_tensors)
    assert (moments[0, 1, :, 3] == 0).all() and (moments[0, 0, :, 3] == 4097).all()
    assert torch.equal(y[:, 3], bias[3].clamp(min=0).expand(4, 3, 3))
    (grad_x,) = torch.autograd.grad(y.sum(), leaf_tensors[:1])
    assert grad_x.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_spreads_to_its_view_and_channel_only(form):
    tensors = inputs(form, (4, 16, 6, 6))
    tensors[0][3, 5, 2, 2] = torch.nan  # in view B
    leaf_tensors = leaves(tensors)
    y, alias, _ = fused(form, *leaf_tensors)
    expected = torch.zeros(y.shape, dtype=torch.bool)
    expected[2:, 5] = True
    assert torch.equal(y.isnan(), expected)
    (grad_x,) = gradients(y, alias, leaf_tensors[:1], [torch.ones_like(y)] * 2)
    nan = grad_x.isnan()
    assert nan[2:, 5].all() and nan.sum() == nan[2:, 5].sum()


def test_the_pools_gradient_goes_to_the_first_of_equal_values():
    x = torch.zeros(2, 4, 6, 6)
    x[:, :, 2:4, 2:4] = 1.0  # four equal maxima
    leaf_tensors = leaves((x, torch.ones(4), torch.ones(4)))
    y, alias, _ = fused("pool", *leaf_tensors)
    (ours,) = gradients(y, alias, leaf_tensors[:1], [torch.ones_like(y), torch.zeros_like(y)])
    theirs = leaves((x, torch.ones(4), torch.ones(4)))
    (true,) = torch.autograd.grad(torch_reference("pool", *theirs).sum(), theirs[:1])
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-5)


# On several ranks.


def slice_of_rank(world: World, tensors, g):
    """This rank's slice of every view; weights and biases are complete on every rank."""

    def part(t):
        return t.unflatten(0, (2, world.size, -1))[:, world.rank].flatten(0, 1) if t.ndim > 1 else t

    return [part(t) for t in tensors], [part(t) for t in g]


def results_of_rank(world: World, form: str, shape) -> list[torch.Tensor]:
    tensors, g = slice_of_rank(world, inputs(form, shape), output_gradients(form, shape))
    leaf_tensors = leaves(tensors)
    y, alias, moments = fused(form, *leaf_tensors, group=world.group)
    return [moments, y.detach(), *gradients(y, alias, leaf_tensors, g)]


@pytest.mark.slow
def test_statistics_are_taken_over_all_ranks():
    shape = (6, 20, 3, 5)
    for form in FORMS:
        by_rank = run_ranks(3, results_of_rank, form, shape)
        tensors, g = leaves(inputs(form, shape), torch.float64), output_gradients(form, shape)
        true = definition(form, *tensors)
        exact = [true.detach(), *gradients(true, true, tensors, [t.double() for t in g])]
        for index, value in enumerate(exact, 1):
            found = [results[index] for results in by_rank]
            if value.ndim == 4:
                views = [t.unflatten(0, (2, -1)) for t in found]
                combined = torch.cat(views, 1).flatten(0, 1)
            else:  # the gradient of a weight is the sum over ranks
                combined = torch.stack(found).sum(0)
            assert relative_error(combined, value) < 1e-6
        assert all(torch.equal(by_rank[0][0], results[0]) for results in by_rank)


# In a model.


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder,size,small", [("resnet18", 12, True), ("resnet18", 40, False), ("resnet50", 32, False)]
)
def test_a_step_of_a_fused_model_is_as_accurate(encoder, size, small):
    config = Config(encoder=encoder, projector=(32, 32), small_images=small)
    build = partial(BarlowTwins, config)
    (views,) = batches_of_views(1, 8, size)
    true = make_step(build, is_fused=False, dtype=torch.float64)(views)
    theirs, ours = (make_step(build, is_fused=is_fused)(views) for is_fused in (False, True))

    def errors(found: list[torch.Tensor]) -> torch.Tensor:
        """Relative errors in the norm, because rounding may change the sign of a ReLU's input."""
        pairs = zip(found, true, strict=True)
        return torch.stack([(value - exact).norm() / exact.norm() for value, exact in pairs])

    assert (errors(ours) < 10 * errors(theirs) + 1e-5).all()
    assert errors(ours).median() < 2 * errors(theirs).median()


def test_a_fused_model_in_evaluation_uses_its_running_statistics():
    model, (images,) = SmallNet().eval(), batches_of_views(1, 4, 12)
    expected = model(images)
    batch_norm.fuse(model)
    assert torch.equal(model(images), expected)


def test_fused_norms_need_a_gpu_or_the_interpreter(monkeypatch):
    cpu = torch.device("cpu")
    assert batch_norm.choose_norm("fused", cpu) == "fused"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="--norm fused needs a GPU"):
        batch_norm.choose_norm("fused", cpu)
    for norm in ("auto", "compiled"):
        assert batch_norm.choose_norm(norm, cpu) == "compiled"


# Memory traffic.


class CountedMemory:
    """The interpreter's memory, with a count of the bytes loaded and stored."""

    def __init__(self, memory) -> None:
        self.memory, self.bytes = memory, 0

    def __getattr__(self, name: str):
        return getattr(self.memory, name)

    def load(self, pointers, mask, other, dtype):
        self.bytes += int(mask.sum()) * dtype.itemsize
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self.bytes += int(mask.sum()) * values.dtype.itemsize
        return self.memory.store(pointers, values, mask)


@pytest.mark.parametrize("form", FORMS)
def test_kernels_move_their_arguments_once(form, monkeypatch):
    """Counted in the interpreter, load by load. (The pool's windows overlap; a GPU caches them.)"""
    # Few and large programs, so that partial sums are few beside activations.
    replace_tilings(monkeypatch, num_programs=2)
    monkeypatch.setattr(batch_norm_triton, "POOL_ROWS", 1 << 16)
    memory = CountedMemory(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", memory)
    tensors, g = inputs(form, (2, 64, 48, 48)), output_gradients(form, (2, 64, 48, 48))
    leaf_tensors = leaves(tensors, torch.bfloat16)
    counted = []
    with Operators("bt_fast::") as operators:
        y, alias, _ = fused(form, *leaf_tensors)
        counted.append(memory.bytes)
        gradients(y.float(), alias.float(), leaf_tensors, g)
        counted.append(memory.bytes - counted[0])
    backward = ("norm_sums", "norm_backward", "norm_pool_backward")
    expected = [
        sum(call.num_bytes for call in operators.calls if (call.name in backward) == is_backward)
        for is_backward in (False, True)
    ]
    overlap = {"pool": (1.5, 2.0)}.get(form, (1.02, 1.02))
    for found, once, limit in zip(counted, expected, overlap, strict=True):
        assert 0.99 < found / once < limit, (counted, expected)


def test_a_step_of_the_papers_network_moves_101_gb_in_norms():
    with torch.device("meta"):
        model = BarlowTwins(Config())
        views = torch.empty(512, 3, 224, 224, dtype=torch.bfloat16)
    batch_norm.fuse(model)
    with torch.autocast("cpu", torch.bfloat16), Operators("bt_fast::") as operators:
        z = model(views.to(memory_format=torch.channels_last))
    with operators:
        z.sum().backward()
    names = [call.name for call in operators.calls]
    # Statistics, normalise, sums and input gradient of 53 + 2 norms. Where a block changes the
    # shape (4 times), one call of all but the first serves two norms.
    assert [names.count(name) for name in sorted(set(names))] == [50, 50, 51, 1, 1, 51]
    total = sum(call.num_bytes for call in operators.calls) / 1e9
    assert 98 < total < 102
