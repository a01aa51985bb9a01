import pytest
import torch
from scipy.linalg import sqrtm

from distilled_decoding.checkpoint import save_tensors
from distilled_decoding.metrics.frechet import Accumulator, Statistics, frechet_distance


def gather(feature_ND, batch=64, extractor="net", images="set"):
    accumulator = Accumulator(extractor, images)
    for feature_BD in feature_ND.split(batch):
        accumulator.update(feature_BD)
    return accumulator.statistics()


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
def test_the_batch_size_does_not_matter(offset):
    feature_ND = features(1).double() + offset
    whole = gather(feature_ND, 400)
    for batch in (1, 7, 399):
        parts = gather(feature_ND, batch)
        torch.testing.assert_close(parts.mean_D, whole.mean_D, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.covariance_DD, whole.covariance_DD, rtol=0, atol=1e-9)


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
    a = Statistics(10, torch.zeros(3).double(), torch.eye(3).double(), "net", "a")
    b = Statistics(10, mean_D, deviation_D.square().diag(), "net", "b")
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


def test_statistics_survive_the_disk(tmp_path):
    statistics = gather(features(7), extractor="abc", images="400 test images")
    statistics.save(tmp_path / "reference.safetensors")
    loaded = Statistics.load(tmp_path / "reference.safetensors")
    assert (loaded.count, loaded.extractor, loaded.images) == (400, "abc", "400 test images")
    assert torch.equal(loaded.mean_D, statistics.mean_D)
    assert torch.equal(loaded.covariance_DD, statistics.covariance_DD)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_tensors(tmp_path / "weights.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="no feature statistics.*weight"):
        Statistics.load(tmp_path / "weights.safetensors")


def test_what_cannot_be_compared_is_refused():
    a = gather(features(8))
    with pytest.raises(ValueError, match="extractor net.*other"):
        frechet_distance(a, gather(features(8), extractor="other"))
    with pytest.raises(ValueError, match="6 features.* 5"):
        frechet_distance(a, gather(features(8, width=5)))
    with pytest.raises(ValueError, match="1 images"):
        frechet_distance(a, Statistics(1, a.mean_D, a.covariance_DD, "net", "lonely"))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        gather(features(8, num=1))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        Accumulator("net", "nothing").statistics()
