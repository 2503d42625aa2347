"""Every augmentation op against Pillow or torchvision, and the parameters' distributions."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import ImageFilter, ImageOps

from pipelines import augment
from pipelines.augment import VIEW_A, VIEW_B, Branch, Draw
from pipelines.order import view_keys


def keys_of(count: int, epoch: int = 0, view: int = 0) -> np.ndarray:
    return view_keys(np.arange(count), seed=0, epoch=epoch, view=view)


def neutral(count: int, **changes) -> Draw:
    """Parameters that change nothing, but for `changes`."""
    values = {
        "flip": torch.zeros(count, dtype=torch.bool),
        "jitter": torch.zeros(count, dtype=torch.bool),
        "factors": torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1),
        "order": torch.arange(4).repeat(count, 1),
        "grayscale": torch.zeros(count, dtype=torch.bool),
        "sigma": torch.zeros(count),
        "solarize": torch.zeros(count, dtype=torch.bool),
    }
    return Draw(**{**values, **changes})


def to_batch(pictures) -> torch.Tensor:
    """PIL images of one size -> uint8 [n, H, W, 3]."""
    return torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))


def grey_levels(normalised: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: [n, 3, H, W] -> float [n, H, W, 3] in [0, 255]."""
    mean, std = np.array(augment.IMAGENET_MEAN), np.array(augment.IMAGENET_STD)
    return (normalised.permute(0, 2, 3, 1).double().numpy() * std + mean) * 255


def compare(pictures, parameters: Draw, oracle) -> np.ndarray:
    """Absolute difference between `apply` and oracle(picture, row) in grey levels, [n, H, W, 3]."""
    ours = grey_levels(augment.apply(to_batch(pictures), parameters, dtype=torch.float32))
    theirs = np.stack([np.array(oracle(picture, i)) for i, picture in enumerate(pictures)])
    return np.abs(ours - theirs)


@pytest.fixture(scope="module", params=[(224, 224), (33, 47)])
def pictures(request, photos):
    return [photo.resize(request.param[::-1]) for photo in photos]


def test_neutral_parameters_change_nothing(pictures):
    assert compare(pictures, neutral(len(pictures)), lambda p, i: p).max() < 1e-4


def test_flip(pictures):
    flip = torch.arange(len(pictures)) % 2 == 0
    difference = compare(
        pictures, neutral(len(pictures), flip=flip), lambda p, i: TF.hflip(p) if flip[i] else p
    )
    assert difference.max() < 1e-4


@pytest.mark.parametrize(
    "column,function,mean_limit,max_limit",
    [
        # Pillow truncates to integers: a difference of 0.5 on average.
        (augment.BRIGHTNESS, TF.adjust_brightness, 0.55, 1.01),
        (augment.CONTRAST, TF.adjust_contrast, 0.75, 1.6),  # the mean may round differently
        (augment.SATURATION, TF.adjust_saturation, 0.55, 1.3),
        # Pillow's HSV has 256 hues and 256 saturations, whose rounding dominates.
        (augment.HUE, TF.adjust_hue, 2.0, 12),
    ],
)
def test_each_jitter_op_against_pillow(pictures, column, function, mean_limit, max_limit):
    n = len(pictures)
    parameters = augment.draw(Branch(blur=0, solarize=0, jitter=1), keys_of(n))
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(n, 1)
    factors[:, column] = parameters.factors[:, column]
    difference = compare(
        pictures,
        neutral(n, jitter=torch.ones(n, dtype=torch.bool), factors=factors),
        lambda p, i: function(p, factors[i, column].item()),
    )
    assert difference.mean() < mean_limit
    assert np.quantile(difference, 0.999) <= max_limit


def test_jitter_runs_in_the_order_of_each_sample(pictures):
    n = len(pictures)
    # Strong factors, because the order of weak ones has little effect; no hue, because Pillow's is
    # coarse.
    strong = Branch(blur=0, solarize=0, flip=0, grayscale=0, jitter=1,
                    brightness=0.8, contrast=0.8, saturation=0.8, hue=0)  # fmt: skip
    parameters = augment.draw(strong, keys_of(n))
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)

    def jitter(picture, i, order):
        for op in order:
            if op != augment.HUE:
                picture = functions[op](picture, parameters.factors[i, op].item())
        return picture

    drawn = compare(pictures, parameters, lambda p, i: jitter(p, i, parameters.order[i].tolist()))
    fixed = compare(pictures, parameters, lambda p, i: jitter(p, i, range(4)))
    assert drawn.mean() < 1.5
    assert drawn.mean() < 0.6 * fixed.mean()


def test_grayscale(pictures):
    n = len(pictures)
    selected = torch.arange(n) % 3 == 0
    difference = compare(
        pictures,
        neutral(n, grayscale=selected),
        lambda p, i: TF.to_grayscale(p, num_output_channels=3) if selected[i] else p,
    )
    assert difference.max() <= 0.51  # Pillow rounds to integers


def test_blur_equals_pillows_at_every_sigma(pictures):
    n = len(pictures)
    sigma = torch.linspace(0.1, 2.0, n)
    difference = compare(
        pictures,
        neutral(n, sigma=sigma),
        lambda p, i: p.filter(ImageFilter.GaussianBlur(radius=sigma[i].item())),
    )
    # Pillow rounds to integers after each of its six passes, which dominates.
    inside = difference[:, 8:-8, 8:-8]
    assert inside.mean() < 0.5 and inside.max() < 3.5
    # Pillow replicates the edge before each box filter, `blur` before all three.
    assert difference.mean() < 0.65 and difference.max() < 32


def test_blur_kernels_have_the_gaussians_variance():
    sigma = torch.linspace(0.1, 2.0, 50, dtype=torch.float64)
    kernels = augment.blur_kernels(sigma)
    distance = torch.arange(-6, 7, dtype=torch.float64)
    assert kernels.shape == (50, 13)
    assert torch.allclose(kernels.sum(1), torch.ones(50, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((kernels * distance**2).sum(1), sigma**2, atol=1e-9)
    assert (kernels >= 0).all()


def test_blur_kernels_are_computed_without_a_loop_over_views():
    """The host computes them for every step, while decoding threads use its cores."""
    sigma, boxes = torch.rand(4096), torch.rand(1, 4096, 13).double()

    def grouped() -> None:
        for _ in range(2):
            torch.conv1d(boxes, boxes[0, :, None, :5], padding=2, groups=4096)

    def seconds(function, *arguments) -> float:
        started = time.process_time()
        function(*arguments)
        return time.process_time() - started

    ours = min(seconds(augment.blur_kernels, sigma) for _ in range(5))
    assert ours < min(seconds(grouped) for _ in range(5)) / 2


def test_solarize(pictures):
    n = len(pictures)
    selected = torch.arange(n) % 2 == 1
    difference = compare(
        pictures,
        neutral(n, solarize=selected),
        lambda p, i: ImageOps.solarize(p, 128) if selected[i] else p,
    )
    assert difference.max() < 1e-4


def test_normalisation_equals_torchvisions(pictures):
    ours = augment.normalise_only(to_batch(pictures), dtype=torch.float32)
    tensors = [TF.to_tensor(picture) for picture in pictures]
    expected = torch.stack(
        [TF.normalize(t, augment.IMAGENET_MEAN, augment.IMAGENET_STD) for t in tensors]
    )
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("branch,name", [(VIEW_A, "a"), (VIEW_B, "b")])
def test_complete_branch_against_pillow(photos, branch, name):
    pictures = [photo.resize((96, 96)) for photo in photos]
    parameters = augment.draw(branch, keys_of(len(pictures), view="ab".index(name)))
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)

    def reference(picture, i):
        if parameters.flip[i]:
            picture = TF.hflip(picture)
        if parameters.jitter[i]:
            for op in parameters.order[i].tolist():
                picture = functions[op](picture, parameters.factors[i, op].item())
        if parameters.grayscale[i]:
            picture = TF.to_grayscale(picture, num_output_channels=3)
        if parameters.sigma[i] > 0:
            radius = parameters.sigma[i].item()
            picture = picture.filter(ImageFilter.GaussianBlur(radius=radius))
        return ImageOps.solarize(picture, 128) if parameters.solarize[i] else picture

    assert compare(pictures, parameters, reference).mean() < 2.5


@pytest.mark.parametrize("branch", [VIEW_A, VIEW_B])
def test_parameters_follow_the_papers_probabilities(branch):
    n = 40_000
    drawn = augment.draw(branch, keys_of(n))

    def assert_probability(flags, probability):
        error = 4.5 * (probability * (1 - probability) / n) ** 0.5
        assert abs(flags.float().mean().item() - probability) <= error

    assert_probability(drawn.flip, 0.5)
    assert_probability(drawn.jitter, 0.8)
    assert_probability(drawn.grayscale, 0.2)
    assert_probability(drawn.sigma > 0, branch.blur)
    assert_probability(drawn.solarize, branch.solarize)

    def assert_uniform(values, low, high):
        assert low <= values.min() and values.max() <= high
        ranks = (values.sort().values - low) / (high - low)
        expected = (torch.arange(len(values)) + 0.5) / len(values)
        assert (ranks - expected).abs().max() < 2.2 / len(values) ** 0.5

    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert_uniform(drawn.factors[drawn.jitter, column], low, high)
    assert_uniform(drawn.sigma[drawn.sigma > 0], 0.1, 2.0)
    assert (drawn.factors[~drawn.jitter] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()

    columns = torch.cat([drawn.factors, drawn.order.float(), drawn.sigma[:, None]], 1)
    correlation = np.corrcoef(columns[drawn.jitter & (drawn.sigma > 0)].T.numpy())
    assert np.abs(correlation[:4, 4:]).max() < 5 / (drawn.jitter & (drawn.sigma > 0)).sum().sqrt()

    codes = (drawn.order * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = torch.unique(codes, return_counts=True)[1].float()
    assert len(counts) == 24  # every order of the four ops
    assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 60  # chi-squared, 23 degrees, p < 1e-4


def test_a_view_does_not_depend_on_its_batch(photos):
    images = to_batch([photo.resize((40, 40)) for photo in photos])
    keys = keys_of(len(images), view=1)
    views = augment.apply(images, augment.draw(VIEW_B, keys), dtype=torch.float32)
    part = augment.apply(images[5:9], augment.draw(VIEW_B, keys[5:9]), dtype=torch.float32)
    assert torch.allclose(views[5:9], part, atol=1e-5)


def test_output_is_half_and_channels_last(photos):
    images = to_batch([photo.resize((40, 40)) for photo in photos])
    views = augment.apply(images, augment.draw(VIEW_A, keys_of(len(images))))
    assert views.dtype == torch.float16 and views.shape == (len(images), 3, 40, 40)
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_wrong_input_is_refused():
    parameters = augment.draw(VIEW_A, keys_of(2))
    with pytest.raises(ValueError, match="uint8"):
        augment.apply(torch.zeros(2, 8, 8, 3), parameters)
    with pytest.raises(ValueError, match="parameters for 2"):
        augment.apply(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), parameters)


def test_the_definition_compiles_to_one_graph_with_the_same_views(photos):
    """No shape depends on the draw."""
    images = torch.from_numpy(np.stack([np.array(photo.resize((40, 33))) for photo in photos]))
    compiled = torch.compile(augment.apply, dynamic=False, fullgraph=True, backend="aot_eager")
    strong = augment.Branch(blur=0.5, solarize=0.5, grayscale=0.3)
    for epoch in range(2):
        keys = view_keys(np.arange(len(images)), seed=0, epoch=epoch, view=0)
        parameters = augment.draw(strong, keys)
        expected = augment.apply(images, parameters, dtype=torch.float32)
        views = compiled(images, parameters.to(images.device), dtype=torch.float32)
        assert torch.allclose(views, expected, atol=1e-4)


def test_concatenated_draws_are_those_of_both_batches():
    keys = view_keys(np.arange(6), seed=0, epoch=0, view=0)
    parts = [augment.draw(branch, keys) for branch in (augment.VIEW_A, augment.VIEW_B)]
    concatenated = augment.concatenate(*parts)
    assert len(concatenated) == 12
    for field in dataclasses.fields(concatenated):
        ours = getattr(concatenated, field.name)
        assert torch.equal(ours[:6], getattr(parts[0], field.name))
        assert torch.equal(ours[6:], getattr(parts[1], field.name))


def test_threads_give_the_same_views(photos):
    images = to_batch(photo.resize((40, 33)) for photo in photos[:11])
    parameters = augment.draw(Branch(blur=0.5, solarize=0.5), keys_of(11))
    views = augment.apply_in_threads(images, parameters, dtype=torch.float32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(views, augment.apply(images, parameters, dtype=torch.float32), atol=1e-5)
    again = augment.apply_in_threads(images, parameters, dtype=torch.float32)
    assert torch.equal(views, again)
