"""Memory of the plan, against torch's allocations and by hand, and the GPU that is found."""

from dataclasses import replace

import pytest
import torch

from bt_fast.config import Config
from bt_fast.models.networks import BarlowTwins
from bt_fast.plan import dry_run, gpus

SMALL = Config(encoder="resnet18", size=32, small_images=True, projector=(96, 64), precision="fp32")


@pytest.mark.parametrize("change", [{}, {"small_images": False, "size": 64}, {"predictor": True}])
def test_activations_are_the_memory_a_forward_pass_leaves_allocated(change):
    config = replace(SMALL, **change)
    model = BarlowTwins(config)
    views = torch.randn(8, 3, config.size, config.size)
    with torch.profiler.profile(profile_memory=True) as profiler:
        output = model(views)
    left = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert output.requires_grad
    with torch.device("meta"):
        shapes = BarlowTwins(config)
        embeddings, saved = dry_run.forward(shapes, torch.empty_like(views, device="meta"))
    # The views existed before, and the gradient of the output does not need the output.
    expected = saved - views.nbytes + embeddings.nbytes
    assert left == pytest.approx(expected, rel=0.01)


def test_resnet50_with_256_images():
    """Of a view of 224 px, float values of a bottleneck stage: the three convolutions' outputs and
    what follows their norms. Stage 1, at 56 x 56: 3 x 2 x (64 + 64 + 256) x 3136 = 7.2 M; the
    others have half of that per block, and 4, 6 and 3 blocks: 4.8 + 3.6 + 0.9 M; two norms of the
    stem and its pool 1.8 M. With the blocks' shortcuts (0.8 + 0.4 + 0.2 + 0.1 M, before and behind
    the norm) and the larger first convolution of a stage: some 21 M values, 42 MB of bf16.
    """
    counted = dry_run.count_costs(Config())
    assert counted.saved_bytes / 2 == pytest.approx(42e6, rel=0.1)
    parts = dry_run.memory_bytes(Config(), counted, 256)
    assert 20e9 < parts["activations"] < 30e9
    assert parts["weights, gradients, optimizer"] == pytest.approx(14 * 174.5e6, rel=1e-3)
    assert 25e9 < sum(parts.values()) < 30e9
    whole = dry_run.count_costs(Config(precision="fp32"))
    assert whole.saved_bytes == pytest.approx(2 * counted.saved_bytes, rel=0.05)
    assert sum(dry_run.memory_bytes(Config(), whole, 256).values()) > 45e9


def test_the_largest_batch_fits_and_the_next_does_not():
    counted = dry_run.count_costs(SMALL)
    for card in (gpus.MODELS[0], gpus.H100):
        most = dry_run.largest_batch(SMALL, counted, card)
        assert most % 16 == 0 and most > 0
        assert sum(dry_run.memory_bytes(SMALL, counted, most).values()) <= card.memory
        assert sum(dry_run.memory_bytes(SMALL, counted, most + 16).values()) > card.memory
    assert dry_run.largest_batch(SMALL, counted, gpus.GpuModel(name="tiny", memory=2e9)) == 0
    assert dry_run.fitting_accumulate(SMALL, counted, gpus.H100, 16) == 1
    # More ranks gather more embeddings.
    config, counted = Config(), dry_run.count_costs(Config())
    alone, many = (dry_run.largest_batch(config, counted, gpus.H100, n) for n in (1, 32))
    assert 0.8 * alone < many < alone


def test_the_suggested_parts_fit_and_fewer_do_not():
    card = gpus.GpuModel(name="24 GB", memory=24e9)
    config, counted = Config(), dry_run.count_costs(Config())
    num_parts = dry_run.fitting_accumulate(config, counted, card, config.batch_size)

    def memory(parts):
        in_parts = replace(config, accumulate=parts)
        return sum(dry_run.memory_bytes(in_parts, counted, config.batch_size).values())

    assert config.batch_size % num_parts == 0
    assert memory(num_parts) <= card.memory < memory(num_parts // 2)
    rows = dry_run.memory_and_rate_rows(config, counted, 1)
    assert rows["GPUs of 24 GB"].endswith(f"of {config.batch_size} with --accumulate {num_parts}")
    tiny = replace(card, memory=3e9)
    assert dry_run.fitting_accumulate(config, counted, tiny, config.batch_size) is None


@pytest.mark.parametrize(
    "name, gibibytes, card",
    [
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100 80 GB"),
        ("NVIDIA H100 PCIe", 79.2, "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.5, None),
    ],
)
def test_a_gpu_is_recognised_by_its_name_and_memory(name, gibibytes, card):
    found = gpus.of_device(name, int(gibibytes * 2**30))
    expected = {known.name: known.bytes_per_s for known in gpus.MODELS}.get(card, 0)
    assert found.bytes_per_s == expected and found.name == name.removeprefix("NVIDIA ")
    assert 0.9 * gibibytes * 2**30 < found.memory < gibibytes * 2**30
    if card is not None:
        nominal = {known.name: known.memory for known in gpus.MODELS}[card]
        assert nominal < 1.01 * found.memory < 1.1 * nominal
