"""tools/launches.py: how many kernels a step launches that is not compiled."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.append(str(Path(__file__).parents[2] / "tools"))  # where a script finds `_checkout`

from tools.launches import count

# Of ResNet-50 and the paper's projector; with the kernels of --norm fused, alone and on eight
# ranks, and with torch's.
MOST = {
    "convolutions": 158,  # 53 forwards; backwards two each, and one of the first
    "products": 13,  # 9 of the projector, 4 of the loss
    "casts": 20,
    "optimizer": 5,
    "statistics": 5,
    "norm": 208,  # four for each of 55 norms, shared where two are added
    "other": 58,  # the loss, its scale, the average pool
}


def test_of_a_step_with_fused_norms():
    counted = count()
    assert counted == MOST
    assert counted.total() <= 467


def test_over_ranks_only_collectives_are_added():
    counted = count(num_ranks=8)
    # Two of each of 51 calls of batch norm; one gather and two sums of the loss.
    assert counted.pop("collectives") == 105
    assert counted.pop("other") <= MOST["other"] + 4
    assert counted == {group: most for group, most in MOST.items() if group != "other"}


def test_of_a_step_with_torchs_batch_norm():
    counted = count(fused=False)
    assert counted["casts"] == MOST["casts"]
    assert counted["norm"] == 2 * (2 * 55 + 51 + 1)  # both ways: norms of two views, ReLU, max-pool
    assert counted.total() <= 890
