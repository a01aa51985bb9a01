import pytest
import torch

from distilled_decoding.metrics.features import Classifier, ClassifierConfig
from distilled_decoding.metrics.frechet import Statistics
from distilled_decoding.metrics.reference import check_reference, real_statistics, score


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(image_channels=1, width=4, num_classes=3)).eval()


def uint8_images(num=600):
    shape = (num, 1, 16, 16)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_are_the_pooled_last_stage_and_the_head_reads_them(classifier):
    image_BCHW = torch.randn(5, 1, 32, 32)
    scores = classifier(image_BCHW)
    maps = classifier.stages_BCHW(image_BCHW)
    assert [m.shape for m in maps] == [(5, 4, 16, 16), (5, 8, 8, 8), (5, 16, 4, 4)]
    torch.testing.assert_close(scores.feature_BD, maps[-1].mean((2, 3)))
    torch.testing.assert_close(scores.logits_BV, classifier.head(scores.feature_BD))


def test_an_image_is_judged_alone(classifier):
    image_BCHW = torch.randn(6, 1, 16, 16)
    together, alone = classifier(image_BCHW).feature_BD, classifier(image_BCHW[2:3]).feature_BD
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


def test_uint8_images_are_scored_on_the_scale_of_training(classifier):
    image_BCHW = uint8_images(4)
    scores = score(classifier, image_BCHW)
    assert torch.equal(scores.logits_BV, classifier(image_BCHW.float() / 127.5 - 1).logits_BV)
    assert not scores.feature_BD.requires_grad


def test_real_statistics_are_those_of_all_images_at_once(classifier):
    image_NCHW = uint8_images()
    statistics = real_statistics(classifier, image_NCHW, "noise")
    feature_ND = score(classifier, image_NCHW).feature_BD.double()
    assert (statistics.count, statistics.images) == (600, "noise")
    torch.testing.assert_close(statistics.mean_D, feature_ND.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.covariance_DD, feature_ND.T.cov(), rtol=1e-4, atol=1e-7)


def test_a_classifier_that_cannot_measure_is_refused(classifier):
    with pytest.raises(ValueError, match="reads 1 image channels, but the images have 3"):
        score(classifier, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="training mode"):
        score(classifier.train(), uint8_images(2))


def test_a_reference_must_be_of_the_classifier_and_the_classifier_of_the_classes(classifier):
    reference = real_statistics(classifier, uint8_images(4))
    check_reference(reference, classifier, num_classes=3)
    with pytest.raises(ValueError, match="knows 3 classes, the model 10"):
        check_reference(reference, classifier, num_classes=10)
    foreign = Statistics(4, reference.mean_D, reference.covariance_DD, "other", "real test images")
    with pytest.raises(ValueError, match="'real test images' was measured with extractor other"):
        check_reference(foreign, classifier, num_classes=3)
