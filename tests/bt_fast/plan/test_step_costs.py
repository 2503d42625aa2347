"""Predicted steps of many ranks."""

from dataclasses import replace

import pytest

from bt_fast.plan import dry_run, gpus, step_costs
from bt_fast.recipes import RECIPES


def measured(**changes) -> step_costs.StepTimes:
    values = {
        "embedding_itemsize": 2, "images": 64, "optimizer": 1e-3,
        "encoder": 0.02, "backward": 0.013, "loss": 2e-4,
        "num_parameters": 174_535_744, "num_projector_parameters": 151_027_712,
        "num_dimensions": 8192, "num_norm_layers": 55,
    }  # fmt: skip
    return step_costs.StepTimes(**values | changes)


def test_one_rank_is_predicted_as_it_was_measured():
    alone = step_costs.predict(measured(), 1, 400)
    assert alone.step == pytest.approx(0.0212) and alone.efficiency == pytest.approx(1)
    assert alone.gradient_bytes == alone.embedding_bytes == alone.collectives == 0


def test_the_prediction_counts_bytes_and_what_the_backward_pass_hides():
    many = step_costs.predict(measured(), 32, 50)  # eight cards of a machine: 50 GB/s
    assert many.gradient_bytes == pytest.approx(2 * 31 / 32 * 698_142_976)
    assert many.embedding_bytes == 31 * 2 * 64 * 8192 * 2  # bf16, both views
    assert many.collectives == 2 * 55 + 3
    assert many.seconds["collectives, latency"] == pytest.approx(113 * 45e-6)
    assert many.seconds["loss"] == pytest.approx(2e-4 * 32)  # n rows against N columns
    wide = step_costs.predict(measured(images=8192, num_dimensions=1024), 32, 50)
    assert wide.seconds["loss"] == pytest.approx(2e-4)  # columns of C: 6 n D^2 on every rank
    on_the_wire = many.gradient_bytes / 50e9
    assert many.hidden == pytest.approx(0.9 * 0.013)
    assert many.seconds["gradients, exposed"] == pytest.approx(on_the_wire - 0.9 * 0.013)
    assert step_costs.predict(measured(), 32, 40_000).seconds["gradients, exposed"] == 0
    halved = step_costs.predict(measured(gradient_itemsize=2), 32, 50)
    assert halved.gradient_bytes == pytest.approx(many.gradient_bytes / 2)
    near = [step_costs.predict(measured(), 8, gbps).step for gbps in (10, 400)]
    assert near[0] == near[1]  # on one machine no network card counts
    assert many.images_per_s == pytest.approx(32 * 64 / many.step)


def test_the_plan_of_32_gpus_with_64_images_is_what_was_reckoned_by_hand():
    """By hand, for H200: an encoder of 77 ms with 256 images, so 22 with 64; 5 of collectives, LARS
    1.2; with one communicator the projector's 604 MB are 4 ms of waiting."""
    config = replace(RECIPES["imagenet"](), norm="compiled")
    counted = dry_run.count_costs(config)
    measured = dry_run.single_gpu(config, counted, 64, gpus.H200)
    apart, shared = (
        step_costs.predict(measured, 32, dry_run.LINK_GBPS, separate_communicators=separate)
        for separate in (True, False)
    )
    assert 0.030 < shared.step < 0.034
    assert 0.0035 < shared.step - apart.step < 0.0045
    assert shared.hidden < apart.hidden
    full = dry_run.single_gpu(config, counted, 256, gpus.H200)
    assert full.encoder == pytest.approx(0.077, rel=0.05)
    usual = step_costs.predict(full, 1, dry_run.LINK_GBPS)
    assert 0.65 < apart.images_per_s / (32 * usual.images_per_s) < 0.8
    # What does not shrink with the batch: a quarter of the images takes more than a quarter.
    assert 0.002 < measured.encoder - full.encoder / 4 < 0.003


def test_batch_norm_in_groups_stays_on_a_machine():
    latency = "collectives, latency"
    whole, groups, none = (
        step_costs.predict(measured(), 32, 400, norm_ranks=ranks) for ranks in (0, 8, 1)
    )
    assert whole.seconds[latency] - groups.seconds[latency] == pytest.approx(110 * 20e-6)
    assert none.collectives == 3 and none.seconds[latency] == pytest.approx(3 * 45e-6)
