"""Crop boxes against torchvision's distribution; pixels of crops against Pillow's."""

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import jpeg_bytes
from PIL import Image
from torchvision.transforms import RandomResizedCrop as Reference

from pipelines.crop import RandomResizedCrop, center_boxes, crop_and_resize, random_boxes
from pipelines.order import view_keys


@pytest.mark.parametrize(
    "field,value", [("size", 0), ("scale", (1, 0.2)), ("scale", (0, 2)), ("ratio", (4, 1))]
)
def test_a_crop_that_cannot_be_drawn_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        RandomResizedCrop(**{field: value})


def boxes_of(height: int, width: int, count: int, crop: RandomResizedCrop | None = None):
    keys = view_keys(np.arange(count), seed=0, epoch=0, view=0)
    sizes = np.full(count, height), np.full(count, width)
    return random_boxes(crop or RandomResizedCrop(), keys, *sizes)


@pytest.mark.parametrize("height,width", [(375, 500), (500, 333), (32, 32), (100, 900)])
def test_boxes_are_distributed_like_torchvisions(height, width):
    ours = boxes_of(height, width, 4000)
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    theirs = np.array(
        [Reference.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    grid = np.linspace(0, 1, 101)
    for column in range(4):  # two-sample Kolmogorov-Smirnov on top, left, height, width
        values = np.quantile(np.concatenate([ours[:, column], theirs[:, column]]), grid)
        gaps = [
            abs(np.mean(ours[:, column] <= v) - np.mean(theirs[:, column] <= v)) for v in values
        ]
        assert max(gaps) < 1.95 * np.sqrt(2 / 4000)  # p = 0.001
    correlations = np.corrcoef(ours.T), np.corrcoef(theirs.T)
    assert np.abs(np.subtract(*correlations)).max() < 0.1  # four standard errors


@pytest.mark.parametrize(
    "height,width", [(1, 1), (1, 400), (400, 1), (3, 2), (224, 224), (4000, 30)]
)
def test_boxes_lie_inside_images_of_any_shape(height, width):
    top, left, box_height, box_width = boxes_of(height, width, 500).T
    assert (box_height >= 1).all() and (box_width >= 1).all()
    assert (top >= 0).all() and (top + box_height <= height).all()
    assert (left >= 0).all() and (left + box_width <= width).all()


def test_center_box_is_resize_256_crop_224():
    assert center_boxes(0.875, [400], [600]).tolist() == [[25, 125, 350, 350]]
    assert center_boxes(1.0, [32], [32]).tolist() == [[0, 0, 32, 32]]


@pytest.mark.parametrize("size", [32, 224])
def test_crop_pixels_equal_pillows_bicubic(photos, size):
    differences = []
    for index, photo in enumerate(photos):
        decoded = simplejpeg.decode_jpeg(jpeg_bytes(photo))
        box = boxes_of(photo.height, photo.width, 20)[index]
        top, left, height, width = box.tolist()
        # Both resize the same decoded pixels.
        picture = Image.fromarray(decoded)
        expected = picture.crop((left, top, left + width, top + height)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        ours = np.empty((size, size, 3), np.uint8)
        crop_and_resize(decoded, box, out=ours)
        difference = np.abs(ours.astype(int) - np.array(expected).astype(int))
        # Pillow clamps to 0..255 between its two passes: a few overshooting pixels differ more.
        assert np.quantile(difference, 0.999) <= 3
        differences.append(difference.mean())
    assert np.mean(differences) < 0.25 and max(differences) < 0.5
