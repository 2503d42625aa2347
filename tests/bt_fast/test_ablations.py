"""Every ablation trains, on one rank or two, and its loss equals an independent formula."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import with_torchs_batch_norm
from ranks import TINY, embeddings, run_ranks, share_of

from bt_fast import train
from bt_fast.ablations import ABLATIONS, BATCH_SIZES, GRIDS, ablate
from bt_fast.build import build
from bt_fast.cli import main, parse_pretrain
from bt_fast.config import Config
from bt_fast.distributed.collectives import ALONE, World
from bt_fast.export.encoder_files import read_pretrained
from bt_fast.loss_variants import Objective, objective_function
from bt_fast.models.networks import BarlowTwins
from bt_fast.prefetch import prefetch
from bt_fast.recipes import RECIPES

OBJECTIVES = Objective.__args__
T = 0.3


def formula(
    objective: str, z_a: torch.Tensor, z_b: torch.Tensor, temperature: float = T
) -> tuple[float, float]:
    """Both terms, element by element in float64, from the paper's text."""
    n, d = z_a.shape
    a, b = ([[x.item() for x in row] for row in z.double()] for z in (z_a, z_b))

    def centred(z: list) -> list:
        means = [sum(row[i] for row in z) / n for i in range(d)]
        return [[row[i] - means[i] for i in range(d)] for row in z]

    def standard(z: list) -> list:
        z = centred(z)
        scale = [math.sqrt(sum(row[i] ** 2 for row in z) / n + 1e-5) for i in range(d)]
        return [[row[i] / scale[i] for i in range(d)] for row in z]

    def products(a: list, b: list, divisor: float) -> dict:
        return {
            (i, j): sum(row_a[i] * row_b[j] for row_a, row_b in zip(a, b, strict=True)) / divisor
            for i, j in itertools.product(range(d), repeat=2)
        }

    def on(c: dict) -> float:
        return sum((1 - c[i, i]) ** 2 for i in range(d))

    def off(c: dict) -> float:
        return sum(value**2 for (i, j), value in c.items() if i != j)

    if objective == "imax":

        def log_determinant(z: list) -> float:
            c = products(centred(z), centred(z), n)
            matrix = [[c[i, j] + 1e-5 * (i == j) for j in range(d)] for i in range(d)]
            log = 0.0
            for k in range(d):  # Gaussian elimination; a covariance needs no pivoting
                log += math.log(matrix[k][k])
                for row in matrix[k + 1 :]:
                    factor = row[k] / matrix[k][k]
                    row[:] = [x - factor * y for x, y in zip(row, matrix[k], strict=True)]
            return log

        def combined(sign: int) -> list:
            pairs = zip(a, b, strict=True)
            return [[x + sign * y for x, y in zip(*rows, strict=True)] for rows in pairs]

        return log_determinant(combined(-1)), -log_determinant(combined(1))
    if objective == "covariance":
        c = products(centred(a), centred(b), n)
    elif objective == "feature-norm":
        unit = [[[x / math.hypot(*row) for x in row] for row in standard(z)] for z in (a, b)]
        c = products(*unit, 1)
    else:
        c = products(standard(a), standard(b), n)
    if objective == "cross-entropy":
        diagonal = sum(math.exp(c[i, i] / temperature) for i in range(d))
        rest = sum(math.exp(max(value, 0) / temperature) for (i, j), value in c.items() if i != j)
        return -math.log(diagonal), math.log(rest)
    if objective == "auto-correlation":
        terms = [off(products(standard(z), standard(z), n)) for z in (a, b)]
        return on(c), sum(terms) / 2
    return (0.0 if objective == "redundancy-only" else on(c)), off(c)


@pytest.mark.parametrize("n,d", [(5, 9), (12, 6)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_equals_its_formula(objective, n, d):
    z = embeddings(n, d)
    found = [term.item() for term in objective_function(objective, T)(*z)]
    assert found == pytest.approx(formula(objective, *z), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("n,d", [(4, 6), (6, 3)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_every_objective_pass_gradcheck(objective, n, d):
    def loss(z_a, z_b):
        on, off = objective_function(objective, T)(z_a, z_b)
        return on + 0.3 * off

    # imax multiplies rounding errors by 1 / EPS in the null space of the centred rows.
    assert torch.autograd.gradcheck(loss, tuple(embeddings(n, d)), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_embeddings_are_computed_in_float32(objective):
    z = [part.detach().bfloat16() for part in embeddings(12, 6)]
    with torch.autocast("cpu", torch.bfloat16):
        on, off = objective_function(objective, T)(*z)
    assert on.dtype == off.dtype == torch.float32
    assert [on.item(), off.item()] == pytest.approx(formula(objective, *z), rel=1e-4)


def test_objectives_need_no_d_by_d_matrix_for_few_samples():
    """With 65,536 dimensions, a D x D matrix would take 17 GB."""
    z = [torch.randn(4, 65_536, requires_grad=True) for _ in range(2)]
    for objective in OBJECTIVES:
        if objective != "cross-entropy":
            sum(objective_function(objective)(*z)).backward()
            assert all(part.grad.isfinite().all() for part in z), objective


def tiny(name: str, *flags: str) -> Config:
    """An ablation of a small recipe, with a batch of 16 and projector layers of at most 48."""
    config = ablate(parse_pretrain([*TINY, *flags]), name)
    widths = tuple(min(width, 48) for width in config.projector)
    return dataclasses.replace(config, batch_size=16, projector=widths)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_and_its_loss_equals_the_formula(name, small_beton, monkeypatch):
    monkeypatch.setitem(BATCH_SIZES, 16, BATCH_SIZES[2048])
    config = tiny(name, "--data", str(small_beton))
    setup = build(config)
    encoder = setup.model.encoder
    before = [p.detach().clone() for p in encoder.parameters()]
    branches = config.view_a, config.view_b
    for index, views in enumerate(prefetch(setup.loader.batches(0, 2), branches, setup.runtime)):
        if index == 0:
            z_a, z_b = setup.model(views).detach().chunk(2)
            on, off = formula(config.objective, z_a, z_b, config.temperature)
            expected = on + config.lambd * off
        train.set_learning_rates(setup, 4)
        on_diagonal, off_diagonal, applied = train.update(setup, views)
        assert applied
        if index == 0:
            loss = (on_diagonal + config.lambd * off_diagonal).item()
            assert loss == pytest.approx(expected, rel=1e-4)
    unchanged = [*map(torch.equal, encoder.parameters(), before)]
    assert sum(unchanged) < len(unchanged) / 2


def results_of_rank(world: World, data: str) -> dict:
    """Terms and gradients of every objective, and weights after two updates of some ablations."""
    found = {}
    for objective, (n, d) in itertools.product(OBJECTIVES, [(8, 12), (16, 6)]):
        z = [part.detach()[share_of(world, n)].requires_grad_() for part in embeddings(n, d)]
        on, off = objective_function(objective, T, world.group)(*z)
        (on + 0.3 * off).backward()
        found[objective, n] = torch.stack([on, off]).detach(), torch.stack([p.grad for p in z])
    for name in UPDATED:
        setup = build(tiny(name, "--data", data), world)
        branches = setup.config.view_a, setup.config.view_b
        for views in prefetch(setup.loader.batches(0, 2), branches, setup.runtime):
            train.set_learning_rates(setup, 4)
            assert train.update(setup, views)[2]
        found[name] = dict(setup.model.state_dict())
    return found


UPDATED = ("predictor-stop-gradient", "cross-entropy", "no-normalisation")


@pytest.mark.slow
def test_every_ablation_is_the_same_on_two_ranks(small_beton):
    expected = results_of_rank(ALONE, str(small_beton))
    ranks = run_ranks(2, results_of_rank, str(small_beton))
    for case in itertools.product(OBJECTIVES, (8, 16)):
        terms, gradients = expected[case]
        for rank in ranks:
            assert torch.allclose(rank[case][0], terms, rtol=1e-10), case
        gathered = torch.cat([rank[case][1] for rank in ranks], 1)
        assert (gathered - gradients).norm() <= 1e-9 * gradients.norm(), case
    for name in UPDATED:
        for key, weight in expected[name].items():
            weight, (first, second) = weight.float(), (rank[name][key].float() for rank in ranks)
            assert (first - weight).norm() <= 1e-3 * weight.norm() + 1e-4, (name, key)
            assert torch.equal(first, second), (name, key)


def test_predictor_and_stop_gradient_equal_two_networks():
    """Each view by a network with torch's batch norm; view B's without gradient."""
    torch.manual_seed(0)
    model = BarlowTwins(
        Config(encoder="resnet18", projector=(24, 16), predictor=True, stop_gradient=True)
    )
    reference = with_torchs_batch_norm(model)
    views = torch.randn(12, 3, 32, 32)
    weight = torch.randn(12, 16)
    (model(views) * weight).sum().backward()
    view_a, view_b = views.chunk(2)
    z_a = reference.predictor(reference.projector(reference.encoder(view_a)))
    with torch.no_grad():
        z_b = reference.projector(reference.encoder(view_b))
    z = torch.cat([z_a, z_b])
    assert torch.allclose(model(views), z, rtol=1e-4, atol=1e-5)
    (z * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-5, name
    assert [m.out_features for m in model.predictor if hasattr(m, "out_features")] == [16, 16]


def test_evaluation_mode_has_no_predictor():
    model = BarlowTwins(
        Config(encoder="resnet18", projector=(24, 16), predictor=True, stop_gradient=True)
    ).eval()
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(model(images), model.projector(model.encoder(images)))


def test_a_projector_without_batch_norm_is_saved_and_read(small_beton, tmp_path):
    flags = [*TINY, "--ablation=no-projector-bn", "--max-steps=1", "--data", str(small_beton)]
    run = tmp_path / "run"
    assert main(["pretrain", *flags, "--run-dir", str(run)]) == 0
    found = read_pretrained(run, projector=True)
    assert [type(layer).__name__ for layer in found.projector] == ["Linear", "ReLU", "Linear"]
    assert main(["pretrain", *flags[:-4], "--resume", str(run), "--max-steps=2"]) == 0


def test_batch_sizes_have_the_authors_learning_rates():
    """https://github.com/facebookresearch/barlowtwins/issues/7"""
    assert set().union(*GRIDS.values()) == set(ABLATIONS)
    figure2 = [ablate(RECIPES["imagenet"](), name) for name in GRIDS["figure2"]]
    rates = [config.lr_weights for config in figure2]
    assert rates == pytest.approx([0.7, 0.4, 0.3, 0.25, 0.2, 0.2])
    assert [config.lr_biases / config.lr_weights for config in figure2] == pytest.approx(
        [0.024] * 6
    )
    assert ablate(RECIPES["cifar10"](), "batch-128").lr_weights == pytest.approx(3 * 0.7 / 0.4)


def test_flags_override_the_ablation_which_overrides_the_recipe():
    config = parse_pretrain(["--recipe=cifar10", "--ablation=cross-entropy", "--lambd=0.5"])
    assert (config.recipe, config.ablation) == ("cifar10", "cross-entropy")
    assert (config.objective, config.lambd, config.size) == ("cross-entropy", 0.5, 32)
