"""Any number of ranks: the loss, batch norm and whole updates against one process."""

import resource
from functools import partial

import pytest
import torch
from conftest import write_photo_beton
from ranks import TINY, Traffic, embeddings, run_ranks, share_of
from tiny_runs import same

from bt_fast import loss, train
from bt_fast.build import average_statistics, build
from bt_fast.cli import parse_pretrain
from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, World, compare_weights
from bt_fast.models import batch_norm
from bt_fast.models.networks import BarlowTwins
from bt_fast.prefetch import prefetch
from bt_fast.run import checkpoint

SLOW = pytest.mark.slow
SHAPES = [(16, 40), (64, 12), (8, 8), (16, 10), (8, 3)]  # the last two do not divide by ranks


def sharded_losses(world: World) -> list:
    results = []
    for n, d in SHAPES:
        for method in ("gram", "columns", "auto"):
            z = [part.detach()[share_of(world, n)].requires_grad_() for part in embeddings(n, d)]
            value = loss.barlow_twins_loss(*z, lambd=0.1, group=world.group, method=method)
            value.backward()
            results.append((value.detach(), torch.stack([part.grad for part in z])))
    return results


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
def test_every_sharded_form_equals_the_dense_one(size):
    ranks = run_ranks(size, sharded_losses)
    for case, (n, d) in enumerate((n, d) for n, d in SHAPES for _ in range(3)):
        z = embeddings(n, d)
        expected = loss.barlow_twins_loss(*z, lambd=0.1, method="dense")
        expected.backward()
        wanted = torch.stack([part.grad for part in z])
        losses = [rank[case][0].item() for rank in ranks]
        assert losses == pytest.approx(size * [expected.item()], rel=1e-12)
        grads = torch.cat([rank[case][1] for rank in ranks], dim=1)
        assert (grads - wanted).norm() <= 1e-11 * wanted.norm()


def loss_in_bf16(world: World, num_samples: int, num_dimensions: int) -> tuple[dict, dict, int]:
    """Collectives, bytes this rank sends, and by how much its peak memory rises, both ways."""
    torch.manual_seed(world.rank)
    shape = num_samples // world.size, num_dimensions
    z = [torch.randn(shape).bfloat16().requires_grad_() for _ in range(2)]
    small = [part.detach()[:, :8].clone().requires_grad_() for part in z]
    loss.barlow_twins_loss(*small, group=world.group).backward()  # what only the first call takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Traffic() as traffic:
        loss.barlow_twins_loss(*z, group=world.group).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(traffic.calls), dict(traffic.bytes), (after - before) * 1024


@pytest.mark.slow
def test_bytes_and_memory_of_the_loss_on_four_ranks():
    """One gather of both views in their dtype, one sum of a scalar, one of [2, D] for the gradient;
    against the minimum of the dense form, which all-reduces C.

    It sends 2 (W - 1) / W D^2 values and holds C and its gradient in fp32 (measured: 4.4 GB here,
    twice as much).
    """
    n, d, w = 512, 16_384, 4
    ranks = run_ranks(w, loss_in_bf16, n, d)
    dense_bytes, dense_memory = 2 * (w - 1) / w * d * d * 2, 2 * 4 * d * d
    for calls, sent, memory in ranks:
        assert calls == {"all_gather": 1, "all_reduce": 2}
        assert sent["all_reduce"] == 2 * (w - 1) / w * (4 + 2 * d * 4)
        assert sent["all_gather"] == (w - 1) * 2 * (n // w) * d * 2  # as in `costs.predict`
        assert sum(sent.values()) <= dense_bytes / 3
        assert memory < dense_memory / 8


def sharded_norm(world: World, x: torch.Tensor, grad: torch.Tensor, group_size: int) -> tuple:
    layer = batch_norm.BatchNorm2d(x.shape[2]).to(x.dtype)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(3))
    batch_norm.set_process_group(layer, world.new_group(torch.device("cpu"), size=group_size))
    share = share_of(world, x.shape[1])
    part = x[:, share].flatten(0, 1).requires_grad_()
    with Traffic() as traffic:
        y = layer(part)
        torch.relu_(y).backward(grad[:, share].flatten(0, 1))
    grads = part.grad.unflatten(0, (2, -1)), layer.weight.grad, layer.bias.grad
    return y.detach().unflatten(0, (2, -1)), *grads, layer.running_var, dict(traffic.calls)


@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), pytest.param(torch.float32, 1e-5, marks=SLOW)]
)
@pytest.mark.parametrize("size,group_size", [(2, 0), (3, 0), pytest.param(4, 2, marks=SLOW)])
def test_batch_norm_over_ranks_equals_one_over_the_whole_batch(size, group_size, dtype, tolerance):
    """Also of batch norm in groups: as many processes as there are groups. Relative to the largest
    value of each tensor."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5, 3, 3) * 2 + torch.arange(12).view(1, 12, 1, 1, 1)
    x, grad = x.to(dtype), torch.randn(x.shape, dtype=dtype)
    ranks = run_ranks(size, sharded_norm, x, grad, group_size)
    num_groups = size // (group_size or size)
    parts = zip(x.chunk(num_groups, 1), grad.chunk(num_groups, 1), strict=True)
    wanted = [sharded_norm(ALONE, part.clone(), part_grad, 0) for part, part_grad in parts]

    def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    for index in (0, 1):  # outputs, input gradients
        ours = torch.cat([rank[index] for rank in ranks], 1)
        theirs = torch.cat([group[index] for group in wanted], 1)
        assert difference(ours, theirs) < tolerance
    for index in (2, 3):  # every rank has its share of the gradients of weight and bias
        ours, theirs = (sum(part[index] for part in parts) for parts in (ranks, wanted))
        assert difference(ours, theirs) < tolerance
    assert difference(ranks[0][4], wanted[0][4]) < tolerance
    assert all(rank[5] == {"all_reduce": 2} for rank in ranks)  # one forwards, one backwards


def updates(
    world: World,
    data: str,
    dtype: torch.dtype,
    at_full_rate: bool,
    backend: str = "",
    flags: tuple[str, ...] = (),
) -> dict:
    """Ten steps of a run: their loss, the gradients of the first, the weights after the last.

    backend: of torch.compile, if the run is to be compiled; only for ranks of their own.
    """
    if backend:
        torch.compile = partial(torch.compile, backend=backend)
    compile = f"--compile={'default' if backend else 'off'}"
    torch.set_default_dtype(dtype)
    try:
        setup = build(parse_pretrain([*TINY, compile, "--data", data, *flags]), world)
    finally:
        torch.set_default_dtype(torch.float32)
    branches = setup.config.view_a, setup.config.view_b
    terms, gradients = [], {}
    original = setup.optimizer.step

    def step(**arguments):
        if not gradients:
            named = setup.model.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named})
        return original(**arguments)

    setup.optimizer.step = step
    for index, views in enumerate(prefetch(setup.loader.batches(0, 10), branches, setup.runtime)):
        train.set_learning_rates(setup, 10 if at_full_rate else index)
        setup.drop_paths.draw(index, len(views) // 2)
        on_diagonal, off_diagonal, applied = train.update(setup, views.to(dtype))
        assert applied
        terms.append((on_diagonal + 5e-3 * off_diagonal).item())
    average_statistics(setup)
    state = checkpoint.state(setup.model, setup.optimizer)
    return {"terms": terms, "gradients": gradients, "state": state[0], "momentum": state[1]}


def apart(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of a tensor as a whole; one whose values are below 0.01 is taken to have that."""
    ours, wanted = ours.double(), wanted.double()
    return ((ours - wanted).norm() / wanted.norm().clamp(min=1e-2 * wanted.numel() ** 0.5)).item()


def require_equal(ours: dict, wanted: dict, **tolerances: float) -> None:
    """Parts of two `updates` are equal within a tolerance for each."""
    for part, tolerance in tolerances.items():
        if part == "terms":
            assert ours[part] == pytest.approx(wanted[part], rel=tolerance)
        else:
            for name, value in wanted[part].items():
                assert apart(ours[part][name], value) < tolerance, (part, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size,dtype,backend",
    [
        (2, torch.float32, ""),
        (4, torch.float32, ""),
        (2, torch.float64, ""),
        (2, torch.float64, "aot_eager"),
    ],
)
def test_ten_updates_are_the_same_on_any_number_of_ranks(tmp_path, size, dtype, backend):
    """In float32, a run's first ten steps; in float64, ten at the full learning rate.

    Float32 alone would not tell: one ReLU that rounding turns from off to on changes gradients by
    half a percent, in one process as well. That happens to one seed in five here (0, not 1).

    With a backend, ranks are compiled, the default on GPUs: collectives, batch statistics and DDP
    seen by the compiler, which here only traces them. (Translating takes minutes; `test_update.py`
    has that for one process.)
    """
    is_exact = dtype == torch.float64
    arguments = str(write_photo_beton(tmp_path / "data.beton", 160)), dtype, is_exact
    alone = updates(ALONE, *arguments)
    ranks = run_ranks(size, updates, *arguments, backend)
    of_terms, of_gradients, of_state = (1e-9,) * 3 if is_exact else (1e-5, 1e-5, 1e-4)
    for rank in ranks:
        require_equal(rank, alone, terms=of_terms, gradients=of_gradients, state=of_state)
        assert same(rank["state"], ranks[0]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks,per_rank", [(1, 4), (2, 2)])
def test_parts_of_a_batch_update_as_ranks_with_their_own_statistics(tmp_path, num_ranks, per_rank):
    """--accumulate on one rank, and on two with DDP, against four ranks with --bn-group 1."""
    data = str(write_photo_beton(tmp_path / "data.beton", 160))
    arguments = data, torch.float64, True, ""
    wanted = run_ranks(4, updates, *arguments, ("--bn-group=1",))[0]
    flags = (f"--accumulate={per_rank}", "--bn-group=1")
    parts = run_ranks(num_ranks, updates, *arguments, flags)[0]
    require_equal(parts, wanted, terms=1e-12, gradients=1e-10, state=1e-9, momentum=1e-9)
    whole = updates(ALONE, *arguments)  # batch norm over the whole batch gives other numbers
    assert whole["terms"] != pytest.approx(wanted["terms"], rel=1e-6)


@pytest.mark.slow
def test_an_encoder_of_timm_updates_alike_in_ranks_and_parts(tmp_path):
    """RegNet, whose norms have activations, with stochastic depth: one rank, two, and two parts."""
    data = str(write_photo_beton(tmp_path / "data.beton", 160))
    encoder = ("--encoder=timm/regnety_002", "--drop-path=0.3")
    arguments = data, torch.float64, True, ""
    alone = updates(ALONE, *arguments, encoder)
    together, apart_ranks = (
        run_ranks(2, updates, *arguments, (*encoder, *flags))[0]
        for flags in ((), ("--bn-group=1",))
    )
    parts = updates(ALONE, *arguments, (*encoder, "--accumulate=2"))
    for ours, wanted in ((together, alone), (parts, apart_ranks)):
        require_equal(ours, wanted, terms=1e-9, gradients=1e-9, state=1e-9)
    without = updates(ALONE, *arguments, encoder[:1])
    assert without["terms"] != pytest.approx(alone["terms"], rel=1e-6)


def collectives_of_the_papers_model(world: World) -> dict:
    model = BarlowTwins(Config(projector=(64, 64, 64)))
    batch_norm.set_process_group(model, world.group)
    with Traffic() as traffic:
        z_a, z_b = model(torch.randn(4, 3, 32, 32)).chunk(2)
        loss.barlow_twins_loss(z_a, z_b, group=world.group).backward()
    return dict(traffic.calls)


def test_collectives_of_a_step_of_the_papers_model():
    """55 batch norms, two sums each; three of the loss. (SyncBN as shipped, two calls: 224.)"""
    calls = run_ranks(2, collectives_of_the_papers_model)[0]
    assert calls == {"all_gather": 1, "all_reduce": 2 * 55 + 2}


def groups_of_a_job(world: World, data: str, *flags: str) -> tuple:
    """(whether DDP's group is batch norm's, whether batch norm's is the loss's, batch norm's
    ranks), after an update."""
    setup = build(parse_pretrain([*TINY, "--data", data, *flags]), world)
    gradients = setup.embed.process_group
    of_norm = setup.model.encoder.bn1.group
    of_loss = setup.objective.keywords["group"]
    train.update(setup, torch.randn(32 // world.size, 3, 32, 32))
    return gradients is of_norm, of_norm is of_loss, of_norm.size()


@pytest.mark.slow
def test_gradients_have_a_communicator_of_their_own(small_beton):
    data = str(small_beton)
    assert run_ranks(2, groups_of_a_job, data) == [(False, True, 2)] * 2
    one = run_ranks(2, groups_of_a_job, data, "--no-separate-communicators")
    assert one == [(True, True, 2)] * 2
    grouped = run_ranks(4, groups_of_a_job, data, "--bn-group=2")
    assert grouped == [(False, False, 2)] * 4


def weights_that_differ(world: World, differ: bool) -> str:
    layer = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    if differ and world.rank == 1:
        with torch.no_grad():
            layer.bias[2] = 1e-30
    try:
        compare_weights(layer, world.group)()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_rank_whose_weights_differ_is_named():
    assert run_ranks(2, weights_that_differ, False) == ["", ""]
    for message in run_ranks(2, weights_that_differ, True):
        assert "the weights of ranks [1] are no longer those of rank 0" in message
