"""Every augmentation op against Pillow or torchvision, and the parameters' distributions."""

import multiprocessing

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
    flags = ("flip", "jitter", "grayscale", "solarize")
    values = {name: torch.zeros(count, dtype=torch.bool) for name in flags}
    values["factors"] = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1)
    values |= {"order": torch.arange(4).repeat(count, 1), "sigma": torch.zeros(count)}
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


def jitter(picture, parameters: Draw, row: int, order):
    """The colour ops of a sample, as Pillow computes them."""
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for op in order:
        picture = functions[op](picture, parameters.factors[row, op].item())
    return picture


@pytest.fixture(scope="module", params=[(224, 224), (33, 47)])
def pictures(request, photos):
    return [photo.resize(request.param[::-1]) for photo in photos]


@pytest.mark.parametrize(
    "field,function,limit",
    [
        ("flip", TF.hflip, 1e-4),
        ("grayscale", lambda p: TF.to_grayscale(p, num_output_channels=3), 0.51),  # Pillow rounds
        ("solarize", lambda p: ImageOps.solarize(p, 128), 1e-4),
    ],
)
def test_ops_of_selected_images_against_pillow(pictures, field, function, limit):
    selected = torch.arange(len(pictures)) % 3 == 0
    parameters = neutral(len(pictures), **{field: selected})
    difference = compare(pictures, parameters, lambda p, i: function(p) if selected[i] else p)
    assert difference.max() < limit


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
    orders = [[op for op in order if op != augment.HUE] for order in parameters.order.tolist()]
    drawn = compare(pictures, parameters, lambda p, i: jitter(p, parameters, i, orders[i]))
    fixed = compare(pictures, parameters, lambda p, i: jitter(p, parameters, i, range(3)))
    assert drawn.mean() < 1.5
    assert drawn.mean() < 0.6 * fixed.mean()


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

    def reference(picture, i):
        if parameters.flip[i]:
            picture = TF.hflip(picture)
        if parameters.jitter[i]:
            picture = jitter(picture, parameters, i, parameters.order[i].tolist())
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


def test_the_definition_compiles_to_one_graph_with_the_same_views(photos):
    """No shape depends on the draw."""
    images = to_batch([photo.resize((40, 33)) for photo in photos])
    compiled = torch.compile(augment.apply, dynamic=False, fullgraph=True, backend="aot_eager")
    strong = augment.Branch(blur=0.5, solarize=0.5, grayscale=0.3)
    for epoch in range(2):
        parameters = augment.draw(strong, keys_of(len(images), epoch))
        expected = augment.apply(images, parameters, dtype=torch.float32)
        views = compiled(images, parameters.to(images.device), dtype=torch.float32)
        assert torch.allclose(views, expected, atol=1e-4)


def test_a_forked_process_has_threads_of_its_own():
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    parameters = augment.draw(VIEW_A, view_keys(np.arange(4), seed=0, epoch=0, view=0))
    augment.apply_in_threads(images, parameters)
    process = multiprocessing.get_context("fork").Process(
        target=augment.apply_in_threads, args=(images, parameters)
    )
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0  # it would wait for threads that do not exist
    finally:
        process.kill()


def test_threads_give_the_same_views(photos):
    images = to_batch(photo.resize((40, 33)) for photo in photos[:11])
    parameters = augment.draw(Branch(blur=0.5, solarize=0.5), keys_of(11))
    views = augment.apply_in_threads(images, parameters, dtype=torch.float32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(views, augment.apply(images, parameters, dtype=torch.float32), atol=1e-5)
    again = augment.apply_in_threads(images, parameters, dtype=torch.float32)
    assert torch.equal(views, again)
