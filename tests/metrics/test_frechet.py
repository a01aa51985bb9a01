import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm

from distilled_decoding import zoo
from distilled_decoding.metrics.frechet import Statistics, frechet_distance, warn_if_few


def gather(feature_ND, extractor="net", images="set", shape=None):
    return Statistics.of(feature_ND, extractor, images, shape)


def features(seed, num=400, width=6):
    generator = torch.Generator().manual_seed(seed)
    mixing_DD = torch.randn(width, width, generator=generator)
    return torch.randn(num, width, generator=generator) @ mixing_DD + torch.randn(width, generator=generator)


def test_statistics_are_mean_and_unbiased_covariance_in_float64():
    feature_ND = features(0)
    statistics = gather(feature_ND)
    assert statistics.count == 400
    torch.testing.assert_close(statistics.mean_D, feature_ND.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.covariance_DD, feature_ND.double().T.cov(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_order_of_images_changes_no_digit(offset):
    feature_ND = features(1) + offset
    whole = gather(feature_ND)
    for order_N in (torch.arange(400).flip(0), torch.randperm(400, generator=torch.Generator().manual_seed(0))):
        permuted = gather(feature_ND[order_N])
        assert torch.equal(permuted.mean_D, whole.mean_D)
        assert torch.equal(permuted.covariance_DD, whole.covariance_DD)


def test_distance_agrees_with_the_matrix_square_root():
    a, b = gather(features(2)), gather(features(3))
    root = sqrtm(a.covariance_DD.numpy() @ b.covariance_DD.numpy()).real
    expected = (
        (a.mean_D - b.mean_D).square().sum() + a.covariance_DD.trace() + b.covariance_DD.trace() - 2 * root.trace()
    )
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_distance_of_commuting_gaussians_is_the_closed_form():
    mean_D, deviation_D = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([1.0, 3.0, 0.2]).double()
    a = Statistics(10, torch.zeros(3).double(), torch.eye(3).double(), "net", "a", None)
    b = Statistics(10, mean_D, deviation_D.square().diag(), "net", "b", None)
    expected = (mean_D.square() + (deviation_D - 1).square()).sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num", [400, 4])
def test_a_set_is_at_distance_zero_from_itself_even_with_a_singular_covariance(num):
    statistics = gather(features(4, num))
    assert 0 <= frechet_distance(statistics, statistics) < 1e-5


def test_distance_grows_with_noise():
    feature_ND, noise_ND = features(5), torch.randn(400, 6, generator=torch.Generator().manual_seed(6))
    clean = gather(feature_ND)
    distances = [frechet_distance(clean, gather(feature_ND + s * noise_ND)) for s in (0.1, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances) and distances[0] > 0


def shapes(num=300):
    """Grey ellipses and boxes of random size, place and brightness on black, 32 px."""
    generator = torch.Generator().manual_seed(9)
    y_HW, x_HW = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    value_NP = torch.rand(num, 5, generator=generator)
    image_NHW = torch.zeros(num, 32, 32)
    for image_HW, (x, y, width, height, level) in zip(image_NHW, value_NP.tolist(), strict=True):
        u_HW, v_HW = (x_HW - 10 - 12 * x) / (4 + 8 * width), (y_HW - 10 - 12 * y) / (4 + 8 * height)
        inside_HW = u_HW**2 + v_HW**2 < 1 if level < 0.5 else torch.maximum(u_HW.abs(), v_HW.abs()) < 1
        image_HW[inside_HW] = 120 + 130 * level
    return image_NHW[:, None]


def of_images(extractor, image_NCHW, batch=100):
    images = image_NCHW.clamp(0, 255).round().to(torch.uint8).split(batch)
    return gather(torch.cat([extractor.scores(image_BCHW).feature_BD for image_BCHW in images]))


def test_damage_makes_images_worse_step_by_step_and_batches_do_not_matter():
    extractor, image_NCHW = zoo.extractor("classifier"), shapes()
    clean = of_images(extractor, image_NCHW)
    noise_NCHW = torch.randn(image_NCHW.shape, generator=torch.Generator().manual_seed(10))
    noisy = [of_images(extractor, image_NCHW + scale * noise_NCHW) for scale in (0, 4, 16, 48)]
    blurred = [of_images(extractor, F.avg_pool2d(image_NCHW, k, 1, k // 2)) for k in (1, 3, 5, 9)]
    for damaged in (noisy, blurred):
        first, *distances = [frechet_distance(one, clean) for one in damaged]
        assert first < 1e-4 * distances[0] and distances == sorted(distances)
    other_batches = of_images(extractor, image_NCHW + 16 * noise_NCHW, batch=7)
    assert frechet_distance(other_batches, clean) == pytest.approx(frechet_distance(noisy[2], clean), rel=1e-4)


def test_too_few_images_are_warned_of():
    extractor = zoo.extractor("classifier")
    with pytest.warns(UserWarning, match=r"128 images do not fill 128 features.*singular.*bias.*\(KID\)"):
        warn_if_few(128, extractor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few(129, extractor)


def test_known_shapes_must_be_equal_and_unknown_ones_and_counts_are_let_through():
    feature_ND = features(8)
    large, small, unknown = (gather(feature_ND, shape=shape) for shape in ((3, 256, 256), (1, 32, 32), None))
    with pytest.raises(ValueError, match="'set' has images of 3 x 256 x 256 .* of 1 x 32 x 32"):
        frechet_distance(large, small)
    assert frechet_distance(large, dataclasses.replace(unknown, count=None)) < 1e-5


def test_what_cannot_be_compared_is_refused():
    a = gather(features(8))
    with pytest.raises(ValueError, match="extractor net.*other"):
        frechet_distance(a, gather(features(8), extractor="other"))
    with pytest.raises(ValueError, match="6 features.* 5"):
        frechet_distance(a, gather(features(8, width=5)))
    with pytest.raises(ValueError, match="1 images"):
        frechet_distance(a, Statistics(1, a.mean_D, a.covariance_DD, "net", "lonely", None))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        gather(features(8, num=1))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        gather(torch.zeros(0, 6))
