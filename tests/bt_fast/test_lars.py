"""LARS, its definition and fused, and the schedule against the reference over a trajectory."""

import math

import pytest
import torch
from conftest import require_interpreter
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bt_fast.config import Config
from bt_fast.lars import LARS, parameter_groups
from bt_fast.models.networks import BarlowTwins
from bt_fast.schedule import FINAL_FRACTION, learning_rate
from tools import reference


def reference_rate(step: int, steps_per_epoch: int, epochs: int, batch_size: int) -> float:
    """The released code's schedule without its two factors 0.2 and 0.0048."""
    num_steps, warmup = epochs * steps_per_epoch, 10 * steps_per_epoch
    base = batch_size / 256
    if step < warmup:
        return base * step / warmup
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    return base * q + base * 0.001 * (1 - q)


def test_lars_and_schedule_follow_the_reference_for_100_steps():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (5, 8), (1, 7), (4, 4), (8,), (8,)]
    ours = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    ours[3].zero_()  # a parameter of norm 0 has trust ratio 1
    theirs = [p.clone() for p in ours]
    optimizers = [
        kind([{"params": params[:4]}, {"params": params[4:]}], 0.0, weight_decay=1.5e-6)
        for kind, params in ((LARS, ours), (reference.Lars, theirs))
    ]
    run = {"steps_per_epoch": 5, "epochs": 20, "batch_size": 512}
    for step in range(100):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
            p.grad *= 0.0 if step == 3 else 10.0 ** (step % 5 - 2)
            q.grad = p.grad.clone()
        for index, base_lr in enumerate((0.2, 0.0048)):
            rate = learning_rate(step, base_lr=base_lr, **run)
            optimizers[0].param_groups[index]["lr"] = rate
            optimizers[1].param_groups[index]["lr"] = base_lr * reference_rate(step, **run)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert (p - q).abs().max() <= 1e-12
            momentum, buffer = optimizers[0].state[p]["momentum"], optimizers[1].state[q]["mu"]
            assert (momentum - buffer).abs().max() <= 1e-12


ALIGNED = [(64, 3, 7, 7), (64,), (130, 332), (8,), (40_000,), (1, 8), (4, 4)]
UNALIGNED = [(64, 3, 7, 7), (64,), (130, 333), (5,), (40_001,), (1, 7), (3, 3)]


def mixed_parameters(shapes=UNALIGNED) -> list[torch.Tensor]:
    """Tensors like a model's: channels-last, one row, large, small, all zeros."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters[0] = parameters[0].to(memory_format=torch.channels_last)
    parameters[-1].zero_()
    return [p.requires_grad_() for p in parameters]


def build_optimizer(parameters: list[torch.Tensor], fused: bool) -> LARS:
    if fused:
        require_interpreter()
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "momentum": 0.8},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": 0.3},
    ]
    return LARS(groups, 0.1, weight_decay=1e-2, fused=fused)


@pytest.mark.parametrize("shapes", [ALIGNED, UNALIGNED])
def test_the_fused_update_equals_the_definition(shapes):
    """In Triton's interpreter; some gradients have other strides or are absent."""
    unfused, fused = mixed_parameters(shapes), mixed_parameters(shapes)
    optimizers = build_optimizer(unfused, False), build_optimizer(fused, True)
    for step in range(4):
        for i, (p, q) in enumerate(zip(unfused, fused, strict=True)):
            p.grad = torch.randn(p.shape) * 10.0 ** (step - 2)
            q.grad = p.grad.clone()
            if (step, i) == (2, 3):
                p.grad = q.grad = None
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(unfused, fused, strict=True):
            assert (p - q).norm() <= 1e-6 * p.norm()


def test_the_fused_update_of_unaligned_memory():
    storage = torch.randn(41)
    parameters = [storage[1:25].view(4, 6).requires_grad_(), storage[25:41].requires_grad_()]
    expected = [p.detach().clone().requires_grad_() for p in parameters]
    for params, fused in ((parameters, True), (expected, False)):
        for p in params:
            p.grad = torch.ones_like(p)
        build_optimizer(params, fused).step()
    assert all(torch.allclose(p, q) for p, q in zip(parameters, expected, strict=True))


@pytest.mark.parametrize(
    "parameter,interpreted,message",
    [
        (lambda: torch.ones(4, 6, dtype=torch.half), "1", "needs .*float32 parameters"),
        (lambda: torch.ones(4, 6), "0", "needs .*float32 parameters"),  # on a CPU
        (lambda: torch.ones(4, 12)[:, ::2], "1", "without gaps"),
    ],
)
def test_what_the_fused_update_refuses(parameter, interpreted, message, monkeypatch):
    p = parameter().requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = build_optimizer([p], True)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.parametrize("fused", [False, True])
def test_momentum_of_another_memory_format_is_taken(fused):
    """As after loading a state_dict, or `model.to(memory_format=...)`."""
    found = []
    for momentum in (torch.arange(24.0).view(4, 6), torch.arange(24.0).view(4, 6).T.clone().T):
        p = torch.ones(4, 6, requires_grad=True)
        p.grad = torch.ones_like(p)
        optimizer = build_optimizer([p], fused)
        optimizer.state[p]["momentum"] = momentum
        optimizer.step()
        found.append((p.detach(), optimizer.state[p]["momentum"]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("fused", [False, True])
def test_a_guarded_step_that_is_not_finite_changes_nothing(fused):
    parameters = mixed_parameters()
    optimizer = build_optimizer(parameters, fused)

    def step(guard: float, addend: float = 0.0, index: int = 0) -> list[torch.Tensor]:
        """One step with `addend` in the last element of one gradient -> parameters and buffers."""
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[index].grad[(-1,) * parameters[index].ndim] += addend
        applied = optimizer.step(guard=torch.tensor(guard))
        assert applied.item() == (math.isfinite(guard) and math.isfinite(addend))
        state = [optimizer.state[p]["momentum"] for p in parameters]
        return [t.detach().clone() for t in (*parameters, *state)]

    first = step(1.0)
    for value in (math.nan, math.inf, -math.inf):
        assert all(map(torch.equal, step(value), first))
        for index in range(len(parameters)):
            assert all(map(torch.equal, step(1.0, value, index), first))
    assert not any(map(torch.equal, step(1.0), first))


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would launch: no views or allocations."""

    NO_LAUNCH = frozenset({"empty", "empty_like", "_to_copy", "detach", "unbind", "zeros_like"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in self.NO_LAUNCH or name.startswith("_record"))
        return func(*args, **(kwargs or {}))


class CountedKernel:
    """A Triton kernel whose launches are counted, without the operations of the interpreter."""

    def __init__(self, kernel, launches: Launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.count += 1
            with _disable_current_modes():
                return self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.slow
def test_launches_of_the_papers_model(monkeypatch):
    """One step of ResNet-50 and its projector: the released code's loop, foreach, fused kernels.
    The tensors are small, because launches depend only on the number of tensors."""
    require_interpreter()
    from bt_fast import lars_triton

    with torch.device("meta"):
        model = BarlowTwins(Config())
    shapes = [tuple(min(side, 4) for side in p.shape) for p in model.parameters()]
    parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizers = [
        reference.Lars(parameter_groups(parameters), 0.1, weight_decay=1e-6),
        LARS(parameter_groups(parameters), 0.1, weight_decay=1e-6, fused=False),
        LARS(parameter_groups(parameters), 0.1, weight_decay=1e-6, fused=True),
    ]
    counts = []
    for optimizer in optimizers:
        optimizer.step()  # allocates the state
        with monkeypatch.context() as patch, Launches() as launches:
            for name in ("_sums", "_ratios", "_apply"):
                kernel = CountedKernel(getattr(lars_triton, name), launches)
                patch.setattr(lars_triton, name, kernel)
            optimizer.step()
        counts.append(launches.count)
    assert (len(parameters), *counts) == (166, 1114, 19, 3)


@given(
    steps_per_epoch=st.integers(1, 40),
    epochs=st.integers(1, 60),
    warmup_epochs=st.one_of(st.integers(0, 59), st.floats(0, 59)),
    batch_size=st.integers(2, 8192),
    base_lr=st.floats(1e-6, 10),
)
def test_any_schedule_rises_linearly_to_its_peak_then_falls_to_a_thousandth(
    steps_per_epoch, epochs, warmup_epochs, batch_size, base_lr
):
    warmup_epochs = min(warmup_epochs, epochs - 1)  # the configuration requires it
    run = {"steps_per_epoch": steps_per_epoch, "epochs": epochs, "warmup_epochs": warmup_epochs}
    run |= {"batch_size": batch_size, "base_lr": base_lr}
    peak, warmup = base_lr * batch_size / 256, warmup_epochs * steps_per_epoch
    steps = epochs * steps_per_epoch
    rates = [learning_rate(step, **run) for step in range(steps + 3)]
    rising = rates[: math.ceil(warmup)]
    assert rising == pytest.approx([peak * step / warmup for step in range(len(rising))])
    falling = rates[math.ceil(warmup) :]
    assert falling == sorted(falling, reverse=True)
    assert min(rates) >= 0 and max(rates) <= peak * (1 + 1e-12)
    if warmup == int(warmup):
        assert falling[0] == pytest.approx(peak)
    assert rates[steps:] == pytest.approx([peak * FINAL_FRACTION] * 3)  # also after the end
