"""The fused kernels against the definition, in Triton's interpreter; and compiled for sm_90."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from conftest import photographs

from pipelines import augment, augment_triton
from pipelines.order import view_keys

ROOT = Path(__file__).parents[1]
STRONG = augment.Branch(blur=0.5, solarize=0.5, grayscale=0.3, jitter=0.9)


def batch(height: int, width: int, count: int = 6) -> torch.Tensor:
    pictures = [np.array(photo.resize((width, height))) for photo in photographs(count)]
    return torch.from_numpy(np.stack(pictures))


def difference(images: torch.Tensor, parameters: augment.Draw) -> torch.Tensor:
    """|fused - definition| in grey levels."""
    expected = augment.apply(images, parameters, dtype=torch.float32)
    fused = augment_triton.apply(images, parameters, dtype=torch.float32)
    assert fused.is_contiguous(memory_format=torch.channels_last)
    std = torch.tensor(augment.IMAGENET_STD).view(3, 1, 1)
    return ((fused - expected) * std * 255).abs()


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 47), (1, 5), (105, 52)])
@pytest.mark.parametrize("branch", [augment.VIEW_A, augment.VIEW_B, STRONG])
def test_fused_views_equal_the_definition(size, branch):
    images = batch(*size)
    keys = view_keys(np.arange(len(images)), seed=1, epoch=0, view=0)
    # One sample in a thousand could round its mean the other way: one level of contrast.
    assert difference(images, augment.draw(branch, keys)).max() < 1e-3


def test_every_order_of_the_jitter(photos):
    keys = view_keys(np.arange(400), seed=0, epoch=0, view=0)
    parameters = augment.draw(augment.Branch(blur=0, solarize=0, jitter=1), keys)
    images = batch(16, 16, 8).repeat(50, 1, 1, 1)
    assert len(torch.unique(parameters.order, dim=0)) == 24
    assert difference(images, parameters).max() < 1e-3


def test_half_precision_output():
    images = batch(40, 40)
    parameters = augment.draw(STRONG, view_keys(np.arange(6), seed=0, epoch=0, view=1))
    expected = augment.apply(images, parameters, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        views = augment_triton.apply(images, parameters, dtype=dtype)
        assert views.dtype == dtype
        assert torch.allclose(
            views.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 3e-3
        )


def test_wrong_input_is_refused():
    parameters = augment.draw(STRONG, view_keys(np.arange(2), seed=0, epoch=0, view=0))
    with pytest.raises(ValueError, match="parameters for 2"):
        augment_triton.apply(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), parameters)


def test_kernels_compile_for_sm_90_without_spilling():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "kernel_report.py"],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode and "cuobjdump" in done.stderr:
        pytest.skip("this triton comes without cuobjdump")
    assert done.returncode == 0, done.stdout + done.stderr
    registers = [int(number) for number in re.findall(r"(\d+) registers", done.stdout)]
    assert len(registers) == 5 and max(registers) <= 168  # 256 threads, one block and a half per SM
