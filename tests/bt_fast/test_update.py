"""One training step: the paper's update, or none."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from conftest import with_torchs_batch_norm
from tiny_runs import TINY

from bt_fast import train
from bt_fast.build import build
from bt_fast.cli import parse_pretrain
from bt_fast.evaluate.features import extract_features
from bt_fast.evaluate.views import Views
from bt_fast.optimizers import build_optimizer
from bt_fast.prefetch import augment_batch
from bt_fast.run import checkpoint
from bt_fast.step import compute_gradients, measure_step_seconds
from pipelines import augment
from tools import reference


@pytest.mark.parametrize("optimizer", ["lars", "adamw", "sgd"])
@pytest.mark.parametrize("first", [True, False])  # a first step that is skipped, or a later one
def test_a_step_that_is_not_finite_changes_nothing(small_beton, optimizer, first):
    rates = ["--lr-weights=0.01", "--lr-biases=0.01"] if optimizer != "lars" else []
    flags = [*TINY, "--data", str(small_beton), "--optimizer", optimizer, *rates]
    setup = build(parse_pretrain(flags))
    train.set_learning_rates(setup, 5)
    views = torch.randn(32, 3, 32, 32)
    assert first or train.update(setup, views)[2]

    def state():
        _, of_optimizer = checkpoint.state(setup.model, setup.optimizer)
        parameters, statistics = setup.model.parameters(), setup.statistics
        tensors = [*parameters, *of_optimizer.values(), statistics.running, statistics.counts]
        return [tensor.detach().clone() for tensor in tensors]

    before = state()
    views[19, 0, 0, 0] = float("nan")
    assert not train.update(setup, views)[2]
    assert all(map(torch.equal, state(), before))
    views[19, 0, 0, 0] = 0.0
    assert train.update(setup, views)[2]
    is_same = list(map(torch.equal, state(), before))
    assert not (all(is_same) if first else any(is_same))  # at first, some gradients are 0


@pytest.mark.parametrize(
    "name,theirs",
    [("adamw", torch.optim.AdamW), ("sgd", functools.partial(torch.optim.SGD, momentum=0.9))],
)
def test_other_optimizers_are_torchs_without_decay_of_biases(name, theirs):
    torch.manual_seed(0)
    models = [torch.nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = build_optimizer(name, models[0], weight_decay=0.1)
    decays = {"weight": 0.1, "bias": 0.0}
    parameters = models[1].named_parameters()
    groups = [{"params": [p], "weight_decay": decays[name]} for name, p in parameters]
    theirs = theirs(groups, lr=0.01, foreach=False)
    for group in ours.param_groups:
        group["lr"] = 0.01
    for step in range(4):
        inputs = torch.randn(3, 5)
        for model in models:
            model.zero_grad()
            model(inputs).square().sum().backward()
        guard = torch.tensor(float("nan") if step == 1 else 1.0)
        assert ours.step(guard=guard) == (step != 1)
        if step != 1:
            theirs.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_parts_need_the_memory_of_one_part(small_beton):
    """Bytes that are saved for the backward pass at the same time, of the encoder's tensors."""

    class Saved:
        peak = now = 0
        weights: frozenset[int] = frozenset()

        def __init__(self, tensor):
            storage = tensor.untyped_storage()
            self.tensor = tensor
            self.size = 0 if storage.data_ptr() in Saved.weights else storage.nbytes()
            Saved.now += self.size
            Saved.peak = max(Saved.peak, Saved.now)

        def __del__(self):
            Saved.now -= self.size

    peaks = {}
    for parts in (1, 4):
        flags = ["--data", str(small_beton), "--batch-size=32", f"--accumulate={parts}"]
        setup = build(parse_pretrain([*TINY, *flags]))
        Saved.peak = Saved.now = 0
        parameters = setup.model.parameters()
        Saved.weights = frozenset(p.untyped_storage().data_ptr() for p in parameters)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            assert train.update(setup, torch.randn(64, 3, 32, 32))[2]
        peaks[parts] = Saved.peak
    assert 0.24 < peaks[4] / peaks[1] < 0.3


def test_parts_keep_nothing_that_a_cuda_graph_overwrites(small_beton):
    """A graph's next call overwrites what it returned: embeddings, gradients and terms must be
    copies."""
    flags = [*TINY, "--data", str(small_beton), "--accumulate=2"]
    views = torch.randn(32, 3, 32, 32)
    *expected, _ = compute_gradients(build(parse_pretrain(flags)), views)
    setup = build(parse_pretrain(flags))
    setup.runtime = dataclasses.replace(setup.runtime, compile="reduce-overhead")
    objective, terms, addresses = setup.objective, [], {}
    embed, memory = setup.embed, torch.empty(16, 32)

    def embed_into_memory(part):
        z = embed(part)
        return z if z.requires_grad else memory.copy_(z)

    setup.embed = embed_into_memory

    def kept(*embeddings):
        terms.extend(objective(*embeddings))
        return tuple(terms)

    setup.objective = kept
    for p in setup.model.parameters():
        addresses[p] = set()
        p.register_hook(lambda gradient, p=p: addresses[p].add(gradient.data_ptr()))
    *found, _ = compute_gradients(setup, views)
    assert all(map(torch.equal, found, terms)) and all(map(torch.equal, found, expected))
    assert not {t.data_ptr() for t in found} & {t.data_ptr() for t in terms}
    assert not any(p.grad.data_ptr() in returned for p, returned in addresses.items())


def test_rehearsal_leaves_no_trace(small_beton):
    arguments = [*TINY, "--data", str(small_beton)]
    setup, untouched = (build(parse_pretrain(arguments)) for _ in range(2))
    assert measure_step_seconds(setup)[32] > 0
    ours, theirs = setup.model.state_dict(), untouched.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(p.grad is None for p in setup.model.parameters())


@pytest.mark.slow
def test_a_compiled_update_equals_an_eager_one(small_beton):
    """Both through one step and a skipped one: weights, momentum and statistics."""
    states = []
    for mode in ("off", "default"):
        flags = [*TINY, "--data", str(small_beton), "--precision=fp32", f"--compile={mode}"]
        setup = build(parse_pretrain(flags))
        train.set_learning_rates(setup, 8)
        torch.manual_seed(0)
        views = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
        terms = [train.update(setup, views)[:2]]
        views[3, 0, 0, 0] = float("nan")
        assert not train.update(setup, views)[2]
        momenta = [setup.optimizer.state[p]["momentum"] for p in setup.model.parameters()]
        states.append([*terms[0], setup.statistics.running, *momenta, *setup.model.parameters()])
    for eager, compiled in zip(*states, strict=True):
        assert (compiled - eager).norm() <= 2e-3 * eager.norm() + 1e-6


def reference_gradients(model, views, *, lambd, grad_scale) -> None:
    """As the paper describes them, from scratch."""
    z_a, z_b = (model(view) for view in views)
    norm_a, norm_b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_a, z_b))
    correlation = norm_a.T @ norm_b / len(z_a)
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    loss = ((1 - correlation.diagonal()) ** 2).sum() + lambd * (off_diagonal**2).sum()
    model.zero_grad()
    (loss * grad_scale).backward()


def test_the_loop_trains_as_the_paper_says(small_beton):
    """Everything between the modules: views, loss, scale, rates, decay, momentum, statistics."""
    flags = ["--encoder=resnet18", "--size=32", "--batch-size=16", "--projector", "24", "24"]
    flags += ["--epochs=12", "--precision=fp32", "--device=cpu", "--weight-decay=0.02"]
    flags += ["--lr-weights=3", "--lr-biases=0.5", "--lambd=0.02"]
    setup = build(parse_pretrain(["--data", str(small_beton), *flags]))
    model = with_torchs_batch_norm(setup.model)
    start = [p.detach().clone() for p in model.parameters()]
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    lars = reference.Lars([{"params": params} for params in groups], 0.0, weight_decay=0.02)
    branches = augment.VIEW_A, augment.VIEW_B
    for batch in setup.loader.batches(0, 4):
        rate = 16 / 256 * batch.request.step / 40  # linear warm-up: 10 epochs of 4 steps
        views = [
            augment.apply(images, augment.draw(branch, keys), dtype=torch.float32)
            for images, branch, keys in zip(batch.views, branches, batch.request.keys, strict=True)
        ]
        reference_gradients(model, views, lambd=0.02, grad_scale=1 / 16)
        lars.param_groups[0]["lr"], lars.param_groups[1]["lr"] = 3 * rate, 0.5 * rate
        lars.step()
        rates = train.set_learning_rates(setup, batch.request.step)
        assert rates == pytest.approx({"lr_weights": 3 * rate, "lr_biases": 0.5 * rate})
        assert train.update(setup, augment_batch(batch, branches, setup.runtime))[2]
    trained = zip(start, setup.model.parameters(), model.parameters(), strict=True)
    for before, ours, theirs in trained:
        moved = (theirs - before).norm()
        assert (ours - theirs).norm() <= 2e-3 * moved + 1e-9
    for name, buffer in model.named_buffers():
        assert torch.allclose(setup.model.get_buffer(name), buffer, rtol=1e-3, atol=1e-5)


def test_a_probe_sees_single_images_and_leaves_no_trace(small_beton):
    setup = build(parse_pretrain([*TINY, "--data", str(small_beton)]))
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    samples = np.arange(12)
    views = Views(setup.dataset, setup.runtime, size=32, num_threads=2)
    encoder = setup.model.encoder
    whole = extract_features(encoder, views, samples, crop=1.0)
    part = extract_features(encoder, views, samples[3:5], crop=1.0)
    closer = extract_features(encoder, views, samples, crop=0.5)
    assert torch.allclose(whole[3:5], part, atol=1e-2)  # bf16
    assert not torch.allclose(whole, closer, atol=1e-2)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in setup.model.state_dict().items())
