"""The fused kernels against the definition, in Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from conftest import INTERPRETER_FAILS, photographs

from pipelines import augment
from pipelines.augment import triton as augment_triton
from pipelines.order import view_keys

interpreted = pytest.mark.skipif(INTERPRETER_FAILS is not None, reason=str(INTERPRETER_FAILS))
STRONG = augment.Branch(blur=0.5, solarize=0.5, grayscale=0.3, jitter=0.9)


def batch(height: int, width: int, count: int = 6) -> torch.Tensor:
    pictures = [np.array(photo.resize((width, height))) for photo in photographs(count)]
    return torch.from_numpy(np.stack(pictures))


def difference(images: torch.Tensor, parameters: augment.Draw) -> torch.Tensor:
    """Fused minus definition in grey levels, [n, 3, H, W]."""
    expected = augment.apply(images, parameters, dtype=torch.float32)
    fused = augment_triton.apply(images, parameters, dtype=torch.float32)
    assert fused.is_contiguous(memory_format=torch.channels_last)
    std = torch.tensor(augment.IMAGENET_STD).view(3, 1, 1)
    return (fused - expected) * std * 255


@interpreted
@pytest.mark.parametrize("branch", [augment.VIEW_A, augment.VIEW_B, STRONG])
@pytest.mark.parametrize(
    "size",
    [pytest.param((224, 224), marks=pytest.mark.slow), (32, 32), (33, 47), (1, 5), (105, 52)],
)
def test_fused_views_equal_the_definition(size, branch):
    images = batch(*size)
    parameters = augment.draw(branch, view_keys(np.arange(len(images)), seed=1, epoch=0, view=0))
    found, blurred = difference(images, parameters).abs(), parameters.sigma > 0
    # In one sample of a thousand the mean could round differently, by one grey level.
    assert (found[~blurred] < 1e-3).all()
    assert (found[blurred] < 0.3).all()  # the operands are rounded to float16


@pytest.mark.slow
@interpreted
def test_every_order_of_the_jitter(photos):
    keys = view_keys(np.arange(400), seed=0, epoch=0, view=0)
    parameters = augment.draw(augment.Branch(blur=0, solarize=0, jitter=1), keys)
    images = batch(16, 16, 8).repeat(50, 1, 1, 1)
    assert len(torch.unique(parameters.order, dim=0)) == 24
    assert difference(images, parameters).abs().max() < 1e-3


def test_blur_kernels_are_half_precision_values_with_a_sum_of_1():
    sigma = torch.linspace(0, 2, 2001)
    kernels = augment_triton.half_kernels(sigma)
    assert torch.equal(kernels.half().float(), kernels)
    assert torch.equal(kernels.double().sum(1), torch.ones(2001, dtype=torch.float64))
    assert torch.allclose(kernels, augment.blur_kernels(sigma), rtol=0, atol=1.5e-3)


@pytest.mark.slow
@interpreted
def test_half_precision_does_not_darken_blurred_views():
    images = batch(224, 224, 12)
    keys = view_keys(np.arange(len(images)), seed=1, epoch=0, view=0)
    means = difference(images, augment.draw(augment.VIEW_A, keys)).mean((1, 2, 3))
    assert means.abs().max() < 0.02  # grey levels, of each view


@interpreted
def test_half_precision_output():
    images = batch(40, 40)
    parameters = augment.draw(STRONG, view_keys(np.arange(6), seed=0, epoch=0, view=1))
    expected = augment.apply(images, parameters, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        views = augment_triton.apply(images, parameters, dtype=dtype)
        assert views.dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
        assert torch.allclose(views.float(), expected, atol=tolerance)


def test_wrong_input_is_refused():
    parameters = augment.draw(STRONG, view_keys(np.arange(2), seed=0, epoch=0, view=0))
    with pytest.raises(ValueError, match="parameters for 2"):
        augment_triton.apply(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), parameters)
    huge = torch.zeros(1, dtype=torch.uint8).expand(2, 1 << 15, 1 << 14, 3)  # one byte in memory
    with pytest.raises(ValueError, match="fewer than 2 \\*\\* 29 pixels"):
        augment_triton.apply(huge, parameters)
