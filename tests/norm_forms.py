"""The forms of `norm_act`, their definition, and assertions that the fused kernels equal it.

The assertions run on a GPU (test_cuda.py) and, at small sizes, in Triton's interpreter
(test_batch_norm_triton.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bt_fast.models import batch_norm, networks

FORMS = ("norm", "relu", "two consumers", "residual", "two norms", "pool")
EPS = 1e-5
CPU = torch.device("cpu")


def options(form: str) -> dict:
    two_consumers = form not in ("norm", "relu")
    return {"relu": form != "norm", "pool": form == "pool", "two_consumers": two_consumers}


def inputs(form: str, shape: tuple[int, ...], *, offset: float = 0.5, seed: int = 0, device=CPU):
    """x, weight and bias, and the form's residual, weight and bias of its norm, if it has them.

    Every channel of x has a mean of `offset` or -`offset` standard deviations.
    """
    generator = torch.Generator(device).manual_seed(seed)
    channels = shape[1]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    signs = torch.where(torch.arange(channels, device=device) % 2 == 0, 1.0, -1.0)
    signs = signs.view(1, -1, *[1] * (len(shape) - 2))
    tensors = [random(*shape) + offset * signs]
    tensors += [random(channels) for _ in range(2)]
    if form in ("residual", "two norms"):
        tensors.append(random(*shape) - offset * signs)
    if form == "two norms":
        tensors += [random(channels) for _ in range(2)]
    return tensors


def _form(norm, form: str, x, weight, bias, residual=None, *affine, relu=F.relu):
    """The form in torch operations; affine: of the residual's norm."""
    y = norm(x, weight, bias)
    if residual is not None:
        y = y + (norm(residual, *affine) if affine else residual)
    if form != "norm":
        y = relu(y)
    return F.max_pool2d(y, 3, 2, 1) if form == "pool" else y


def definition(*arguments, **options):
    """The form with `batch_norm.normalise`."""
    return _form(lambda *t: batch_norm.normalise(*t, eps=EPS)[0], *arguments, **options)


def torch_reference(*arguments):
    """The form with torch's batch norm, one view at a time."""

    def norm(x, *affine):
        views = x.chunk(2)
        return torch.cat([F.batch_norm(v, None, None, *affine, True, eps=EPS) for v in views])

    return _form(norm, *arguments)


def fused(form: str, x, weight, bias, residual=None, *affine, group=None):
    from bt_fast.models import batch_norm_triton  # triton comes with torch's CUDA builds only

    others = {"residual": residual, "residual_norm": affine or None, **options(form)}
    return batch_norm_triton.norm_act(x, weight, bias, eps=EPS, group=group, **others)


def gradients(y, alias, tensors, g):
    """Gradients of the sum of y g[0] + alias g[1]."""
    return torch.autograd.grad((y * g[0]).sum() + (alias * g[1]).sum(), tensors)


def output_gradients(form: str, shape, device=CPU) -> list[torch.Tensor]:
    """d loss / d y from each of two consumers; zero from the second if there is only one."""
    if form == "pool":
        shape = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    generator = torch.Generator(device).manual_seed(9)
    g = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
    return g if options(form)["two_consumers"] else [g[0], torch.zeros_like(g[0])]


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return ((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-12)).item()


def leaves(tensors, dtype=torch.float32, layout=torch.channels_last):
    """Copies that require gradients; activations in `dtype` and `layout`."""
    copies = []
    for t in tensors:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t = t.to(dtype if t.ndim > 1 else wide)
        copies.append((t.to(memory_format=layout) if t.ndim == 4 else t.clone()).requires_grad_())
    return copies


# Assertions.


def assert_equals_definition(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, device=CPU, *, bf16_error: float = 2**-8
) -> None:
    """Results and gradients equal those in float64.

    bf16_error: relative error of a value rounded to bf16.

    Where rounding may change the sign of ReLU's input, the gradient of y is set to 0.
    """
    rounding = bf16_error if dtype == torch.bfloat16 else 0.0
    tensors = [t.to(dtype).float() if t.ndim > 1 else t for t in inputs(form, shape, device=device)]
    exact = leaves(tensors, torch.float64)
    with torch.no_grad():
        is_clear = definition(form, *exact, relu=lambda y: y).abs() > 1e-5
    g = [t.to(dtype).float() * is_clear for t in output_gradients(form, shape, device)]
    true = definition(form, *exact)
    true_gradients = gradients(true, true, exact, [t.double() for t in g])
    ours = leaves(tensors, dtype)
    y, alias, moments = fused(form, *ours)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, alias)
    largest = true.abs().max()
    assert ((y.double() - true).abs() <= rounding * true.abs() + 2e-6 * largest).all()
    found = gradients(y.float(), alias.float(), ours, g)
    for our_value, true_value in zip(found, true_gradients, strict=True):
        assert our_value.dtype == (dtype if our_value.ndim == 4 else torch.float32)
        # For an input, the sum of two gradients and the result are rounded.
        tolerance = 5e-6 + (3 if our_value.ndim == 4 else 1) * rounding
        assert relative_error(our_value, true_value) <= tolerance
    assert_moments(form, moments, exact)


def assert_moments(form: str, moments: torch.Tensor, exact: list[torch.Tensor]) -> None:
    """Means and variances are those of each view of the float64 inputs that are normalised."""
    normed = exact[::3] if form == "two norms" else exact[:1]
    for x, (mean, variance) in zip(normed, moments, strict=True):
        views = x.detach().unflatten(0, (2, -1))
        torch.testing.assert_close(mean.double(), views.mean((1, 3, 4)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance.double(), views.var((1, 3, 4)), rtol=1e-6, atol=0)


def assert_sums_complete(
    channels: int,
    num_rows: int,
    dtype: torch.dtype,
    device=CPU,
    *,
    launches: int,
    before_launch: Callable[[int], object] = lambda launch: None,
) -> None:
    """The last program to finish adds all partial sums, and only those of its own launch.

    All sums are of small integers, hence exact, and differ from those of the previous launches,
    whose partial sums lay in the same memory. The kernels subtract the mean of a view's first rows,
    which is 0 here.

    num_rows: of each of two views. before_launch: called before every launch with its number.
    """
    from bt_fast.models import batch_norm_triton

    first = batch_norm_triton.FIRST_ROWS
    assert num_rows > first
    x, g = torch.zeros(2, 2, num_rows, channels, dtype=dtype, device=device)  # [V, rows, C] each
    inputs = [torch.full_like(x, value).flatten(0, 1) for value in (3, 5)]
    moments = torch.ones(2, 3, 2 * channels, device=device)  # [norms, 3, V * C]
    moments[1] = 2  # both mean and 1 / deviation
    ones = torch.ones(channels, device=device)
    signs = torch.where(torch.arange(channels, device=device) % 2 == 0, 1, -1)
    views = torch.tensor([[1], [2]], device=device)
    num_errors = torch.zeros((), dtype=torch.int64, device=device)
    for launch in range(launches):
        before_launch(launch)
        values = (launch % 60 + 1) * views * signs  # [V, C], up to 120
        x[:, first:] = g[:] = values[:, None].to(dtype)
        sums = torch.ops.bt_fast.norm_moments([x.flatten(0, 1)], 2)
        of_x = torch.stack([values, values**2]) * (num_rows - first)  # [2, V, C]
        num_errors += (sums != of_x.flatten(1)).sum()

        pair = [g.flatten(0, 1)] * 2
        masked, sums, grad_weights, grad_bias = torch.ops.bt_fast.norm_sums(
            pair, inputs, None, moments, ones, ones, False
        )
        of_g = 2 * values * num_rows
        products = [of_g * (3 - 1), of_g * (5 - 2)]  # g (x - mean) of each norm
        of_pairs = torch.stack([torch.stack([of_g, p]).flatten(1) for p in products])
        num_errors += (sums != of_pairs).sum()
        of_weights = torch.stack([products[0].sum(0), 2 * products[1].sum(0)])
        num_errors += (grad_weights != of_weights).sum() + (grad_bias != of_g.sum(0)).sum()
        num_errors += (masked.view_as(g) != 2 * g).sum()
    assert num_errors.item() == 0
    assert not batch_norm_triton._finished[x.device].any()


def assert_repeats_bitwise(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, device=CPU, *, repetitions: int
) -> None:
    """Forward and backward pass give the same bits in every repetition."""
    tensors = leaves(inputs(form, shape, device=device), dtype)
    g = output_gradients(form, shape, device)
    first: list[torch.Tensor] = []
    for _ in range(repetitions):
        y, alias, moments = fused(form, *tensors)
        found = [y, moments, *gradients(y.float(), alias.float(), tensors, g)]
        first = first or found
        assert all(map(torch.equal, first, found))


class SmallNet(nn.Module):
    """A ResNet with every form of `norm_act`: images [2 n, 3, H, W] -> [2 n, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = batch_norm.BatchNorm2d(8)
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), batch_norm.BatchNorm2d(16))
        self.first = networks.BasicBlock(8, 16, 2, down, norm_layer=batch_norm.BatchNorm2d)
        self.second = networks.BasicBlock(16, 16, norm_layer=batch_norm.BatchNorm2d)
        self.last = batch_norm.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = nn.MaxPool2d(3, 2, 1)
        y = batch_norm.norm_act(self.norm, self.stem(x), pool=pool, two_consumers=True)
        y = batch_norm.as_pair(self.second(self.first(y)))[0]
        return self.last(y.mean((2, 3)))


Step = Callable[[torch.Tensor], list[torch.Tensor]]


def make_step(
    build: Callable[[], nn.Module] = SmallNet,
    *,
    is_fused: bool,
    dtype: torch.dtype = torch.float32,
    device=CPU,
    wrap=lambda model: model,
) -> Step:
    """A function of views: forward and backward pass of a model with fixed weights
    -> copies of z, of all gradients and of the running statistics.

    dtype: bfloat16 means autocast; wrap: applied to the model, like torch.compile.
    """
    torch.manual_seed(0)
    model = build()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model.to(device, wide).to(memory_format=torch.channels_last)
    statistics = batch_norm.RunningStatistics(model)
    if is_fused:
        batch_norm.fuse(model)
    call = wrap(model)

    def step(views: torch.Tensor) -> list[torch.Tensor]:
        views = views.to(device, dtype, memory_format=torch.channels_last)
        statistics.running.zero_()
        with torch.autocast(views.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            z = call(views)
        weights = torch.linspace(-1, 1, z.numel(), dtype=wide, device=device).view_as(z)
        (z * weights).sum().backward()
        statistics.update(torch.ones((), dtype=torch.bool, device=device))
        found = [z, *(p.grad for p in model.parameters()), statistics.running]
        found = [t.detach().clone() for t in found]
        model.zero_grad(set_to_none=True)
        return found

    return step


def batches_of_views(count: int, num_views: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_views, 3, size, size, generator=generator) for _ in range(count)]


def max_relative_error(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """The largest of the tensors' relative errors, each in the norm."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(found, true, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def assert_equal_steps(
    step: Step, batches: list[torch.Tensor], dtype: torch.dtype, device=CPU
) -> None:
    """A fused step, compiled or captured, gives the results of the eager step for every batch."""
    eager = make_step(is_fused=True, dtype=dtype, device=device)
    exact = make_step(is_fused=False, dtype=torch.float64)
    for views in batches:
        found, expected = step(views), eager(views)
        true = exact(views.to(dtype))
        assert max_relative_error(found, true) <= 2 * max_relative_error(expected, true) + 1e-4
        if dtype == torch.float32:
            assert max_relative_error(found, expected) <= 1e-4
            assert max_relative_error(found, true) <= 1e-3
